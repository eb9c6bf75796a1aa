"""A table with the paper's figures, our figures over the seeds, and the effect of each row, paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from inbatch.apps.papers.results import Record, Records, find_record
from inbatch.apps.papers.spec import Cell, Column, Row, Table, cell, cells
from inbatch.apps.statistics import paired

SURE = 0.05
"""Significance level of a difference; the p values of a table's rows are not corrected for their number."""


@dataclass(frozen=True)
class Value:
    """One of our figures: its values by seed in percent, and its differences from the row that it is compared with.

    Attributes:
        seeds: The seeds.
        values: Value for each seed.
        gains: Differences at the seeds that both rows have.
        p: p value of a paired two-sided t-test; None for fewer than two seeds.
        failed: Number of runs without a figure.
    """

    seeds: tuple[int, ...]
    values: tuple[float, ...]
    gains: tuple[float, ...] = ()
    p: float | None = None
    failed: int = 0

    def text(self, digits: int = 1) -> str:
        """Return mean and standard deviation; empty if there are no runs."""
        if not self.values:
            return "failed" if self.failed else ""
        failures = f" ({self.failed} failed)" if self.failed else ""
        return f"{mean(self.values):.{digits}f}{_deviation(self.values, digits)}{failures}"

    def gain(self, digits: int = 1) -> str:
        """Return the mean difference with its p value, and a star if p is below `SURE`."""
        if not self.gains:
            return ""
        p_text = "" if self.p is None else f" (p {self.p:.2f}){'*' * (self.p < SURE)}"
        return f"{mean(self.gains):+.{digits}f}{_deviation(self.gains, digits)}{p_text}"


def _deviation(values: Sequence[float], digits: int) -> str:
    return f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""


@dataclass(frozen=True)
class Line:
    """A row: published figures, reproduced figures by column, and the runs' records by data set and seed."""

    row: Row
    paper: tuple[float | None, ...]
    reproduced: tuple[Value, ...]
    cells: tuple[Cell, ...]
    records: tuple[Record, ...]

    def paper_effect(self, heading: str, against: "Line | None") -> float | None:
        """Return the effect of the row according to the paper; None if the paper does not state it."""
        if against is None or heading not in self.row.paper or heading not in against.row.paper:
            return None
        return self.row.paper[heading] - against.row.paper[heading]


@dataclass(frozen=True)
class FilledTable:
    """A table at a scale, with the available results."""

    table: Table
    scale: str
    lines: tuple[Line, ...]

    def line(self, name: str | None) -> Line | None:
        """Return a row by name; None if there is none."""
        return next((line for line in self.lines if line.row.name == name), None)

    @property
    def records(self) -> dict[str, Record]:
        """All records by their cells' names."""
        return {c.stem: r for line in self.lines for c, r in zip(line.cells, line.records, strict=True)}

    @property
    def mixed_pairs(self) -> int:
        """Number of runs that are compared with a run of another precision or with other instructions (AVX2, AVX512).

        These change the bits of every step, which is an effect of its own.
        """

        def computed(line: Line) -> dict[tuple[str, int], tuple[str, str | None]]:
            pairs = zip(line.cells, line.records, strict=True)
            trained = [(c, r, r.precision) for c, r in pairs if r.precision is not None]  # not counted crops
            return {(c.data, c.seed): (precision, r.environment.get("instructions")) for c, r, precision in trained}

        pairs = [(computed(line), computed(other)) for line in self.lines if (other := self.line(line.row.against))]
        return sum(own[run] != other[run] for own, other in pairs for run in own.keys() & other.keys())

    @property
    def columns(self) -> tuple[Column, ...]:
        """Our columns."""
        return self.table.scales[self.scale].columns

    @property
    def total_runs(self) -> int:
        """Number of runs of the table at this scale."""
        return len({one.stem for one in cells(self.table, self.scale)})


def fill(table: Table, scale: str, records: Records) -> FilledTable:
    """Return the table at this scale, filled from records."""
    at = table.scales[scale]
    matches: dict[str, list[tuple[Cell, Record]]] = {}
    for row in table.rows_at(scale):
        matches[row.name] = []
        if row.settings is None:
            continue
        for data in dict.fromkeys(column.data for column in at.columns):
            for seed in at.seeds:
                one = cell(table, scale, row, data, seed)
                if (record := find_record(records, one)) is not None:
                    matches[row.name].append((one, record))
    lines = []
    for row in table.rows_at(scale):
        other = matches.get(row.against or "", [])
        reproduced = tuple(_value(column, matches[row.name], other) for column in at.columns)
        paper = tuple(row.paper.get(heading) for heading in table.headings)
        runs = tuple(one for one, _ in matches[row.name])
        lines.append(Line(row, paper, reproduced, runs, tuple(record for _, record in matches[row.name])))
    return FilledTable(table, scale, tuple(lines))


def figure(record: Record, path: str) -> float | None:
    """Return a number of an evaluation by its path, in percent; None if the record does not contain it."""
    value: Any = record.evaluation
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else 100 * float(value)


def _value(column: Column, runs: list[tuple[Cell, Record]], other: list[tuple[Cell, Record]]) -> Value:
    own_figures, other_figures = (_by_seed(column, pairs) for pairs in (runs, other))
    both = [seed for seed in own_figures if seed in other_figures]
    gains = tuple(round(own_figures[seed] - other_figures[seed], 9) for seed in both)  # equal ones stay equal
    protocol = column.figure.split(".")[0]
    failed = sum(one.data == column.data and not {"", protocol}.isdisjoint(record.failures) for one, record in runs)
    return Value(tuple(own_figures), tuple(own_figures.values()), gains, paired(gains), failed)


def _by_seed(column: Column, runs: list[tuple[Cell, Record]]) -> dict[int, float]:
    figures = {one.seed: figure(record, column.figure) for one, record in runs if one.data == column.data}
    return {seed: value for seed, value in figures.items() if value is not None}
