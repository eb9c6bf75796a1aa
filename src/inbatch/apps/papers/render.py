"""Render a filled table for a terminal, as Markdown, as LaTeX, or as a self-contained HTML page."""

import base64
import html
import json
import re
from collections.abc import Callable, Iterable, Sequence

from rich.cells import cell_len

from inbatch.apps.papers.curve_plot import curves
from inbatch.apps.papers.effects import effect_grid, effect_notes, stated_effects
from inbatch.apps.papers.filled_table import SURE, FilledTable, Line, Value
from inbatch.apps.papers.results import Record, wall_seconds
from inbatch.apps.papers.spec import Cell, cells
from inbatch.runtime.text import one_line, printable


def grid(sheet: FilledTable) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: the row name; each column of the paper with our corresponding ones; our others.

    If rows are compared, every figure is followed by the difference from the row that its row is compared with.
    """
    differs = together(sheet) == 2
    order: list[tuple[str, int]] = []
    for i, heading in enumerate(sheet.table.headings):
        order += [("paper", i), *(("ours", j) for j, column in enumerate(sheet.columns) if column.paper == heading)]
    order += [("ours", j) for j in range(len(sheet.columns)) if ("ours", j) not in order]
    headings = [""]
    for whose, i in order:
        if whose == "paper":
            headings += [f"paper: {sheet.table.headings[i]}", *(["paper: gain"] if differs else [])]
        else:
            headings += [sheet.columns[i].name, *(["gain"] if differs else [])]
    rows = []
    for line in sheet.lines:
        cells = [_paper(sheet, line, i) if whose == "paper" else _ours(sheet, line.ours[i]) for whose, i in order]
        rows.append([line.row.name, *(text for figure, gain in cells for text in ([figure, gain][: 1 + differs]))])
    return headings, rows


def together(sheet: FilledTable) -> int:
    """Return the number of grid columns per figure: 2 with a difference if rows are compared, else 1."""
    return 2 if any(line.row.against for line in sheet.lines) else 1


def grids(sheet: FilledTable, width: int) -> list[tuple[list[str], list[list[str]]]]:
    """Return the grid split to fit the width in characters, with the row names in each part."""
    return _split(*grid(sheet), width, together(sheet))


def effect_grids(sheet: FilledTable, width: int) -> list[tuple[list[str], list[list[str]]]]:
    """Return the grid of the effects, split in the same way; nothing without effects."""
    found = stated_effects(sheet)
    return _split(*effect_grid(found, sheet.table.digits), width, 1) if found else []


def _split(
    headings: list[str], rows: list[list[str]], width: int, together: int
) -> list[tuple[list[str], list[list[str]]]]:
    groups = column_groups(headings, rows, width, together)
    return [([headings[i] for i in (0, *some)], [[row[i] for i in (0, *some)] for row in rows]) for some in groups]


def column_groups(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, together: int = 1
) -> list[list[int]]:
    """Return the columns of a table in groups, each of which fits into the width together with the first column.

    Columns are three characters apart.

    Args:
        headings: Headings of the columns.
        rows: Cells of the rows.
        width: Width in characters.
        together: Number of columns, from the second on, that stay in one group even if they are too wide.
    """
    widths = [max(map(cell_len, column)) + 3 for column in zip(headings, *rows, strict=True)]
    groups: list[list[int]] = [[]]
    for i in range(1, len(headings), together):
        some = list(range(i, min(i + together, len(headings))))
        if groups[-1] and sum(widths[j] for j in (0, *groups[-1], *some)) > width + 3:
            groups.append([])
        groups[-1] += some
    return groups


def _paper(sheet: FilledTable, line: Line, column: int) -> tuple[str, str]:
    """Return the paper's figure and the effect of the row according to it."""
    figure, moved = line.paper[column], line.moved(sheet.table.headings[column], sheet.line(line.row.against))
    short = figure is not None and figure == round(figure, 1) and sheet.table.digits == 1
    text = "" if figure is None else f"{figure:g}" if short else f"{figure:.2f}"
    return text, "" if moved is None else f"{moved:+.2f}"


