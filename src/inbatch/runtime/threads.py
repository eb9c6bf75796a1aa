"""Number of threads of a run on a CPU, chosen every epoch: fewer while other processes are busy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from inbatch.runtime import distributed, tuning
from inbatch.runtime.cpu_load import Load, others_busy
from inbatch.runtime.paths import variable
from inbatch.runtime.resources import cores

_WINDOW = 1.0
"""Minimum seconds of a load measurement: the system counts CPU time in hundredths of a second."""


def threads_beside(busy: float | None, cores: int, most: int) -> int:
    """Return the number of threads to use: one for each core that other processes leave free, from 1 to `most`.

    Threads share an operation equally and wait for the slowest of them, so one that shares its core with another
    process delays all.

    Args:
        busy: cores that other processes keep busy; None if unknown. Half a core counts as one.
        cores: cores that this process may use.
        most: threads on an idle machine.
    """
    return most if busy is None else max(1, min(most, math.ceil(cores - busy - 0.5)))


def adapts(device: torch.device) -> bool:
    """Return whether a run changes its number of threads.

    Only a single process on a CPU does, if it was set up by `inbatch ...` or `inbatch.tune()` and the user has not
    set OMP_NUM_THREADS.
    """
    alone = device.type == "cpu" and distributed.world() == 1
    return alone and tuning.tuned and not variable("OMP_NUM_THREADS") and torch.get_num_threads() > 1


class Threads:
    """Context manager that sets the number of threads of a run and restores the previous number on exit.

    Args:
        device: device of the run.
        used: receives every number of threads in use.
    """

    def __init__(self, device: torch.device, used: list[int]) -> None:
        self.used, self._most, self._adapts = used, torch.get_num_threads(), adapts(device)
        self._load: Load | None = None
        self._said = False

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._adapts:
            torch.set_num_threads(self._most)

    def decide(self) -> str:
        """Choose the number of threads until the next call; return a message if it is reduced for the first time."""
        sentence = self._choose() if self._adapts else ""
        if torch.get_num_threads() not in self.used:
            self.used.append(torch.get_num_threads())
        return sentence

    def _choose(self) -> str:
        if self._load is None:
            self._load, busy = Load(), others_busy()
        elif self._load.seconds < _WINDOW:
            return ""
        else:
            busy = self._load.busy()
        count = threads_beside(busy, cores(), self._most)
        torch.set_num_threads(count)
        if count == self._most or self._said:
            return ""
        self._said = True
        return (
            f"Other processes keep {busy:.1f} of {cores()} cores busy: this run computes with {count} instead of "
            f"{self._most} threads while they do, decided again every epoch. OMP_NUM_THREADS={self._most} keeps all."
        )


@contextmanager
def beside_others(device: torch.device) -> Iterator[None]:
    """Compute with the number of threads that a run would use now, so that timings here match the steps of a run."""
    with Threads(device, []) as threads:
        threads.decide()
        yield
