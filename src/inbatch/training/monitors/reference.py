"""Reference curves of a recipe with one or more seeds, and the band around them.

A curve is the entry of that name in a run's `result.json`: for each evaluation a dict of epoch, loss (the mean of the
steps since the previous evaluation), knn (a share of 1), feature_std, rankme.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inbatch.errors import ConfigError, listed
from inbatch.runtime.paths import path_of
from inbatch.runtime.text import one_line
from inbatch.training.monitors.reference_files import MEASURES, differing, read_result

Entry = Mapping[str, float]
Curve = Sequence[Entry]

FLOORS = {"knn": (0.03, 0.0), "loss": (0.0, 0.05), "feature_std": (0.1, 0.0), "rankme": (0.0, 0.25)}
"""Smallest half-width of a band: fixed, and as a share of the mean.

Source: five seeds of simclr, byol and barlow on the digits (docs/compare.md) deviate by 1 to 4 points of k-NN, 1 to 4 %
of the loss, 0.004 to 0.016 of feature_std and 4 to 12 % of the rank. The first two are about two such deviations, so
that one seed gives an indication. The last two are many deviations, because they indicate a collapse, which is a fall
to a quarter (`monitors.collapse`).
"""


class Band(NamedTuple):
    """The band of a measure around a reference at one epoch."""

    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Reference:
    """Reference curves of a recipe.

    Attributes:
        name: Name for the user.
        curves: One per seed, with increasing epochs.
        recipe: Their nested recipe, with any seed; {} if unknown.
    """

    name: str
    curves: Sequence[Curve]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> list[float]:
        """Epochs after which the reference was evaluated."""
        return sorted({entry["epoch"] for curve in self.curves for entry in curve})

    def band(self, measure: str, epoch: float) -> Band | None:
        """Return the band of a measure after `epoch` epochs; None if no curve has values on both sides of it.

        Each seed is interpolated linearly between its evaluations. The band is the mean +- 3 standard deviations of the
        difference of another seed from it, s sqrt(1 + 1/n), where s is the deviation at this evaluation or the usual
        one, whichever is larger. The band is never narrower than `FLOORS`, which alone determines it for one seed.
        """
        seeds = self._values_at(measure, epoch)
        if not seeds:
            return None
        mean, (fixed, share) = statistics.fmean(seeds), FLOORS[measure]
        deviation = max(_deviation(seeds), self._usual_deviation[measure]) * math.sqrt(1 + 1 / len(seeds))
        half = max(3 * deviation, fixed, share * abs(mean))
        return Band(mean - half, mean, mean + half)

    def _values_at(self, measure: str, epoch: float) -> list[float]:
        """Return the value of every seed that has one at this epoch."""
        values = []
        for curve in self.curves:
            known = {entry["epoch"]: entry[measure] for entry in curve if measure in entry}
            if known and min(known) <= epoch <= max(known):
                values.append(float(np.interp(epoch, list(known), list(known.values()))))
        return values

    @cached_property
    def _usual_deviation(self) -> dict[str, float]:
        """The deviation between seeds over all evaluations except that of the untrained encoder, as a root mean square.

        The deviation at one evaluation of a few seeds is often far too small: with two seeds, below a tenth of the true
        one in 8 of 100 cases.
        """
        deviations = {}
        for measure in MEASURES:
            evaluations = [self._values_at(measure, epoch) for epoch in self.epochs if epoch > 0]
            squares = [_deviation(seeds) ** 2 for seeds in evaluations if len(seeds) > 1]
            deviations[measure] = math.sqrt(statistics.fmean(squares)) if squares else 0.0
        return deviations

    def place(self, measure: str, entry: Entry) -> str | None:
        """Return the position of an entry: "inside", "below", "above" or "nowhere" (nan); None without comparison."""
        band = self.band(measure, entry["epoch"])
        if band is None or measure not in entry:
            return None
        value = entry[measure]
        if math.isnan(value):
            return "nowhere"
        return "below" if value < band.low else "above" if value > band.high else "inside"

    def sentence(self, measure: str, entry: Entry) -> str:
        """Return the position of a measure as a sentence."""
        low, _, high = self.band(measure, entry["epoch"]) or (math.nan,) * 3
        place = self.place(measure, entry)
        verb = {"inside": "is back inside", "nowhere": "is not a number, outside"}.get(str(place), f"is {place}")
        band = f"the band of the reference ({_shown(measure, low, high)})"
        return f"{MEASURES[measure]} {_shown(measure, entry[measure])} {verb} {band} at epoch {entry['epoch']:g}"

    def outside(self, entry: Entry) -> list[str]:
        """Return a sentence for every measure of an entry outside its band."""
        return [self.sentence(m, entry) for m in MEASURES if self.place(m, entry) not in (None, "inside")]

    def average_losses(self, epochs: Sequence[int]) -> "Reference":
        """Return the reference with its losses averaged between these evaluations.

        The mean over ten epochs is not the mean over the last of them. A loss is kept if the reference was evaluated at
        both ends of an interval, and omitted otherwise.
        """
        return replace(self, curves=[_averaged(curve, epochs) for curve in self.curves])


def _deviation(seeds: Sequence[float]) -> float:
    return statistics.stdev(seeds) if len(seeds) > 1 else 0.0


def _averaged(curve: Curve, epochs: Sequence[int]) -> Curve:
    losses: dict[float, dict[str, float]] = {}
    for a, b in pairwise(epochs):
        parts = [
            (now["loss"], now["epoch"] - then["epoch"])
            for then, now in pairwise(curve)
            if a <= then["epoch"] and now["epoch"] <= b and "loss" in now
        ]
        if sum(length for _, length in parts) == b - a:
            losses[b] = {"loss": statistics.fmean(*zip(*parts, strict=True))}
    rest = [{name: entry[name] for name in entry if name != "loss"} for entry in curve]
    return [entry | losses.get(entry["epoch"], {}) for entry in rest]


def _shown(measure: str, *values: float) -> str:
    if measure == "knn":
        return " to ".join(f"{100 * value:.1f}" for value in values) + " %"
    return " to ".join(f"{value:.4g}" for value in values)


def read_reference(path: str | Path, name: str | None = None) -> Reference:
    """Return a reference from a `result.json`, a run directory, or a folder of such files that differ in the seed only.

    Args:
        path: The file, run directory or folder.
        name: Name of the reference; the path if None.

    Raises:
        ConfigError: If there is no reference.
    """
    path = path_of(path, "compare")
    if os.path.isfile(path):
        files = [path]
    elif os.path.isfile(path / "recipe.json"):
        files = [path / "result.json"]
        if not os.path.isfile(files[0]):
            raise ConfigError(
                f"the run in {path} has not finished: finish it (inbatch pretrain --resume {path}), or pass another"
            )
    else:
        files = sorted(path.glob("*.json")) if os.path.isdir(path) else []
    if not files:
        raise ConfigError(f"{path} is not a reference: pass a run directory, its result.json, or a folder of those")
    results = {file: read_result(file) for file in files}
    first = results[files[0]]["recipe"]
    seeds: dict[str, Path] = {}
    for file, result in results.items():
        if other := differing(first, result["recipe"], {"seed"}):
            raise ConfigError(
                f"{path} is not a reference: {files[0].name} and {file.name} differ in {listed(other)}; its runs may "
                "differ in their seed only"
            )
        if (twin := seeds.setdefault(repr(result["recipe"].get("seed")), file)) != file:
            raise ConfigError(
                f"{path} is not a reference: {twin.name} and {file.name} have the same seed; leave one of them out"
            )
    curves = [result["curve"] for result in results.values()]
    return Reference(one_line(str(path)) if name is None else name, curves, first)
