"""What a container or a job allows this process: memory and cores. Needs no torch."""

import os
from pathlib import Path

from inbatch.errors import ConfigError


def launched(name: str, default: int = 1) -> int:
    """A whole number that a launcher left in the environment; ConfigError where something else stands there."""
    given = os.environ.get(name) or str(default)
    if not given.isdecimal():
        raise ConfigError(f"{name} is {given!r} in the environment: a launcher sets it to a whole number")
    return int(given)


def cores(root: Path = Path("/")) -> int:
    """Processor cores this process may use: those it is bound to, or what a container's quota gives if that is less."""
    return max(1, min([affine(), *(int(quota) for quota in _quotas(root))]))


def affine() -> int:
    """Cores this process is bound to, whatever its quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> list[float]:
    """Cores by the processor quotas of this process's control groups and of those above; Linux, version 2 and 1."""
    found = []
    for kinds, folder in _folders(root, "cpu"):
        try:
            if kinds:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue  # a group that is not seen from inside a container, or the root, which has no limit
    return found


def limited_bytes(root: Path = Path("/")) -> list[int]:
    """What the memory limits of this process's control groups leave, which a container or a SLURM job sets.

    Linux, version 2 and 1; a limit of a group above counts, too. Cached files that would be given up at need count as
    free. root: where /proc and /sys stand.
    """
    left = []
    for kinds, folder in _folders(root, "memory"):
        v1 = bool(kinds)
        limits = ("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high")
        usage, cached = ("memory.usage_in_bytes", "total_inactive_file") if v1 else ("memory.current", "inactive_file")
        try:
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines() if line)
            given = [(folder / name).read_text().strip() for name in limits if (folder / name).exists()]
        except (OSError, ValueError):
            continue
        left += [max(0, int(x) - used + int(stat.get(cached, 0))) for x in given if x != "max"]
    return left


def _folders(root: Path, controller: str) -> list[tuple[str, Path]]:
    """(what it controls; nothing in version 2, folder) of this process's groups of a controller and of those above."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, kinds, path in lines:
        if kinds and controller not in kinds.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (kinds and _mounted(root, kinds, controller))
        group = mount / path.strip("/")
        found += [(kinds, folder) for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return found


def _mounted(root: Path, kinds: str, controller: str) -> str:
    """The folder of a controller of version 1: by its own name, or by those of all that it is mounted with."""
    return controller if (root / "sys/fs/cgroup" / controller).exists() else kinds
