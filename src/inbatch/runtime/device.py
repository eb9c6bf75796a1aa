"""Device and precision of a process."""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from inbatch.errors import ConfigError
from inbatch.runtime import distributed

NO_MPS = (
    "inbatch does not compute on Apple's GPU (mps): W-MSE, whitening and others compute in float64, which mps does not "
    "have, and no result on mps has been checked; use --device cpu, or auto"
)


def device_for(name: str) -> torch.device:
    """Return the device of this process: its CUDA GPU if there is one and it is requested, else the CPU."""
    if name == "mps":
        raise ConfigError(NO_MPS)
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("PyTorch finds no CUDA GPU: use --device cpu, or install a PyTorch build with CUDA")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def precision_for(name: str, device: torch.device) -> torch.dtype:
    """Return bf16 if the hardware multiplies in it and "auto" or "bf16" is requested, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16}[name]
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None, *, enabled: bool) -> Iterator[None]:
    """Compute in half precision if `enabled`, with the present weights, also inside of another autocast context.

    torch keeps the casts of weights until the outermost context ends, even if that one is disabled: inside of one, the
    passes after a step of an optimiser would use the weights from before it.
    """
    if not enabled:
        with torch.autocast(device.type, enabled=False):
            yield
        return
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, dtype):
            yield
    finally:
        torch.clear_autocast_cache()


def _cpu_has_bf16() -> bool:
    """Return whether the processor reports bf16 multiplication (AVX-512 BF16, AMX, ARM); known on Linux only."""
    return bool(processor_words() & {"avx512_bf16", "amx_bf16", "bf16"})


def slow_weight_gradients() -> bool:
    """Return whether oneDNN's bf16 weight gradient of small convolutions is slow: AVX-512 BF16 without AMX."""
    words = processor_words()
    return "avx512_bf16" in words and not any(word.startswith("amx") for word in words)


@functools.cache
def processor_words() -> frozenset[str]:
    """Return the words of /proc/cpuinfo, flags among them; none on other systems."""
    if platform.system() != "Linux":
        return frozenset()
    return frozenset(Path("/proc/cpuinfo").read_text().split())
