"""Versions and hardware of a measurement, stored with every result."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from inbatch.runtime import tuning
from inbatch.runtime.resources import cores


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, processor, GPU, threads and the commit of the checkout, if any."""
    packages = ("inbatch", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "allocator": "keeps freed memory" if tuning.keeps_memory else "system",
        "denormals": "zero" if float(torch.tensor(1e-39) * 0.5) == 0 else "kept",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
