"""Report a rank for which the others wait, from the time that each rank needs before its first exchange in a step."""

from statistics import median

import torch

from inbatch.errors import many
from inbatch.runtime import distributed

FACTOR = 1.5
"""A rank is slow if it needs this many times the median of the others."""
STEPS = 50
"""Number of steps over which times are averaged."""
LEAST = 0.005
"""Smallest difference in seconds per step that is reported."""


class SlowRanks:
    """Average times of the ranks: loading, views and forward pass of a step, until a rank needs those of the others.

    The rest of a step takes all ranks equally long, because they wait for each other in it. Under NCCL the host does
    not wait for the forward pass, so that only slow loading is found.

    Args:
        device: device of the exchanges.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.steps = device, 0.0, 0
        self.slow: int | None = None

    def add(self, began: float) -> None:
        """Add a step of this rank that began at a time (`time.perf_counter`)."""
        first = distributed.first_exchange()
        self.seconds += 0.0 if first is None else first - began
        self.steps += 1

    def new_sentence(self) -> str | None:
        """Return a sentence if another rank is slow than at the last call, or none any more. All ranks call it."""
        if distributed.world() == 1 or self.steps < STEPS:
            return None
        mine = torch.tensor([self.seconds / self.steps], dtype=torch.float64, device=self.device)
        times, steps = distributed.gather(mine).tolist(), self.steps
        self.seconds, self.steps = 0.0, 0
        before, self.slow = self.slow, slowest(times)
        if self.slow == before:
            return None
        if self.slow is None:
            return f"rank {before} is no longer slower than the others."
        others = median(times[: self.slow] + times[self.slow + 1 :])
        return (
            f"the others wait for rank {self.slow}: it needs {1e3 * times[self.slow]:.0f} ms for loading, views and "
            f"forward pass of a step, the median of the others is {1e3 * others:.0f} ms ({many(steps, 'step')}). Check "
            "its machine for other processes, slow storage, or fewer cores."
        )


def slowest(times: list[float]) -> int | None:
    """Return the rank with the longest time if it is slow (`FACTOR`, `LEAST`), else None."""
    rank = max(range(len(times)), key=times.__getitem__)
    others = median(times[:rank] + times[rank + 1 :])
    return rank if times[rank] > max(FACTOR * others, others + LEAST) else None
