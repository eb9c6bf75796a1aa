"""Memory and cores that a container or a job grants this process. Does not import torch."""

import os
import socket
from pathlib import Path

from inbatch.errors import ConfigError
from inbatch.runtime.paths import variable


def launched(name: str, default: int = 1) -> int:
    """Return an integer that a launcher set in the environment; ConfigError if the value is not an integer."""
    value = variable(name) or str(default)
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r} in the environment: a launcher sets it to a whole number")
    return int(value)


def launch_id() -> str | None:
    """Return what all starts of the processes by one torchrun command have in common; None without torchrun.

    torchrun restarts all processes after a death and when a machine leaves or joins; only the first case is counted in
    its variables. Without --rdzv-id, which all machines need, one machine is meant: its launcher identifies it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    name = variable("TORCHELASTIC_RUN_ID") or "none"
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def cores(root: Path = Path("/")) -> int:
    """Return the processor cores this process may use: its affinity, or the quota of its container if that is less."""
    return max(1, min([affine(), *(int(quota) for quota in _quotas(root))]))


def affine() -> int:
    """Return the number of cores this process is bound to, ignoring quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> list[float]:
    """Return the CPU quotas, in cores, of this process's control groups and their ancestors; Linux, v2 and v1."""
    quotas = []
    for kinds, folder in _folders(root, "cpu"):
        try:
            if kinds:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue  # a group invisible from inside a container, or the root, which has no limit
    return quotas


def limited_bytes(root: Path = Path("/")) -> list[int]:
    """Return the bytes left by the memory limits of this process's control groups, set by a container or a SLURM job.

    Linux, versions 2 and 1; limits of ancestors count, too. Reclaimable cached files count as free.

    Args:
        root: directory that contains /proc and /sys.
    """
    left = []
    for kinds, folder in _folders(root, "memory"):
        v1 = bool(kinds)
        limits = ("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high")
        usage, cached = ("memory.usage_in_bytes", "total_inactive_file") if v1 else ("memory.current", "inactive_file")
        try:
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines() if line)
            values = [(folder / name).read_text().strip() for name in limits if (folder / name).exists()]
        except (OSError, ValueError):
            continue
        left += [max(0, int(x) - used + int(stat.get(cached, 0))) for x in values if x != "max"]
    return left


def _folders(root: Path, controller: str) -> list[tuple[str, Path]]:
    """Return (controllers, empty in version 2; folder) of this process's groups of a controller and their ancestors."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for _, kinds, path in lines:
        if kinds and controller not in kinds.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (kinds and _mounted(root, kinds, controller))
        group = mount / path.strip("/")
        folders += [(kinds, folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return folders


def _mounted(root: Path, kinds: str, controller: str) -> str:
    """Return the folder of a version-1 controller: its own name, or the names of all controllers mounted with it."""
    return controller if (root / "sys/fs/cgroup" / controller).exists() else kinds