def _ours(sheet: FilledTable, value: Value) -> tuple[str, str]:
    return value.text(sheet.table.digits), value.gain(sheet.table.digits)


def notes(sheet: FilledTable) -> list[str]:
    """Return the notes below the figures: the number of runs, the machines, and the differences from the paper."""
    table, at, records = sheet.table, sheet.table.scales[sheet.scale], list(sheet.records.values())
    finished = [record for record in records if record.status == "finished"]
    lines = [
        f"{len(finished)} of {sheet.wanted} runs, seeds {', '.join(map(str, at.seeds))}; mean ± standard deviation."
    ]
    if any(line.row.against for line in sheet.lines):
        beside = sorted({line.row.against for line in sheet.lines if line.row.against})
        lines.append(
            f"Gain: against {' or '.join(beside)} at the same seeds, with p of a paired t-test (* below {SURE}, "
            "not corrected for the number of rows)."
        )
    lines += [f"{one[0].upper()}{one[1:]}." for one in at.differs]
    sources = {record.data: record.source for record in finished if record.source not in ("drawn", record.data)}
    if "cifar10-jpeg" in sources.values():
        lines.append(
            "CIFAR-10 is a JPEG copy (quality about 75): accuracies are slightly below those on the original files."
        )
    if finished:
        lines.append(f"Measured on {_machines(finished)}; {hours(wall_seconds(finished))} if run one after another.")
    lines += [
        f"Failed: {record.command}{protocol and f', evaluated by {protocol}'}: {sentence}"
        for record in records
        for protocol, sentence in record.failures.items()
    ]
    lines += [*([f"Cost: {at.cost}."] if at.cost else []), f"Source: {table.source}."]
    return [one_line(line) for line in lines]  # records may come from elsewhere


def _machines(records: Iterable[Record]) -> str:
    def name(record: Record) -> str:
        where = record.environment
        what = where["processor"] if where["device"] == "cpu" else where["device"]
        return f"{what} ({where['threads']} thread{'s' * (where['threads'] > 1)}, torch {where['versions']['torch']})"

    return ", ".join(sorted({name(record) for record in records}))


def hours(seconds: float) -> str:
    """Return seconds as readable minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def markdown(sheet: FilledTable, *, picture: str | None = None, runs: str | None = None) -> str:
    """Return a page in Markdown.

    Args:
        sheet: The filled table.
        picture: Path of the image with the curves.
        runs: Path of the records, for links.
    """
    table = sheet.table
    headings, rows = grid(sheet)
    parts = [f"# {table.name}: {markdown_text(table.title)}", markdown_text(table.asks), markdown_table(headings, rows)]
    if picture is not None:
        parts.append(f"![Curves]({picture})")
    if told := table.holds.get(sheet.scale):
        parts.append(f"**Findings.** {told}")
    parts.append("\n".join(f"- {markdown_text(note, code=False)}" for note in notes(sheet)))
    if found := stated_effects(sheet):
        parts += ["## Effects", markdown_table(*effect_grid(found, table.digits))]
        parts.append("\n".join(f"- {markdown_text(note, code=False)}" for note in effect_notes(found)))
    parts.append(
        "## The runs\n\n"
        + markdown_text(f"All of them: `inbatch table {table.name} --scale {sheet.scale}`; one alone, by seed 0:")
    )
    listed = []
    for cell, record in first_seeds(sheet):
        where = f" ([result]({runs}/{cell.stem}.json))" if runs is not None and record is not None else ""
        listed.append(f"- {markdown_text(cell.row)}, {cell.data}{where}\n\n  ```bash\n  {cell.command()}\n  ```")
    return printable("\n\n".join([*parts, *listed]) + "\n")


def markdown_text(text: str, code: bool = True) -> str:
    """Return text with the characters escaped that mean something in Markdown, except code between two `."""
    parts = re.split(r"(`[^`]*`)", text) if code else [text]
    return "".join(part if i % 2 else re.sub(r"([|<>*_\[\]`])", r"\\\1", part) for i, part in enumerate(parts))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with every column except the first aligned to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_md_cell, line))} |" for line in lines)


