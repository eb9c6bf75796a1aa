"""Curves of accuracy over training cost for benchmarks/time_to_accuracy.py: read from a run, plotted, tabulated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from inbatch.errors import DataError
from inbatch.runtime.device import processor_words
from inbatch.runtime.files import read_json
from inbatch.runtime.picture_mark import MARK
from inbatch.training.side_files import read_log

Entry = dict[str, Any]
COLOURS = ("#999999", "#0072b2", "#d55e00", "#009e73")

KEPT = ("cpu_seconds", "images", "bank", "queries")
FLAGS = {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd"}


def flags() -> list[str]:
    """Return the processor flags that matter for training; empty if /proc/cpuinfo does not exist."""
    return sorted(FLAGS & processor_words())


def reached(entries: Sequence[Entry], target: float) -> dict[str, float] | None:
    """Return the first evaluation that reached the target, with its cost, bank size and queries; None if none did.

    An evaluation with a part of the images as bank counts as well, since fewer neighbours lower the accuracy.
    `cpu_seconds_before` is the cost at the preceding evaluation.
    """
    before = 0.0
    for entry in entries:
        if entry["knn"] >= target:
            cost = {key: entry[key] for key in ("seconds", "cpu_seconds", "images", "bank", "queries")}
            return {"target": target, "cpu_seconds_before": before} | cost
        before = entry["cpu_seconds"]
    return None


def entries(folder: Path, images: int) -> list[Entry]:
    """Read the evaluations of an inbatch run on `images` training images from its log; empty if there are none yet.

    The loss is the mean of the values logged since the preceding evaluation. The evaluation of a finished run replaces
    its last entry if it used more images.

    Raises:
        DataError: If the log does not contain the training cost.
    """
    log, result = folder / "metrics.jsonl", folder / "result.json"
    cost: Entry = {}
    losses: list[float] = []
    curve: list[Entry] = []
    records = (record for _, record in read_log(log)) if log.exists() else iter(())
    for record in filter(None, records):  # without an incomplete line that is still being written
        if record.get("loss") is not None:
            losses.append(record["loss"])
        if "training_seconds" in record:
            cost = record
        if "knn" not in record:
            continue
        if cost.get("step") != record["step"] or cost["cpu_seconds"] is None:
            raise DataError(f"{log} has no training cost: it is from an older version of inbatch; repeat the run")
        entry = {"seconds": cost["training_seconds"]} | {key: cost[key] for key in KEPT}
        entry |= {"epoch": cost["images"] / images, "loss": mean(losses) if losses else None, "knn": record["knn"]}
        curve.append(entry)
        losses = []
    evaluation = (read_json(result).get("evaluation") or {}) if result.exists() else {}
    if curve and "knn" in evaluation:
        sizes = {"bank": evaluation["train"]["labelled"], "queries": evaluation["test"]["labelled"]}
        if tuple(sizes.values()) > (curve[-1]["bank"], curve[-1]["queries"]):
            curve[-1] |= sizes | {"knn": evaluation["knn"]["top1"]}
    return curve


def together(files: Sequence[Path]) -> dict[str, Any]:
    """Combine curve files; the first is the baseline of the comparison.

    Raises:
        DataError: If the files differ in target or number of images.
    """
    runs = [read_json(file) for file in files]
    for what in ("target", "images"):
        values = sorted({run[what] for run in runs})
        if len(values) != 1:
            raise DataError(
                f"{', '.join(map(str, files))} differ in {what} ({values}): pass curves with the same {what}"
            )
    return {"target": runs[0]["target"], "images": runs[0]["images"], "runs": runs}


def amount(seconds: float) -> str:
    """Format seconds to three significant digits."""
    return f"{float(f'{seconds:.3g}'):,.0f}"


def row(run: Mapping[str, Any], target: float, base: Mapping[str, Any]) -> list[str]:
    """Return a run's table cells.

    Args:
        run: Curve of the run.
        target: k-NN accuracy to reach.
        base: Run that it is compared with. If that run did not reach the target, its last evaluation gives a lower
            bound of the speed-up.
    """
    when, last, env = reached(run["curve"], target), run["curve"][-1], run["environment"]
    best = max(entry["knn"] for entry in run["curve"])
    first, sooner = reached(base["curve"], target), ""
    if when and when["cpu_seconds"]:
        until = (first or base["curve"][-1])["cpu_seconds"]
        times = until / when["cpu_seconds"]
        sooner = f"{times:.2f}" if first else f"over {times:.3g}"
    cpu = f"not in {amount(last['cpu_seconds'])}"
    if when:
        cpu = f"{amount(when['cpu_seconds'])} (not yet at {amount(when['cpu_seconds_before'])})"
    rate = last["images"] / last["cpu_seconds"] if last["cpu_seconds"] else 0.0
    seen = f"{(when or last)['images'] / run['images']:.1f}"
    sizes = ", ".join(f"{(when or last)[key]:,.0f}" for key in ("bank", "queries"))
    untrained = "" if run["curve"][0]["cpu_seconds"] else f"{run['curve'][0]['knn']:.1%}"
    return [run["who"], str(env["threads"]), cpu, sooner, seen, sizes, f"{rate:.1f}", untrained, f"{best:.1%}"]


def markdown(comparison: Mapping[str, Any]) -> str:
    """Return the table of several curves in Markdown, with the machine, versions and command of each."""
    target, base = comparison["target"], comparison["runs"][0]
    heads = ["who", "threads", f"processor seconds to {target:.0%}", f"times sooner than {base['who']}"]
    heads += ["epochs", "bank, queries", "images a processor second", "k-NN untrained", "best k-NN"]
    cells = [heads, ["---"] * len(heads), *(row(run, target, base) for run in comparison["runs"])]
    notes = []
    for run in comparison["runs"]:
        env = run["environment"]
        versions = f"torch {env['versions']['torch']}" + (f", lightly {env['lightly']}" if "lightly" in env else "")
        notes.append(f"{run['who']}: {env['processor']} ({', '.join(env['flags'])}), {versions}, `{run['command']}`.")
    return "".join(f"| {' | '.join(one)} |\n" for one in cells) + "\n" + "\n".join(notes) + "\n"


def plot_curves(comparison: Mapping[str, Any], png: Path) -> None:
    """Plot k-NN accuracy over processor seconds; markers are hollow if the bank was a part of the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    for run, colour in zip(comparison["runs"], COLOURS, strict=False):
        # the untrained encoder has no place on a logarithmic axis
        shown = [entry for entry in run["curve"] if entry["cpu_seconds"] > 0]
        panel.plot(
            [entry["cpu_seconds"] for entry in shown], [100 * entry["knn"] for entry in shown],
            color=colour, linewidth=1.4, label=run["who"],
        )  # fmt: skip
        for entry in shown:
            whole = entry["bank"] >= run["images"]
            face = colour if whole else "white"
            panel.plot(entry["cpu_seconds"], 100 * entry["knn"], "o", color=colour, markersize=4, markerfacecolor=face)
    panel.axhline(100 * comparison["target"], color="black", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", xlabel="processor seconds of training, all threads", ylabel="k-NN accuracy, %")
    for axis in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
        axis("{x:,.0f}")
    panel.tick_params(axis="x", which="both", labelrotation=45)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(png, dpi=120, metadata=MARK)
