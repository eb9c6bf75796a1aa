"""The gain of adapted weights over the weights they started from: its mean over seeds and its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LEVEL = 0.95
"""Probability with which the interval covers the gain of further seeds and images."""


@dataclass(frozen=True)
class Gain:
    """A figure before and after training, paired by seed.

    Attributes:
        before, after: The figure of each seed.
        low, high: Bounds of the interval of the mean gain; None with one seed, whose spread is unknown.
        better: "higher" or "lower".
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    low: float | None
    high: float | None
    better: str = "higher"

    @property
    def mean(self) -> float:
        """Mean of the differences, after minus before."""
        return math.fsum(b - a for a, b in zip(self.before, self.after, strict=True)) / len(self.after)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the differences over the seeds; None with one seed."""
        differences = _differences(self.before, self.after)
        return float(differences.std()) if len(differences) > 1 else None

    def shows(self, sign: int) -> bool:
        """Return whether the whole interval is on one side of 0: above for 1, below for -1."""
        bound = self.low if sign > 0 else self.high
        return bound is not None and bound * sign > 0

    def json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "before": list(self.before), "after": list(self.after), "gain": self.mean, "low": self.low,
            "high": self.high, "spread": self.spread, "better": self.better,
        }  # fmt: skip


def accuracy_gain(before: Float[Tensor, "s n"], after: Float[Tensor, "s n"]) -> Gain:
    """Return the gain in accuracy, from the hits (0 to 1) of S seeds on the same N test images.

    Both the seeds of the training and the test images are samples. The variance of the mean difference is at most the
    variance of the seeds' means over S plus that of the images' means over N, with the degrees of freedom of
    Satterthwaite (1946). A few seeds thus have the wide interval of Student's distribution, and many seeds do not hide
    that the test set is small.

    Args:
        before: Hits with the initial weights, which may be the same for every seed.
        after: Hits with the trained weights.
    """
    difference = after.double() - before.double()
    seeds, images = difference.shape
    old, new = (tuple(x.double().mean(1).tolist()) for x in (before, after))
    if seeds < 2 or images < 2:
        return Gain(old, new, None, None)
    parts = [(difference.mean(1).var() / seeds, seeds - 1), (difference.mean(0).var() / images, images - 1)]
    variance = float(sum(part for part, _ in parts))
    freedom = variance**2 / max(float(sum(part**2 / number for part, number in parts)), 1e-300)
    return Gain(old, new, *_interval(float(difference.mean()), variance, max(freedom, 1.0)))


def measure_gain(before: Sequence[float | None], after: Sequence[float | None], better: str) -> Gain:
    """Return the gain in a measure that every seed has once: Student's interval of the paired differences.

    Args:
        before: The measure with the initial weights, by seed; None for nan, as the file of a result holds it.
        after: The measure with the trained weights.
        better: "higher" or "lower".
    """
    old, new = ([math.nan if value is None else value for value in values] for values in (before, after))
    difference = _differences(old, new)
    bounds: tuple[float | None, float | None] = (None, None)
    if len(difference) > 1 and bool(difference.isfinite().all()):
        bounds = _interval(float(difference.mean()), float(difference.var() / len(difference)), len(difference) - 1)
    return Gain(tuple(old), tuple(new), *bounds, better)


def _differences(before: Sequence[float], after: Sequence[float]) -> Float[Tensor, "s"]:
    """Return the differences in double precision: float32 rounds close figures to equal ones."""
    return torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)


def _interval(mean: float, variance: float, freedom: float) -> tuple[float, float]:
    """Return the bounds of Student's interval."""
    from scipy.stats import t

    half = math.sqrt(variance) * float(t.ppf((1 + LEVEL) / 2, freedom))
    return mean - half, mean + half