def _md_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def first_seeds(sheet: FilledTable) -> list[tuple[Cell, Record | None]]:
    """Return a cell of each row and data set, with its record if there is one."""
    first = sheet.table.scales[sheet.scale].seeds[0]
    records = sheet.records
    seen: dict[str, tuple[Cell, Record | None]] = {}
    for cell in cells(sheet.table, sheet.scale, (first,)):
        seen.setdefault(cell.stem, (cell, records.get(cell.stem)))
    return list(seen.values())


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


_TEX_WIDTH = 76  # characters across a page of LaTeX's article class, small


def tex(text: str) -> str:
    """Return text escaped for LaTeX; the hyphen of a negative number becomes a minus sign."""
    return re.sub(r"(?<!\w)-(?=\d)", "$-$", "".join(_TEX.get(c, c) for c in text))


def latex(sheet: FilledTable) -> str:
    """Return a table environment for booktabs; columns beyond the page width are in a second tabular below."""
    caption = f"{sheet.table.title} ({sheet.table.source}; {sheet.scale} scale). {' '.join(notes(sheet)[:2])}"
    parts = []
    for headings, rows in grids(sheet, _TEX_WIDTH):
        lines = [
            rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
            r"\toprule",
            " & ".join(map(tex, headings)) + r" \\",
            r"\midrule",
            *(" & ".join(map(tex, row)) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        parts.append("\n".join(lines))
    return printable(
        "\n".join(
            [
                r"\begin{table}",
                r"\centering\footnotesize",
                rf"\caption{{{tex(caption)}}}",
                rf"\label{{tab:{sheet.table.name}}}",
                "\n\n\\medskip\n".join(parts),
                r"\end{table}",
                "",
            ]
        )
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.3rem .7rem;text-align:right}"
    "td{white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}thead th{border-bottom:2px solid #222}"
    "tbody tr:nth-child(even){background:#f4f4f4}code{background:#f4f4f4;padding:.1rem .3rem;overflow-wrap:anywhere}"
    "img{max-width:100%}.wide{overflow-x:auto}"
)


def page(sheet: FilledTable) -> str:
    """Return a self-contained HTML page: table, curves, notes, and the recipe of every run."""
    e, table = html.escape, sheet.table
    parts = [f"<h1>{e(table.name)}: {e(table.title)}</h1><p>{e(table.asks)}</p>", _html_table(*grid(sheet))]
    if told := table.holds.get(sheet.scale):
        parts.append(f"<p><b>Findings.</b> {e(told)}</p>")
    if (png := curves(sheet)) is not None:
        parts.append(f'<p><img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>')
    parts.append(_html_list(notes(sheet)))
    if found := stated_effects(sheet):
        parts += ["<h2>Effects</h2>", _html_table(*effect_grid(found, table.digits)), _html_list(effect_notes(found))]
    parts.append("<h2>Runs</h2>")
    for cell, record in first_seeds(sheet):
        recipe = "" if record is None else f"<pre>{e(_pretty(record))}</pre>"
        parts.append(
            f"<details><summary>{e(cell.row)}, {e(cell.data)}</summary>"
            f"<p><code>{e(cell.command())}</code></p>{recipe}</details>"
        )
    return printable(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(table.name)}</title><style>{_STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _pretty(record: Record) -> str:
    return json.dumps({name: value for name, value in record.file().items() if name != "curve"}, indent=1)


FORMATS: dict[str, Callable[[FilledTable], str]] = {".md": markdown, ".tex": latex, ".html": page}
"""File ending -> renderer."""
