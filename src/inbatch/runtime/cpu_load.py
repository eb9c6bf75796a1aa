"""Number of this process's cores that other processes keep busy. Does not import torch."""

import multiprocessing
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from inbatch.runtime.resources import affine, cores, launched

_STAT = Path("/proc/stat")
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
"""Clock ticks per second."""


class Load:
    """Load by other processes since this object was created or last queried.

    The CPU time of this process and of its children (data workers) does not count.
    """

    def __init__(self) -> None:
        self._time, self._work = time.perf_counter(), _others()

    @property
    def seconds(self) -> float:
        """Time since the last query."""
        return time.perf_counter() - self._time

    def busy(self) -> float | None:
        """Return the mean number of this process's cores that others kept busy; None if it is unknown.

        It is unknown if the system does not report it, if a quota grants a share of cores that all processes of the
        machine use, or if other ranks of the same run work on this machine.
        """
        since, before = self._time, self._work
        self._time, self._work = time.perf_counter(), _others()
        if before is None or self._work is None or self._time <= since:
            return None
        return max(0.0, (self._work - before) / (self._time - since))


def others_busy(seconds: float = 0.1) -> float | None:
    """Return `Load.busy` for the next `seconds`."""
    load = Load()
    time.sleep(seconds)
    return load.busy()


def worked(stat: str, mine: Collection[str]) -> int:
    """Return the clock ticks in /proc/stat in which these cores were neither idle nor waiting for a disk."""
    lines = [line.split() for line in stat.splitlines()]
    fields = [[int(x) for x in line[1:9]] for line in lines if line[0] in mine]
    return sum(sum(ticks) - ticks[3] - ticks[4] for ticks in fields)


def _others() -> float | None:
    """Return the CPU seconds of other processes on this process's cores; only differences are meaningful."""
    if cores() < affine() or launched("LOCAL_WORLD_SIZE") > 1:
        return None
    try:
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        return worked(_STAT.read_text(), mine) / _TICK - _own()
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _own() -> float:
    """Return the CPU seconds of this process, of its ended children and of its running children."""
    children = multiprocessing.active_children()  # first: it counts just-ended children as ended
    ended = os.times()
    seconds = time.process_time() + ended.children_user + ended.children_system
    for child in children:
        with suppress(OSError):  # it has ended in the meantime
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / _TICK  # user, system, and those of its own ended children
    return seconds
