"""The runs of each variant of a comparison, with the tested figure by seed."""

from dataclasses import dataclass, field

from inbatch.apps.comparisons.plan import Plan
from inbatch.apps.papers.results import Record, Records, find_record
from inbatch.apps.papers.spec import Cell


@dataclass(frozen=True)
class Variation:
    """The runs of one variant.

    Attributes:
        name: Name of the variant.
        cells: Its cells, one for each seed.
        records: Their records; None for a run that is missing.
        values: Seed -> the tested figure.
        halves: Seed -> the figure on each half of the test images, if it is known for them.
    """

    name: str
    cells: tuple[Cell, ...]
    records: tuple[Record | None, ...]
    values: dict[int, float]
    halves: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Number of runs that ended without the figure."""
        return sum(r is not None and c.seed not in self.values for c, r in zip(self.cells, self.records, strict=True))


def variations(plan: Plan, records: Records) -> list[Variation]:
    """Return the runs of every variant."""
    rows = []
    for row in plan.table.rows:
        own = tuple(cell for cell in plan.cells if cell.row == row.name)
        row_records = tuple(find_record(records, cell) for cell in own)
        values = {
            cell.seed: value
            for cell, record in zip(own, row_records, strict=True)
            if record is not None and (value := plan.metric.value(record)) is not None
        }
        halves = {
            cell.seed: both
            for cell, record in zip(own, row_records, strict=True)
            if record is not None and (both := plan.metric.halves(record)) is not None
        }
        rows.append(Variation(row.name, own, row_records, values, halves))
    return rows
