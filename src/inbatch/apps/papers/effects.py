"""Effect of each row of a table: interval, number of seeds that would show it, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from inbatch.apps.papers.filled_table import FilledTable, Line
from inbatch.apps.statistics import LEVEL, MOST, POWER, Difference, difference, holm, seeds_for

HEADINGS = (
    "", "figure", "gain", "95 % interval", "p", "p, Holm", f"seeds to show it (power {POWER:.0%})", "time",
    "time of a point",
)  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """Difference of a row from the row that it is compared with, by one figure.

    Attributes:
        row: Name of the row.
        against: Name of the other row.
        column: Name of our column.
        difference: Paired differences in points, one per seed, with their tests.
        holm: p value corrected by Holm's method for the rows of the column; None without a p value.
        time: Training time as a multiple of that of the other row, by processor time if the records have it.
    """

    row: str
    against: str
    column: str
    difference: Difference
    holm: float | None = None
    time: float | None = None

    @property
    def seeds(self) -> int | None:
        """Number of seeds that would show the mean difference, if it and its spread were the true ones.

        None if there is no spread to plan with, or above `MOST`.
        """
        effect, deviation = self.difference.mean, self.difference.deviation
        return seeds_for(effect, deviation) if effect and deviation else None

    @property
    def cost(self) -> float | None:
        """Additional training time for each point gained, as a share of the other row's; None without a gain."""
        gain = self.difference.mean
        return None if self.time is None or not gain or gain <= 0 else (self.time - 1) / gain

    def cells(self, digits: int) -> list[str]:
        """Return the effect as cells of a table."""
        difference, many = self.difference, bool(self.difference.deviation)
        between = " to ".join(f"{end:+.{digits}f}" for end in difference.interval or ())
        needed = f"{self.seeds:,}" if self.seeds else f"over {MOST:,}" if many else ""
        return [
            self.row, self.column, f"{difference.mean:+.{digits}f}", between, _p(difference.p), _p(self.holm), needed,
            "" if self.time is None else f"{self.time:.2f}",
            "" if self.cost is None or not round(difference.mean or 0, digits) else f"{self.cost:+.0%}",
        ]  # fmt: skip

    def json(self) -> dict[str, Any]:
        """Return the effect as plain values; times are shares of the other row's training time."""
        named = {"row": self.row, "against": self.against, "column": self.column} | self.difference.json()
        return named | {"holm_p": self.holm, "seeds_to_show_it": self.seeds, "time": self.time, "cost": self.cost}


def effects(filled: FilledTable) -> list[Effect]:
    """Return the effect of every row that is compared with another, by every column that both have."""
    all_effects: list[Effect] = []
    for at, column in enumerate(filled.columns):
        column_effects = []
        for line in filled.lines:
            against = filled.line(line.row.against)
            if against is not None and line.reproduced[at].gains:
                gain = difference(line.reproduced[at].gains)
                time = _time(line, column.data)
                column_effects.append(Effect(line.row.name, against.row.name, column.name, gain, time=time))
        tested = [effect for effect in column_effects if effect.difference.p is not None]
        corrected = dict(zip((e.row for e in tested), holm([e.difference.p or 0.0 for e in tested]), strict=True))
        all_effects += [replace(effect, holm=corrected.get(effect.row)) for effect in column_effects]
    return all_effects


def stated_effects(filled: FilledTable) -> list[Effect]:
    """Return the effects that the pages of a scale state; none if the scale states no effects."""
    return effects(filled) if filled.table.scales[filled.scale].effects else []


def effect_grid(rows: Sequence[Effect], digits: int) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of a table of effects."""
    return list(HEADINGS), [effect.cells(digits) for effect in rows]


def effect_notes(rows: Sequence[Effect]) -> list[str]:
    """Return what the table of effects states, and what was shown."""
    tested = [effect for effect in rows if effect.holm is not None]
    shown = [effect for effect in tested if (effect.holm or 0.0) < LEVEL]
    lines = [
        "Interval and p are those of the paired t-test. The number of seeds takes the mean and the spread of the few "
        "seeds as the true ones, so it is a rough number.",
        "Time is the training time as a multiple of that without, by processor time; a point costs this share of it.",
    ]
    if tested:
        names = "; ".join(f"{effect.row}, {effect.column}" for effect in shown)
        lines.append(f"Shown at {LEVEL}, corrected by Holm's method for the rows of a figure: {names or 'none'}.")
    return lines


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _time(line: Line, data: str) -> float | None:
    """Return the mean ratio of the training times at the seeds that both have, by processor time; None without.

    Runs without processor time, of earlier versions, are compared by wall time; runs on two kinds of processors are not
    compared.
    """
    ratios = []
    for pair in (pair for pair in line.compared(data) if pair[0].computation == pair[1].computation):
        first, second = (record.training_cpu_seconds for record in pair)
        if not (first and second):
            first, second = (record.training_seconds for record in pair)
        if first and second:
            ratios.append(first / second)
    return mean(ratios) if ratios else None
