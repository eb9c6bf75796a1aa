"""What a published table is: rows and columns with the paper's figures, and how each is run at a scale we can pay."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from inbatch.training.recipe import Recipe, Schedule, make
from inbatch.training.registry import Part, make_part

Settings = Mapping[str, Any]
SCALES = ("smoke", "cpu", "gpu", "paper")
LEFT_OUT = ("data", "test", "seed", "preset")
"""Settings that do not tell two runs apart: where images lie, and where other settings come from."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    settings: what makes the line, on top of the scale's; flat, as in a recipe ("method.name"). None: the paper quotes
        it, and nothing is run.
    paper: its figures by the paper's column, in the paper's unit. against: the line it differs from in one thing.
    at: settings that it has at one scale, or on one data set, only.
    """

    name: str
    settings: Settings | None
    paper: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None
    at: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One of our columns: a figure of an evaluation ("knn.top1") on one data set, by one protocol.

    paper: the paper's column that it stands for, if any.
    """

    name: str
    data: str
    figure: str
    paper: str | None = None


@dataclass(frozen=True)
class Scale:
    """How a table is run: what all of its runs share, on which images, over which seeds.

    data: name of a data set -> its settings, which include "data" and "size".
    protocols: of evaluation beyond k-NN, linear probe and clustering: "few", "on-cifar10" (other images), ...
    cost: what it takes, in words. differs: what is not as in the paper, and why.
    """

    columns: tuple[Column, ...]
    data: Mapping[str, Settings]
    settings: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    protocols: tuple[str, ...] = ()
    cost: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A published table or figure, or a claim made into one.

    source: where it stands. asks: its question. headings: the paper's columns, in percent. digits: behind the point.
    curve: the number whose curve over the epochs is the point ("knn"), for a figure.
    holds: what our runs say at a scale, in words.
    """

    name: str
    title: str
    source: str
    asks: str
    rows: tuple[Row, ...]
    scales: Mapping[str, Scale]
    headings: tuple[str, ...] = ()
    digits: int = 1
    curve: str | None = None
    holds: Mapping[str, str] = field(default_factory=dict)


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
        """Whether pairs of crops are counted, and nothing is learned."""
        return "pairs" in self.settings

    def recipe(self) -> Recipe:
        """What is trained; its data is a name, for the one who runs it to find."""
        return make(self.settings)

    @cached_property
    def key(self) -> str:
        """What it shares with every run that is the same but for the seed."""
        return key(self.settings if self.counts else self.recipe())

    @property
    def stem(self) -> str:
        """The name of its files: the same wherever the same is run with the same seed."""
        what = self.settings["crops"] if self.counts else self.settings["method.name"]
        return f"{what}-{self.data}-{self.key}-s{self.seed}"

    def command(self) -> str:
        """What a user types for it."""
        if not self.counts:
            return self.recipe().command()
        options = (f"--{name} {self.settings[name]}" for name in ("crops", "size", "pairs", "seed"))
        return f"inbatch crops {' '.join(options)}"


def key(what: Recipe | Mapping[str, Any]) -> str:
    """Ten characters for all that decides what is learned (or counted), but for the seed and the images' place.

    What a recipe leaves as it is by default is not in it: a new setting does not rename what was run before it came.
    """
    told = _told(what) if isinstance(what, Recipe) else {k: v for k, v in what.items() if k not in LEFT_OUT}
    text = json.dumps(_plain(told), sort_keys=True)  # as JSON has it: 1 and 1.0 are one number, a tuple is a list
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _told(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says beyond defaults."""
    told: dict[str, Any] = {}
    for each in fields(Recipe):
        value = getattr(recipe, each.name)
        if each.name in LEFT_OUT or value == each.default:
            continue
        if isinstance(value, Part):
            bare = each.name in ("optimizer", "encoder")  # others' parts: a recipe holds only what was given
            usual = None if bare else make_part(each.name, {"name": value.name}, recipe.size)
            options = {} if usual is None else usual.options
            own = {k: v for k, v in value.options.items() if k not in options or options[k] != v}
            told[each.name] = {"name": value.name, **own}
        elif isinstance(value, Schedule):
            told[each.name] = {
                f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default
            }
        else:
            told[each.name] = value
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def cells(table: Table, scale: str, seeds: tuple[int, ...] | None = None) -> Iterator[Cell]:
    """Every run of a table, the first seed of all rows first; what two columns share is one run."""
    at = table.scales[scale]
    for seed in at.seeds if seeds is None else seeds:
        for data in dict.fromkeys(column.data for column in at.columns):
            for row in table.rows:
                if row.settings is not None:
                    yield cell(table, scale, row, data, seed)


def cell(table: Table, scale: str, row: Row, data: str, seed: int) -> Cell:
    """The run of a row on a data set. What the row says is stronger than what the scale says."""
    at = table.scales[scale]
    own = {**(row.settings or {}), **row.at.get(scale, {}), **row.at.get(data, {})}
    merged = {**at.settings, **at.data[data], **own, "seed": seed}
    if "pairs" in merged:  # counted: only what counting takes
        return Cell(row.name, data, seed, {name: merged[name] for name in ("crops", "size", "pairs", "seed")})
    return Cell(row.name, data, seed, merged, at.protocols)
