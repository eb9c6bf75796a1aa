"""Schedules: pure functions of the step, floats in and float out, so that the step is a run's only clock.

Public code disagrees by one step on where a ramp starts and ends; `Ends` names the three conventions in use.
"""

import math
from collections.abc import Iterable
from typing import Literal

from inbatch.errors import ConfigError

Ends = Literal["start", "both", "end"]
"""Which ends of [0, 1] the steps 0 .. n-1 touch. "start": i/n (MoCo v3, BYOL, SimCLR, Barlow Twins, VICReg).
"both": i/(n-1) (the warm-up of SwAV and DINO, the decay of lightly). "end": (i+1)/n (the warm-up of lightly).
"""


def progress(step: float, total: float, ends: Ends = "start") -> float:
    """How much of `total` steps is done at `step`, clamped to [0, 1]; a phase without length is over."""
    if ends == "end":
        step += 1
    elif ends == "both":
        total -= 1
    return min(max(step / total, 0.0), 1.0) if total > 0 else 1.0


def linear(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along a line."""
    return start + (end - start) * progress


def cosine(progress: float, start: float, end: float) -> float:
    """From `start` to `end` along half a cosine (Loshchilov and Hutter, 2017, eq. 5, without restarts).

    Learning rates fall with it, the momentum of a target network rises: `cosine(progress(i, n), 0.99, 1.0)`
    (Grill et al., 2020, section 3.3).
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
    """Linear from `start` to `base` over `warmup` steps, then half a cosine to `end` at `total` steps.

    Raises ConfigError where the warm-up is longer than the run.
    """
    if not 0 <= warmup <= total:
        raise ConfigError(f"A warm-up of {warmup:g} steps does not fit into {total:g}: shorten it or train longer.")
    if step < warmup:
        return linear(progress(step, warmup, ramp), start, base)
    return cosine(progress(step - warmup, total - warmup, decay), base, end)


def step_decay(step: float, base: float, milestones: Iterable[float], factor: float = 0.1) -> float:
    """`base`, multiplied by `factor` at every milestone reached."""
    return base * factor ** sum(step >= milestone for milestone in milestones)
