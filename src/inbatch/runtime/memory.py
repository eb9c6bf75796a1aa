"""What this machine has for a process, and what the process holds: memory, as the system tells."""

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from inbatch.runtime.resources import cores, limited_bytes

_UNKNOWN_FREE = 8 * 2**30  # where the system does not say how much is free


def free_bytes(device: torch.device, world: int = 1) -> int:
    """Free memory for this rank: the host's, or what a container or a job may have of it, shared by `world` ranks, and
    the GPU's if that is less."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        host = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        host = _UNKNOWN_FREE
    host = min([host, *limited_bytes()]) // world
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def threads() -> int:
    """Threads for computing where nobody says how many: torch's own number, no more than there are cores to use."""
    return min(torch.get_num_threads(), cores())


def settle(device: torch.device) -> None:
    """Give back what is no longer used, so that it is not taken for what a step needs, nor hides it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError, AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        forget_peak(device)


def held(device: torch.device) -> int | None:
    """Bytes that this process holds; None where the system does not tell, or not the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if forget_peak(device) else None


def peak(device: torch.device) -> int:
    """Most bytes held since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or 0


def forget_peak(device: torch.device) -> bool:
    """Begin the peak anew; whether the system does that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """Bytes that Linux tells of this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU where it trained on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
