"""What this machine has for a process, and what the process holds: memory and cores, as the system tells."""

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

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


def limited_bytes(root: Path = Path("/")) -> list[int]:
    """What the memory limits of this process's control groups leave, which a container or a SLURM job sets.

    Linux, version 2 and 1; a limit of a group above counts, too. Cached files that would be given up at need count as
    free. root: where /proc and /sys stand.
    """
    left = []
    for kinds, path in _control_groups(root):
        v1 = bool(kinds)
        mount = root / "sys/fs/cgroup" / ("memory" if v1 else "")
        limits = ("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high")
        usage, cached = ("memory.usage_in_bytes", "total_inactive_file") if v1 else ("memory.current", "inactive_file")
        group = mount / path.strip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(mount))):
            try:
                used = int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines() if line)
                given = [(folder / name).read_text().strip() for name in limits if (folder / name).exists()]
            except (OSError, ValueError):
                continue  # a group that is not seen from inside a container, or the root, which has no limit
            left += [max(0, int(x) - used + int(stat.get(cached, 0))) for x in given if x != "max"]
    return left


def _control_groups(root: Path) -> list[tuple[str, str]]:
    """(what it controls, path) of the control groups of this process that know memory."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    return [(kinds, path) for _, kinds, path in lines if kinds == "" or "memory" in kinds.split(",")]


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
