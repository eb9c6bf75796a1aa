"""A table with the paper's figures, our figures over the seeds, and the effect of each row, paired by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """A row: published figures, reproduced figures by column, and the runs' records by data set and seed.

    Attributes:
        others: For each record, that of the row that it is compared with, on the same data with the same seed, and of
            its repetitions the one that was computed alike; None if there is none.
    """

    row: Row
    paper: tuple[float | None, ...]
    reproduced: tuple[Value, ...]
    cells: tuple[Cell, ...]
    records: tuple[Record, ...]
    others: tuple[Record | None, ...]

    def compared(self, data: str) -> list[tuple[Record, Record]]:
        """Return the pairs of records on this data set whose difference is the effect of the row."""
        of_data = zip(self.cells, self.records, self.others, strict=True)
        return [(own, other) for one, own, other in of_data if one.data == data and other is not None]

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
        trained = [(own, other) for own, other in self._pairs if own.precision and other.precision]  # not counted crops
        return sum(own.computation != other.computation for own, other in trained)

    @property
    def repetitions(self) -> list[Record]:
        """For each run that is compared with a repetition, on a processor like its own, of the run that is shown."""
        shown = {id(record) for line in self.lines for record in line.records}
        return [other for _, other in self._pairs if id(other) not in shown]

    @property
    def _pairs(self) -> list[tuple[Record, Record]]:
        data = dict.fromkeys(column.data for column in self.columns)
        return [pair for line in self.lines for name in data for pair in line.compared(name)]

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
        reference = {(one.data, one.seed): record for one, record in matches.get(row.against or "", [])}
        runs = tuple(one for one, _ in matches[row.name])
        own = tuple(record for _, record in matches[row.name])
        references = [reference.get((one.data, one.seed)) for one in runs]
        others = tuple(r and r.like(record) for r, record in zip(references, own, strict=True))
        paper = tuple(row.paper.get(heading) for heading in table.headings)
        line = Line(row, paper, (), runs, own, others)
        lines.append(replace(line, reproduced=tuple(_value(column, line) for column in at.columns)))
    return FilledTable(table, scale, tuple(lines))


def figure(record: Record, path: str) -> float | None:
    """Return a number of an evaluation by its path, in percent; None if the record does not contain it."""
    value: Any = record.evaluation
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else 100 * float(value)


def _value(column: Column, line: Line) -> Value:
    pairs = [(one, record) for one, record in zip(line.cells, line.records, strict=True) if one.data == column.data]
    figures = {one.seed: value for one, record in pairs if (value := figure(record, column.figure)) is not None}
    both = [[figure(record, column.figure) for record in pair] for pair in line.compared(column.data)]
    gains = tuple(round(x - y, 9) for x, y in both if x is not None and y is not None)  # equal ones stay equal
    protocol = column.figure.split(".")[0]
    failed = sum(not {"", protocol}.isdisjoint(record.failures) for _, record in pairs)
    return Value(tuple(figures), tuple(figures.values()), gains, paired(gains), failed)
