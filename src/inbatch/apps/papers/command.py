"""Implementation of `inbatch table NAME`: run missing cells, fill the table, and state how each figure was obtained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inbatch.apps.papers import render
from inbatch.apps.papers.effects import stated_effects
from inbatch.apps.papers.filled_table import FilledTable, fill
from inbatch.apps.papers.results import read_records, shipped
from inbatch.apps.papers.runner import ON, Runner
from inbatch.apps.papers.scales import WHERE
from inbatch.apps.papers.spec import Table, cells
from inbatch.apps.papers.table_notes import notes
from inbatch.errors import ConfigError, InbatchError, listed
from inbatch.runtime.files import check_writable, replacing
from inbatch.training.registry import check_known


@dataclass(frozen=True)
class TableReport:
    """A table at a scale, filled with the available results.

    Attributes:
        filled: The filled table.
        problems: Runs that could not be made, by name.
        reference: The same table with the shipped results, if `filled` has the user's results.
        launch: Commands of runs for another machine.
    """

    filled: FilledTable
    problems: Mapping[str, InbatchError] = field(default_factory=dict)
    reference: FilledTable | None = None
    launch: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the first problem."""
        return next((problem.exit_code for problem in self.problems.values()), 0)

    def grids(self, width: int) -> list[tuple[list[str], list[list[str]]]]:
        """Return headings and rows, and those of the effects, in as many tables as necessary to fit the width."""
        return [*render.grids(self.filled, width), *render.effect_grids(self.filled, width)]

    def text_lines(self) -> list[str]:
        """Return the lines below the table."""
        table, scale = self.filled.table, self.filled.scale
        lines = [f"{table.name} at {scale} scale. {table.question}", *notes(self.filled)]
        if findings := table.findings.get(scale):
            lines += ["", f"Findings. {findings}"]
        lines += ["", *self._comparison_lines(), "The runs (seed 0; others with --seed):", ""]
        lines += [f"  {cell.row}, {cell.data}:\n    {cell.command()}" for cell, _ in render.first_seeds(self.filled)]
        names = {str(cell.settings.get("data")) for cell, _ in render.first_seeds(self.filled)} & WHERE.keys()
        lines += [f"(--data {name}: replace {name} by the path of its images.)" for name in sorted(names)]
        if self.launch:
            lines += ["", "Commands to launch on a cluster (inbatch slurm writes a batch script):", ""]
            lines += [f"  {command}" for command in self.launch]
        elif not self.filled.records:
            lines += ["", f"There are no results yet. To compute them: inbatch table {table.name} --scale {scale}"]
        return [part for line in lines for part in line.split("\n")]

    def _comparison_lines(self) -> list[str]:
        """Return lines that compare the user's figures with the shipped ones."""
        if self.reference is None:
            return []
        lines, digits = [], self.filled.table.digits
        for line, reference in zip(self.filled.lines, self.reference.lines, strict=True):
            for column, own, other in zip(self.filled.columns, line.reproduced, reference.reproduced, strict=True):
                if own.values and other.values:
                    figures = f"yours {own.text(digits)}, shipped {other.text(digits)}"
                    lines.append(f"  {line.row.name}, {column.name}: {figures}")
        return ["Compared with the shipped results:", "", *lines, ""] if lines else []

    def write(self, out: Path) -> None:
        """Write the table in the format of the file's ending; raise InbatchError if it cannot be written."""
        with replacing(out) as file:
            file.write(_writer(out)(self.filled).encode(errors="backslashreplace"))

    def json(self) -> dict[str, Any]:
        """Return the report for --json; figures in percent."""
        headings, rows = render.grid(self.filled)
        table = self.filled.table
        content: dict[str, Any] = {
            "name": table.name,
            "scale": self.filled.scale,
            "source": table.source,
            "headings": headings,
            "rows": rows,
        }
        figures = [
            {"row": line.row.name, "column": column.name, "values": dict(zip(value.seeds, value.values, strict=True))}
            | {"gains": list(value.gains), "p": value.p, "failed": value.failed}
            for line in self.filled.lines
            for column, value in zip(self.filled.columns, line.reproduced, strict=True)
        ]
        content |= {"figures": figures, "notes": notes(self.filled), "launch": list(self.launch)}
        if effects := stated_effects(self.filled):
            content["effects"] = [effect.json() for effect in effects]
        problems = {name: str(problem) for name, problem in self.problems.items()}
        error = "; ".join(dict.fromkeys(problems.values()))
        failure = {"error": error, "exit_code": self.exit_code} if error else {}
        return content | {"problems": problems} | failure


