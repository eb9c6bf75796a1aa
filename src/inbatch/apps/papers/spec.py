"""Specification of a published table: rows and columns with the paper's figures, and how each is run at each scale."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

from inbatch.training.recipe import Recipe, Schedule, make
from inbatch.training.registry import Part, make_part

Settings = Mapping[str, Any]
SCALES = ("smoke", "cpu", "laptop", "gpu", "paper")
LEFT_OUT = ("data", "test", "seed", "preset", "cache_on_device", "replans")
"""Settings that do not distinguish two runs: where images are and are held, the origin of other settings, and changes
of the length by which a run keeps its budget."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: Name of the row.
        settings: Settings of the row, in addition to those of the scale; flat, as in a recipe ("method.name"). None:
            the paper quotes the row, and nothing is run.
        paper: The paper's figures by its column, in the paper's unit.
        against: The row that it is compared with, from which it differs in one thing.
        at: Settings that apply at one scale, or on one data set, only.
        scales: Scales at which the row exists; empty: all.
    """

    name: str
    settings: Settings | None
    paper: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None
    at: Mapping[str, Settings] = field(default_factory=dict)
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One of our columns: a figure of an evaluation ("knn.top1") on one data set, by one protocol.

    Attributes:
        name: Name of the column.
        data: Name of the data set.
        figure: Path of the figure in the evaluation.
        paper: The corresponding column of the paper, if any.
    """

    name: str
    data: str
    figure: str
    paper: str | None = None


@dataclass(frozen=True)
class Scale:
    """How a table is run: shared settings, data sets and seeds.

    Attributes:
        columns: Our columns.
        data: Name of a data set -> its settings, which include "data" and "image_size".
        settings: Settings shared by all runs.
        seeds: The seeds.
        protocols: Evaluations in addition to k-NN, linear probe and clustering: "few", "on-cifar10" (other images), ...
        cost: Cost as text.
        differs: Differences from the paper, and their reasons.
        curve: Number that is plotted over the epochs, in addition to the table ("knn").
        effects: Whether the page states intervals, the seeds that a difference needs, and its cost.
    """

    columns: tuple[Column, ...]
    data: Mapping[str, Settings]
    settings: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    protocols: tuple[str, ...] = ()
    cost: str = ""
    differs: tuple[str, ...] = ()
    curve: str | None = None
    effects: bool = False


@dataclass(frozen=True)
class Table:
    """A published table or figure, or a claim as a table.

    Attributes:
        name: Name in the registry.
        title: Title.
        source: Where it was published.
        question: The question that it answers.
        rows: The rows.
        scales: The scales by name.
        headings: The paper's columns, in percent.
        digits: Decimal places.
        curve: For a figure of curves: the number that is plotted over the epochs ("knn").
        findings: Findings of our runs at a scale.
    """

    name: str
    title: str
    source: str
    question: str
    rows: tuple[Row, ...]
    scales: Mapping[str, Scale]
    headings: tuple[str, ...] = ()
    digits: int = 1
    curve: str | None = None
    findings: Mapping[str, str] = field(default_factory=dict)

    def rows_at(self, scale: str) -> tuple[Row, ...]:
        """Return the rows that exist at a scale."""
        return tuple(row for row in self.rows if not row.scales or scale in row.scales)

    def curve_at(self, scale: str) -> str | None:
        """Return the number that is plotted over the epochs at a scale; None: no plot."""
        return self.curve or self.scales[scale].curve


@dataclass(frozen=True)
class Cell:
    """One run: a row on a data set with a seed."""

    row: str
    data: str
    seed: int
    settings: Settings
    protocols: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether pairs of crops are counted, without training."""
        return "pairs" in self.settings

    def recipe(self) -> Recipe:
        """Return the recipe to train; its data is a name, which the runner resolves."""
        return make(self.settings)

    @cached_property
    def key(self) -> str:
        """Identity that the run shares with every run that differs in the seed only."""
        return key(self.settings if self.counts else self.recipe())

    @property
    def stem(self) -> str:
        """Name of its files, identical for identical runs with the same seed."""
        what = self.settings["crops" if self.counts else "method.name"].rpartition(":")[2].rpartition(".")[2]
        return f"{what}-{self.data}-{self.key}-s{self.seed}"

    def command(self) -> str:
        """Return the command that a user runs for it."""
        if not self.counts:
            return self.recipe().command()
        options = (f"--{name} {self.settings[name]}" for name in ("crops", "size", "pairs", "seed"))
        return f"inbatch crops {' '.join(options)}"


def key(what: Recipe | Mapping[str, Any]) -> str:
    """Return ten characters that identify the training (or counting), without the seed and the location of images.

    Defaults of a recipe are not part of it: a new setting does not change the identity of earlier runs.
    """
    values = _non_defaults(what) if isinstance(what, Recipe) else {k: v for k, v in what.items() if k not in LEFT_OUT}
    text = json.dumps(_plain(values), sort_keys=True)  # as in JSON: 1 and 1.0 are one number, a tuple is a list
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _non_defaults(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe that differ from the defaults."""
    values: dict[str, Any] = {}
    for each in fields(Recipe):
        value = getattr(recipe, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name in LEFT_OUT or value == default:
            continue
        if isinstance(value, Part):
            bare = each.name in ("optimizer", "encoder")  # external parts: a recipe holds only the given options
            usual = None if bare else make_part(each.name, {"name": value.name}, recipe.image_size)
            options = {} if usual is None else usual.options
            own = {k: v for k, v in value.options.items() if k not in options or options[k] != v}
            values[each.name] = {"name": value.name, **own}
        elif isinstance(value, Schedule):
            values[each.name] = {
                f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default
            }
        else:
            values[each.name] = value
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if whole else value


def cells(table: Table, scale: str, seeds: tuple[int, ...] | None = None) -> Iterator[Cell]:
    """Yield every run of a table, the first seed of all rows first; a run shared by two columns occurs once."""
    at = table.scales[scale]
    for seed in at.seeds if seeds is None else seeds:
        for data in dict.fromkeys(column.data for column in at.columns):
            for row in table.rows_at(scale):
                if row.settings is not None:
                    yield cell(table, scale, row, data, seed)


def cell(table: Table, scale: str, row: Row, data: str, seed: int) -> Cell:
    """Return the run of a row on a data set; settings of the row override those of the scale."""
    at = table.scales[scale]
    own = {**(row.settings or {}), **row.at.get(scale, {}), **row.at.get(data, {})}
    merged = {**at.settings, **at.data[data], **own, "seed": seed}
    if "pairs" in merged:  # only the settings of counting
        return Cell(row.name, data, seed, {name: merged[name] for name in ("crops", "size", "pairs", "seed")})
    return Cell(row.name, data, seed, merged, at.protocols)
