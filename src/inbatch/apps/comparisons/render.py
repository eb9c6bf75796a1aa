"""Render the result of a comparison: for a terminal, as Markdown, and its runs as CSV."""

import csv
import io
import shlex
from typing import Any

from inbatch.apps.comparisons.metrics import METRICS, Metric
from inbatch.apps.console import table_text
from inbatch.apps.papers.render import markdown_table, markdown_text
from inbatch.apps.papers.table_notes import hours
from inbatch.runtime.text import one_line, printable


def _metric(result: dict[str, Any]) -> Metric:
    return METRICS[result["metric"]["name"]]


def _spread(value: dict[str, Any], metric: Metric, sign: bool = False) -> str:
    if value["mean"] is None:
        return ""
    deviation = "" if value["deviation"] is None else f" ± {value['deviation']:.{metric.digits}f}"
    return f"{metric.text(value['mean'], sign)}{deviation}"


def variant_grid(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the tested figure of each variant, and the other figures."""
    metric = _metric(result)
    others = list(dict.fromkeys(name for row in result["variants"] for name in row["others"]))
    headings = ["variant", metric.heading, "n", *(METRICS[name].heading for name in others), "steps", "time a run"]
    rows = []
    for row in result["variants"]:
        count = f"{row['count']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        more = [_spread(row["others"][n], METRICS[n]) if n in row["others"] else "" for n in others]
        steps = sorted({min(row["steps"]), max(row["steps"])}) if row["steps"] else []
        seconds = "" if row["seconds"] is None else hours(row["seconds"])
        rows.append([row["name"], _spread(row, metric), count, *more, " to ".join(f"{n:,}" for n in steps), seconds])
    return headings, rows


def comparison_grid(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: difference, interval and p values of each comparison."""
    metric = _metric(result)
    headings = ["difference", metric.heading, "95 % interval", "p (t)", "p (Holm)", "p (sign flip)", "shown"]
    rows = []
    for one in result["comparisons"]:
        size = "" if one["mean"] is None else _spread(one, metric, sign=True)
        limits = "" if one["interval"] is None else " to ".join(metric.text(end, sign=True) for end in one["interval"])
        values = [_p(one[key]) for key in ("p", "holm_p", "sign_flip_p")]
        name = f"{one['second']} - {one['first']}"
        rows.append([name, size, limits, *values, "yes" if one["shown"] else "no"])
    return headings, rows


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def setting_grid(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: the settings in which the variants differ."""
    names = list(result["variants"][0]["settings"])
    headings = ["setting", *(row["name"] for row in result["variants"])]
    return headings, [[name, *(_value(row["settings"][name]) for row in result["variants"])] for name in names]


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def sentences(result: dict[str, Any]) -> list[str]:
    """Return the sentences below the tables."""
    lines = [one["sentence"] for one in result["comparisons"]]
    lines += [] if result["best"] is None else [result["best"]["sentence"]]
    return [one_line(line) for line in lines]


def notes(result: dict[str, Any]) -> list[str]:
    """Return the conditions of the comparison: runs, images, evaluation, and what limits it."""
    runs, seeds = result["runs"], ", ".join(map(str, result["seeds"]))
    failed = f", {runs['failed']} failed" if runs["failed"] else ""
    lines = [
        f"{runs['finished']} of {runs['wanted']} runs{failed}, seeds {seeds}; mean ± standard deviation.",
        f"{result['data']}: {result['images']:,} images; evaluated by "
        f"{result['judged_by'] or 'measures without labels, which are not an accuracy'}.",
        *result["notes"],
    ]
    lines += [f"Failed: {row['name']}: {text}" for row in result["variants"] for text in row["failures"]]
    return [one_line(line) for line in lines]


def markdown(result: dict[str, Any]) -> str:
    """Return the comparison as a page in Markdown."""
    parts = [f"# Comparison on {markdown_text(result['data'])}", f"```bash\n{result['command']}\n```"]
    parts += [markdown_table(*variant_grid(result)), markdown_table(*comparison_grid(result))]
    parts += ["## What was shown", *(markdown_text(line, code=False) for line in sentences(result))]
    parts += ["## Conditions", "\n".join(f"- {markdown_text(line, code=False)}" for line in notes(result))]
    parts += ["## Settings that differ", markdown_table(*setting_grid(result))]
    commands = "\n".join(f"{row['command']}" for row in result["variants"])
    parts += [f"## Commands (seed {result['seeds'][0]})", f"```bash\n{commands}\n```"]
    return printable("\n\n".join(parts) + "\n")


def table_csv(result: dict[str, Any]) -> str:
    """Return a row for each run: variant, seed, the tested figure, and the settings in which variants differ."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    names = list(result["variants"][0]["settings"])
    writer.writerow(["variant", "seed", _metric(result).heading, *names])
    for row in result["variants"]:
        for seed in result["seeds"]:
            value = row["values"].get(str(seed))
            settings = (_value(row["settings"][name]) for name in names)
            writer.writerow([printable(row["name"]), seed, "" if value is None else value, *settings])
    return lines.getvalue()


def text(result: dict[str, Any]) -> str:
    """Return the comparison as text."""
    tables = [table_text(*variant_grid(result)), table_text(*comparison_grid(result))]
    return "\n".join([*tables, *sentences(result), "", *notes(result)]) + "\n"


def command(words: list[str]) -> str:
    """Return a command line as text."""
    return one_line(shlex.join(words))
