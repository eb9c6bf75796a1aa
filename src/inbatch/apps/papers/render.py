"""Render a filled table for a terminal, as Markdown, as LaTeX, or as a self-contained HTML page."""

import base64
import html
import json
import re
from collections.abc import Callable, Sequence

from rich.cells import cell_len

from inbatch.apps.papers.curve_plot import curves
from inbatch.apps.papers.effects import effect_grid, effect_notes, stated_effects
from inbatch.apps.papers.filled_table import FilledTable, Line, Value
from inbatch.apps.papers.results import Record
from inbatch.apps.papers.spec import Cell, cells
from inbatch.apps.papers.table_notes import notes
from inbatch.runtime.text import printable


def grid(filled: FilledTable) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: the row name; each column of the paper with our corresponding ones; our others.

    If rows are compared, every figure is followed by the difference from the row that its row is compared with.
    """
    differs = columns_per_figure(filled) == 2
    order: list[tuple[str, int]] = []
    for i, heading in enumerate(filled.table.headings):
        order += [
            ("paper", i),
            *(("reproduced", j) for j, column in enumerate(filled.columns) if column.paper == heading),
        ]
    order += [("reproduced", j) for j in range(len(filled.columns)) if ("reproduced", j) not in order]
    headings = [""]
    for origin, i in order:
        if origin == "paper":
            headings += [f"paper: {filled.table.headings[i]}", *(["paper: gain"] if differs else [])]
        else:
            headings += [filled.columns[i].name, *(["gain"] if differs else [])]
    rows = []
    for line in filled.lines:
        cells = [
            _paper(filled, line, i) if origin == "paper" else _reproduced(filled, line.reproduced[i])
            for origin, i in order
        ]
        rows.append([line.row.name, *(text for figure, gain in cells for text in ([figure, gain][: 1 + differs]))])
    return headings, rows


def columns_per_figure(filled: FilledTable) -> int:
    """Return the number of grid columns per figure: 2 with a difference if rows are compared, else 1."""
    return 2 if any(line.row.against for line in filled.lines) else 1


def grids(filled: FilledTable, width: int) -> list[tuple[list[str], list[list[str]]]]:
    """Return the grid split to fit the width in characters, with the row names in each part."""
    return _split(*grid(filled), width, columns_per_figure(filled))


def effect_grids(filled: FilledTable, width: int) -> list[tuple[list[str], list[list[str]]]]:
    """Return the grid of the effects, split in the same way; nothing without effects."""
    effects = stated_effects(filled)
    return _split(*effect_grid(effects, filled.table.digits), width, 1) if effects else []


def _split(
    headings: list[str], rows: list[list[str]], width: int, together: int
) -> list[tuple[list[str], list[list[str]]]]:
    groups = column_groups(headings, rows, width, together)
    return [([headings[i] for i in (0, *group)], [[row[i] for i in (0, *group)] for row in rows]) for group in groups]


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
        block = list(range(i, min(i + together, len(headings))))
        if groups[-1] and sum(widths[j] for j in (0, *groups[-1], *block)) > width + 3:
            groups.append([])
        groups[-1] += block
    return groups


def _paper(filled: FilledTable, line: Line, column: int) -> tuple[str, str]:
    """Return the paper's figure and the effect of the row according to it."""
    figure, effect = line.paper[column], line.paper_effect(filled.table.headings[column], filled.line(line.row.against))
    short = figure is not None and figure == round(figure, 1) and filled.table.digits == 1
    text = "" if figure is None else f"{figure:g}" if short else f"{figure:.2f}"
    return text, "" if effect is None else f"{effect:+.2f}"


def _reproduced(filled: FilledTable, value: Value) -> tuple[str, str]:
    return value.text(filled.table.digits), value.gain(filled.table.digits)


def markdown(filled: FilledTable, *, picture: str | None = None, runs: str | None = None) -> str:
    """Return a page in Markdown.

    Args:
        filled: The filled table.
        picture: Path of the image with the curves.
        runs: Path of the records, for links.
    """
    table = filled.table
    headings, rows = grid(filled)
    parts = [
        f"# {table.name}: {markdown_text(table.title)}",
        markdown_text(table.question),
        markdown_table(headings, rows),
    ]
    if picture is not None:
        parts.append(f"![Curves]({picture})")
    if findings := table.findings.get(filled.scale):
        parts.append(f"**Findings.** {findings}")
    parts.append("\n".join(f"- {markdown_text(note, code=False)}" for note in notes(filled)))
    if effects := stated_effects(filled):
        parts += ["## Effects", markdown_table(*effect_grid(effects, table.digits))]
        parts.append("\n".join(f"- {markdown_text(note, code=False)}" for note in effect_notes(effects)))
    parts.append(
        "## The runs\n\n"
        + markdown_text(f"All of them: `inbatch table {table.name} --scale {filled.scale}`; one alone, by seed 0:")
    )
    listed = []
    for cell, record in first_seeds(filled):
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


def first_seeds(filled: FilledTable) -> list[tuple[Cell, Record | None]]:
    """Return a cell of each row and data set, with its record if there is one."""
    first = filled.table.scales[filled.scale].seeds[0]
    records = filled.records
    seen: dict[str, tuple[Cell, Record | None]] = {}
    for cell in cells(filled.table, filled.scale, (first,)):
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


def latex(filled: FilledTable) -> str:
    """Return a table environment for booktabs; columns beyond the page width are in a second tabular below."""
    caption = f"{filled.table.title} ({filled.table.source}; {filled.scale} scale). {' '.join(notes(filled)[:2])}"
    parts = []
    for headings, rows in grids(filled, _TEX_WIDTH):
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
                rf"\label{{tab:{filled.table.name}}}",
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


def page(filled: FilledTable) -> str:
    """Return a self-contained HTML page: table, curves, notes, and the recipe of every run."""
    e, table = html.escape, filled.table
    parts = [f"<h1>{e(table.name)}: {e(table.title)}</h1><p>{e(table.question)}</p>", _html_table(*grid(filled))]
    if findings := table.findings.get(filled.scale):
        parts.append(f"<p><b>Findings.</b> {e(findings)}</p>")
    if (png := curves(filled)) is not None:
        parts.append(f'<p><img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>')
    parts.append(_html_list(notes(filled)))
    if effects := stated_effects(filled):
        parts += [
            "<h2>Effects</h2>",
            _html_table(*effect_grid(effects, table.digits)),
            _html_list(effect_notes(effects)),
        ]
    parts.append("<h2>Runs</h2>")
    for cell, record in first_seeds(filled):
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