@dataclass(frozen=True)
class Selection:
    """Part of a table; empty sequences select everything.

    Attributes:
        rows: Names of rows, to which those are added that they are compared with.
        data: Names of data sets.
        seeds: Seeds.
    """

    rows: Sequence[str] = ()
    data: Sequence[str] = ()
    seeds: Sequence[int] = ()

    def apply(self, table: Table, scale: str) -> Table:
        """Return the selected part of a table; raise ConfigError for an unknown row or data set."""
        at = table.scales[scale]
        for row in self.rows:
            check_known("row", row, {row.name: None for row in table.rows})
        for data in self.data:
            check_known("data set", data, at.data)
        with_against = {*self.rows, *(row.against for row in table.rows if row.name in self.rows)}
        columns = tuple(column for column in at.columns if not self.data or column.data in self.data)
        part = replace(at, columns=columns, seeds=tuple(self.seeds) or at.seeds)
        rows = tuple(row for row in table.rows if not self.rows or row.name in with_against)
        return replace(table, rows=rows, scales={**table.scales, scale: part})


def run_table_command(
    tables: Mapping[str, Table], name: str, scale: str | None = None, *, runner: Runner, from_: Path | None = None,
    selection: Selection = Selection(), out: Path | None = None,
) -> TableReport:  # fmt: skip
    """Run missing cells of a table and return it, filled; `TableReport.write` writes it.

    Args:
        tables: Registry of tables by name.
        name: Name of the table.
        scale: Scale at which missing cells are run, unless `from_` is a folder of results. None shows the shipped
            results at scale cpu.
        runner: The runner of missing cells.
        from_: Folder of results; nothing is run.
        selection: Use only this part of the table.
        out: File to which the table will be written, checked before anything is run.

    Raises:
        ConfigError: For an unknown name, scale, row, data set or file ending, or a path of images that no run reads.
        DataError: For files that are not results.
    """
    check_known("table", name, tables)
    table, runs = tables[name], scale is not None and from_ is None
    scale = scale or "cpu"
    check_known("scale", scale, table.scales)
    if out is not None:
        _writer(out)
        check_writable(out)
    if runs:
        _check_places(table, scale, runner)
    table = selection.apply(table, scale)
    if from_ is not None and not any(from_.glob("*.json")):
        state = "contains no records of runs (*.json)" if from_.is_dir() else "is not a folder of results"
        raise ConfigError(f"--from {from_} {state}: pass the folder `results` inside the --work-dir of earlier runs")
    problems: dict[str, InbatchError] = {}
    launch: tuple[str, ...] = ()
    if runs and scale == "paper":
        runner.collect(list(cells(table, scale)))
        launch = tuple(runner.launch(list(cells(table, scale))))
    elif runs:
        problems = runner.run(list(cells(table, scale)))
    records = read_records(runner.results if runs else from_ or shipped())
    others = runs and runner.results.resolve() != shipped().resolve()
    reference = fill(table, scale, read_records(shipped())) if others else None
    return TableReport(fill(table, scale, records), problems, reference, launch)


def _check_places(table: Table, scale: str, runner: Runner) -> None:
    """Raise ConfigError if a path is given for an unknown name, which no run would read."""
    at = table.scales[scale]
    others = [protocol.removeprefix(ON) for protocol in at.protocols if protocol.startswith(ON)]
    read = {str(settings["data"]) for settings in at.data.values() if "data" in settings} | {*others}
    for name in sorted(runner.places.keys() - read - WHERE.keys()):
        raise ConfigError(f"--data {name}=PATH: no run of {table.name} reads {name}: choose {listed(sorted(read))}")


def _writer(out: Path) -> Callable[[FilledTable], str]:
    check_known("ending", out.suffix, render.FORMATS)
    return render.FORMATS[out.suffix]
