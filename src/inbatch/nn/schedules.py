"""Schedules: pure functions of the step number from floats to a float, so that a run needs no other clock.

Public implementations differ by one step in where a ramp starts and ends; `Ends` names the three conventions in use.
"""

import math
from collections.abc import Iterable
from typing import Literal

from inbatch.errors import ConfigError

Ends = Literal["start", "both", "end"]
"""Which ends of [0, 1] the steps 0 .. n-1 reach. "start": i/n (MoCo v3, BYOL, SimCLR, Barlow Twins, VICReg).
"both": i/(n-1) (warm-up of SwAV and DINO, decay of lightly). "end": (i+1)/n (warm-up of lightly).
"""


def progress(step: float, total: float, ends: Ends = "start") -> float:
    """Return the fraction of `total` steps done at `step`, clamped to [0, 1]; 1 if the phase has no steps."""
    if ends == "end":
        step += 1
    elif ends == "both":
        total -= 1
    return min(max(step / total, 0.0), 1.0) if total > 0 else 1.0


def linear(progress: float, start: float, end: float) -> float:
    """Interpolate linearly from `start` to `end`."""
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """Interpolate from `start` to `end` along half a cosine (Loshchilov and Hutter, 2017, eq. 5, without restarts).

    Used for decreasing learning rates and for the increasing momentum of a target network:
    `cosine(progress(i, n), 0.99, 1.0)` (Grill et al., 2020, section 3.3).
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(
    step: float,
    total: float,
    warmup: float,
    base: float,
    end: float = 0.0,
    start: float = 0.0,
    *,
    ramp: Ends = "start",
    decay: Ends = "start",
) -> float:
    """Return the value of a linear warm-up from `start` to `base`, then half a cosine to `end`.

    Args:
        step: number of the step.
        total: step at which `end` is reached.
        warmup: number of warm-up steps.
        base: value after the warm-up.
        end: final value.
        start: initial value.
        ramp: convention of the warm-up.
        decay: convention of the cosine.

    Raises:
        ConfigError: if the warm-up is longer than the run.
    """
    if not 0 <= warmup <= total:
        raise ConfigError(f"A warm-up of {warmup:g} steps does not fit into {total:g}: shorten it or train longer.")
    if step < warmup:
        return linear(progress(step, warmup, ramp), start, base)
    return cosine(progress(step - warmup, total - warmup, decay), base, end)


def step_decay(step: float, base: float, milestones: Iterable[float], factor: float = 0.1) -> float:
    """Return `base` multiplied by `factor` for every milestone reached."""
    return base * factor ** sum(step >= milestone for milestone in milestones)
