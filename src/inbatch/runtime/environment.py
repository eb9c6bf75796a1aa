"""Versions, hardware and process settings of a measurement, stored with every result."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from inbatch.runtime import tuning
from inbatch.runtime.resources import cores

REQUIRED = ("inbatch", "torch", "torchvision", "timm", "numpy", "scikit-learn", "pillow")
OPTIONAL = ("numba", "simplejpeg", "tifffile", "triton")
"""Libraries that compute something in another way, or not at all, if they are not installed."""

VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA",
    "KMP_DETERMINISTIC_REDUCTION", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "NUMBA_CPU_FEATURES",
    "NUMBA_CPU_NAME", "NUMBA_DISABLE_JIT", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)  # fmt: skip
"""Environment variables that change the rounding of results."""


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, processor, GPU, threads, numerical settings and the commit of the checkout, if any."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in REQUIRED} | _optional(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "allocator": "keeps freed memory" if tuning.keeps_memory else "system",
        "denormals": "zero" if float(torch.tensor(1e-39) * 0.5) == 0 else "kept",
        "flags": _flags(device),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": _commit(),
    }


_version = cache(version)  # reading all of them takes 50 ms


def _optional() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in OPTIONAL:
        try:
            versions[name] = _version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _flags(device: torch.device) -> dict[str, Any]:
    """Return the settings of torch in this process that change rounding on the device."""
    backends: Any = torch.backends
    flags = {"deterministic algorithms": torch.are_deterministic_algorithms_enabled()}
    if device.type == "cuda":
        flags |= {"cudnn.deterministic": backends.cudnn.deterministic, "cudnn.benchmark": backends.cudnn.benchmark}
        parts = {"cuda.matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv}
    else:
        flags |= {"mkldnn": backends.mkldnn.enabled}
        parts = {"mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv}
    return flags | {f"{name}.fp32_precision": part.fp32_precision for name, part in parts.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def _commit() -> str | None:
    """Return the commit of the source tree this package runs from; None if it is installed."""
    folder = Path(__file__).resolve().parent
    if "site-packages" in folder.parts:
        return None
    try:
        call = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        return subprocess.run(call, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
