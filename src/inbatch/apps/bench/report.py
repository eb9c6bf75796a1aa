"""Text output of benchmark results: for a terminal, and between the markers of a documentation page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inbatch.apps.bench import accuracy
from inbatch.apps.bench.runner import OURS
from inbatch.apps.console import print_table, say

SLOWER = {"s": 1.0, "ms": 1e3}
"""Units of time, in parts of a second; all other units are rates."""
CEILINGS = {"float32": "float32 products", "bf16": "bf16 products", "copy": "bandwidth"}


def headings(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the column headings of a comparison."""
    return ("who", comparison["unit"], "from", "to", "inbatch is times faster", "of the ceiling", "")


def table_rows(comparison: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Iterate over one row per implementation: median, spread, speed-up of inbatch, share of the hardware peak."""
    own = comparison["implementations"].get(OURS, {}).get("rate")
    for who, row in comparison["implementations"].items():
        if "rate" not in row:
            yield who, "", "", "", "", "", row.get("failed", "")
            continue
        amounts = [amount(row[key], comparison["unit"]) for key in ("rate", "low", "high")]
        if comparison["unit"] in SLOWER:
            amounts[1:] = amounts[:0:-1]
        ratio = "" if own is None or who == OURS else f"{own / row['rate']:.2f}"
        share = f"{row['share']:.0%} of {CEILINGS[row['of']]}" if "share" in row else "-"
        yield who, *amounts, ratio, share, note(row)


def amount(rate: float, unit: str) -> str:
    """Format a rate in its unit, to three digits or as an integer."""
    value = SLOWER[unit] / rate if unit in SLOWER else rate
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def note(row: Mapping[str, Any]) -> str:
    """Return the remarks on an implementation: precision, workers, accuracy."""
    remarks = [row["precision"]] if "precision" in row else []
    remarks += [f"{row['workers']} workers"] if "workers" in row else []
    remarks += [f"{name} {row[key]:.3f}" for key, name in (("top1", "top-1"), ("nmi", "NMI")) if key in row]
    return ", ".join(remarks)


def title(comparison: Mapping[str, Any]) -> str:
    """Return the title of a comparison with its number of threads."""
    threads = " or ".join(map(str, comparison["threads"]))
    return f"{comparison['title']}; {threads} thread{'s' * (threads != '1')}"


def machine(results: Mapping[str, Any]) -> str:
    """Return a description of the machine and its hardware peak."""
    env = results["environment"]
    where = env["device"] if env["device"] != "cpu" else f"{env['processor']}, {env['cores']} cores"
    parts = [f"{where}, torch {env['versions']['torch']}"]
    for threads, ceiling in results["ceilings"].items():
        half = f", {ceiling['bf16'] / 1e9:,.0f} in bf16" if ceiling["bf16"] else ", no bf16"
        rates = f"{ceiling['float32'] / 1e9:,.0f} GFLOP/s in float32{half}"
        parts.append(f"{threads} thread{'s' * (threads != '1')}: {rates}, copies {ceiling['copy'] / 1e9:,.0f} GB/s")
    return "; ".join(parts)


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Print the table of a comparison."""
    say(title(comparison))
    print_table(headings(comparison), table_rows(comparison), numbers=True)
    say("")


def print_machine(results: Mapping[str, Any]) -> None:
    """Print the machine, and a warning if other processes were running."""
    say(machine(results))
    if (load := results["environment"].get("load", 0)) > 0.5:
        say(f"Warning: other processes were running (load {load:.1f}): rates are too low; ratios are affected less.")
    if results["settings"]["quick"]:
        say("Small sizes (--quick): a functional check, not a measurement of speed.")


def markdown(comparison: Mapping[str, Any]) -> str:
    """Return the table of a comparison in Markdown."""
    lines = [headings(comparison), ["---"] * len(headings(comparison)), *table_rows(comparison)]
    return f"{title(comparison)}:\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def sections(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Convert results of `inbatch bench` to marker -> text, for the machine and every section."""
    blocks = {f"{name} machine": f"{machine(results)}. `{results['command']}`\n"}
    return blocks | {
        f"{name} {s}": "\n".join(map(markdown, comparisons)) for s, comparisons in results["sections"].items()
    }


def trainings(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Convert results of benchmarks/training.py: training with each library."""
    comparison = results["comparison"]
    first = [
        f"{who} {x['first_seconds']:.1f}" for who, x in comparison["implementations"].items() if "first_seconds" in x
    ]
    return {name: f"{markdown(comparison)}\nSeconds from the start to the end of the first step: {', '.join(first)}.\n"}


def curves(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Convert its results on precision."""
    lines = ["| | loss, mean of the last 20 steps | mean distance from float32 | images/s |", "| --- |" + " --- |" * 3]
    for who, row in results["runs"].items():
        last = row["loss"][-20:]
        apart = f"{results['apart'][who]:.4f}" if who in results["apart"] else ""
        lines.append(f"| {who} | {sum(last) / len(last):.4f} | {apart} | {row['images_per_second']:,.0f} |")
    return {name: "\n".join(lines) + "\n"}


def waits(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Convert its results on waiting for data."""
    lines = ["| encoder | batch | workers | images/s | time spent waiting |", "| --- |" + " --- |" * 4]
    for who, row in results["encoders"].items():
        cells = [who, str(row["batch"]), str(row["workers"]), f"{row['images_per_second']:,.1f}"]
        lines.append(f"| {' | '.join(cells)} | {row['waiting']:.1%} |")
    return {name: "\n".join(lines) + "\n"}


def texts(name: str, results: Mapping[str, Any]) -> dict[str, str]:
    """Convert a results file, selected by its name, to marker -> text."""
    kinds = {"bench-": sections, "training-": trainings, "bf16": curves, "waiting": waits}
    kinds["time-to-accuracy"] = lambda name, results: {name: accuracy.markdown(results)}
    return next((make(name, results) for start, make in kinds.items() if name.startswith(start)), {})
