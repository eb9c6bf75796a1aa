"""Kendall's tau-b, alone and pooled over groups of values with an interval by resampling."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray


class Tau(NamedTuple):
    """Pooled tau-b with an interval; nan if no pair differs in both values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Paired values that are compared with each other.

    Attributes:
        x, y: The values.
        units: The unit of each pair, such as the setting of which a run is one seed; whole units are resampled.
    """

    x: Sequence[float]
    y: Sequence[float]
    units: Sequence[Hashable]


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Kendall's tau-b of paired values (Kendall 1945); nan if all x or all y are equal.

    tau-b = sum_ij s(x_i - x_j) s(y_i - y_j) / sqrt(sum_ij s(x_i - x_j)^2 sum_ij s(y_i - y_j)^2), s the sign.
    """
    same, total = (float(part[0]) for part in _pairs(x, y, np.ones((1, len(x)))))
    return same / total if total else np.nan


def pooled_tau(groups: Sequence[Group], resamples: int = 1000, seed: int = 0) -> Tau:
    """Return tau-b over all pairs within groups: the sums of the groups' numerators and denominators, divided.

    Args:
        groups: The groups; pairs with a value that is not finite are left out.
        resamples: Number of resamples of the interval.
        seed: Seed of the resampling.

    Returns:
        The value, and the 2.5th and 97.5th percentile over resamples in which the units of every group are drawn with
        replacement (Efron 1979).
    """
    generator = np.random.default_rng(seed)
    same, total = np.zeros(resamples + 1), np.zeros(resamples + 1)
    for group in groups:
        usable = np.isfinite(group.x) & np.isfinite(group.y)
        x, y = np.asarray(group.x)[usable], np.asarray(group.y)[usable]
        names = [unit for unit, use in zip(group.units, usable, strict=True) if use]
        if len(x) < 2:
            continue
        number = {unit: i for i, unit in enumerate(dict.fromkeys(names))}
        drawn = generator.multinomial(len(number), np.full(len(number), 1 / len(number)), resamples)
        weights = np.concatenate([np.ones((1, len(x))), drawn[:, [number[unit] for unit in names]]])
        for pooled, part in zip((same, total), _pairs(x, y, weights), strict=True):
            pooled += part
    with np.errstate(invalid="ignore", divide="ignore"):
        taus = np.where(total > 0, same / total, np.nan)
    if np.isnan(taus[0]):
        return Tau(np.nan, np.nan, np.nan)
    low, high = np.nanpercentile(taus[1:], [2.5, 97.5])
    return Tau(float(taus[0]), float(low), float(high))


def _pairs(x: Values, y: Values, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return numerator and denominator of tau-b, (resamples,), if value i occurs weights[:, i] times."""
    signs = [np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float))]
    same, in_x, in_y = (
        ((weights @ pairs) * weights).sum(1) for pairs in (signs[0] * signs[1], signs[0] ** 2, signs[1] ** 2)
    )
    return same, np.sqrt(in_x * in_y)
