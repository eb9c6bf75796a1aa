"""How far the images decide the order of runs: intervals of measures by resampling the images (bootstrap)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import many

RESAMPLES = 100
"""Number of resamples; the standard deviation of so many has an error of 7 %."""
WIDE = 1.96
"""Half of a 95 % interval in standard deviations."""


def resampled(measure: Callable[[Tensor], float], images: int, seed: int) -> list[float]:
    """Return a measure on resamples of the images; equal numbers of images and seeds have the same resamples.

    Args:
        measure: Return the measure of the images at these places, which occur repeatedly.
        images: Number of images.
        seed: Seed of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(images, (RESAMPLES, images), generator=generator)
    return [measure(one) for one in places]


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation of values; None if one of them is not finite."""
    if not all(map(math.isfinite, values)):
        return None
    return float(torch.tensor(values, dtype=torch.float64).std())


def with_intervals(ranked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs with "low" and "high" of their score, and its "difference" from that of the first run.

    The differences are of the same resamples of the same images. The resamples ("resampled") are removed.
    """
    runs = []
    for one in ranked:
        rest = {key: value for key, value in one.items() if key != "resampled"}
        runs.append(rest | _interval(one["score"], one["resampled"]))
        if one is not ranked[0]:
            pairs = [a - b for a, b in zip(ranked[0]["resampled"], one["resampled"], strict=True)]
            if one["measured"] != ranked[0]["measured"]:  # not the same images: some are unreadable for one of them
                pairs = [math.nan]
            size = ranked[0]["score"] - one["score"]
            runs[-1]["difference"] = {"value": size} | _interval(size, pairs)
    return runs


def _interval(value: float, values: Sequence[float]) -> dict[str, float | None]:
    spread = deviation(values)
    if spread is None:
        return {"low": None, "high": None}
    return {"low": value - WIDE * spread, "high": value + WIDE * spread}


def undecided(ranked: Sequence[Mapping[str, Any]], by: str) -> list[str]:
    """Return sentences on the runs that these images cannot tell from the first one."""
    first, notes = ranked[0], []
    for one in ranked[1:]:
        gap = one["difference"]
        if gap["low"] is None:
            notes.append(f"no interval of {by} is known for {one['run']}: it could not be computed on resampled images")
        elif gap["low"] <= 0:
            images = many(one["measured"], "image")
            notes.append(
                f"{first['run']} and {one['run']} cannot be told apart by {by} of {images}: the difference is "
                f"{gap['value']:.3g}, 95 % interval {gap['low']:+.3g} to {gap['high']:+.3g}"
            )
    return notes
