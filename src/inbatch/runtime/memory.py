"""Memory available to a process and memory it uses, as reported by the system."""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from inbatch.runtime.resources import cores, limited_bytes

_UNKNOWN_FREE = 8 * 2**30  # if the system does not report free memory


def free_bytes(device: torch.device, world: int = 1) -> int:
    """Return the free memory for this rank: that of the host, or of the GPU if that is less.

    The host's is limited by a container or a job, and shared by `world` ranks.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        host = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        host = _UNKNOWN_FREE
    host = min([host, *limited_bytes()]) // world
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def threads() -> int:
    """Return the default number of threads: that of torch, at most the number of usable cores."""
    return min(torch.get_num_threads(), cores())


def release_memory(device: torch.device) -> None:
    """Release unused memory, so that it is neither counted as needed by a step nor hides that need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError, AttributeError, TypeError):  # glibc only; Windows has no library None
            ctypes.CDLL(None).malloc_trim(0)
        forget_peak(device)


def used_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process holds; None if the system does not report them, or cannot reset the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if forget_peak(device) else None


def peak(device: torch.device) -> int:
    """Return the maximum of bytes held since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or 0


def forget_peak(device: torch.device) -> bool:
    """Reset the peak; return whether the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """Return a value in bytes from the process status of Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes: of the GPU if it trained on one, else of main memory.

    None on Windows, where Python reports none.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
