"""Choice of the faster library for float32 matrix products on this CPU."""

import contextlib
import functools
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_LOCK, _users, _before = threading.Lock(), 0, "none"


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Compute float32 products on the CPU by oneDNN if it is the faster library."""
    if not onednn():
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    global _users, _before
    with _LOCK:  # of losses that run concurrently, the first sets the precision and the last restores it
        if not _users:
            _before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _users += 1
    try:
        yield
    finally:
        with _LOCK:
            _users -= 1
            if not _users:
                matmul.fp32_precision = _before


@functools.cache
def onednn() -> bool:
    """Return whether float32 products of oneDNN are faster: on AMD processors, where those of MKL take twice as long.

    PyTorch uses oneDNN for these products only if it may round them to bfloat16. oneDNN rounds if the processor has
    AMX, which is excluded here; the test product below detects rounding by future versions.
    """
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    words = set(Path("/proc/cpuinfo").read_text().split())
    if "AuthenticAMD" not in words or not {"avx2", "avx512f"} & words or any(word.startswith("amx") for word in words):
        return False
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    x = torch.linspace(-1, 1, 2**14).view(128, 128)
    exact = x.double() @ x.double().T
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        result = x @ x.T
    finally:
        matmul.fp32_precision = before
    return bool((result - exact).abs().max() < 1e-5 * exact.abs().max())
