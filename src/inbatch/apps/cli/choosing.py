"""Command for choosing among runs without labels: choose."""

import math
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import SEEDS, Device, Json, app, emit_result, report_errors, requested_output
from inbatch.apps.console import note, print_table, say


@app.command(
    epilog="Examples:\n\n  inbatch choose runs/*\n\n"
    "  inbatch choose runs/simclr-photos-1 runs/simclr-photos-2 --by lidar\n\n"
    "  inbatch choose runs/* --data ~/photos -o choice.json\n\n"
    "  inbatch choose old-encoder new-encoder --data ~/photos --json",
)
def choose(
    runs: Annotated[
        list[str], Argument(metavar="RUN...", help="Run directories, finished or stopped; with --data also encoders.")
    ],
    by: Annotated[
        str | None,
        Option(metavar="rankme|lidar|alpha|std|loss|same_image", help="Measure; default: what the study supports."),
    ] = None,
    data: Annotated[
        list[str] | None, Option(help="Measure all encoders on these images; default: what the runs recorded.")
    ] = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="JSON", help="Also write the result as JSON.")] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the sample of images and of the views.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Rank runs without labels, and state how reliable that is.

    If labels are known, the table also has k-NN, and the agreement of every measure with it.
    """
    with report_errors(as_json):
        from inbatch.apps.reports.choose import choose_run
        from inbatch.runtime.files import write_json
        from inbatch.runtime.path_list import joined_paths

        path = None if out is None else requested_output(out)

        def compute() -> dict[str, Any]:
            result = choose_run(runs, by=by, data=joined_paths(data) or None, seed=seed, device=device)
            for text in result["notes"]:
                note(text)
            return result

        def write(result: dict[str, Any]) -> None:
            if path is not None:
                write_json(path, result)

        emit_result(compute, as_json, _show_choice, write)


def _show_choice(result: dict[str, Any]) -> None:
    columns = {"rankme": "RankMe", "lidar": "LiDAR", "alpha": "alpha-ReQ", "feature_std": "std", "loss": "loss"}
    columns["same_image"] = "same image"
    shown = [key for key in columns if any(_known(one[key]) for one in result["runs"])]
    labelled = any(_known(one["knn"]) for one in result["runs"])
    rows = [
        [one["run"], str(one["rank"]), one["method"] or "", "" if one["step"] is None else f"{one['step']:,}",
         *(f"{one[key]:.3g}" if _known(one[key]) else "" for key in shown),
         *([f"{one['knn']:.1%}" if _known(one["knn"]) else ""] if labelled else [])]
        for one in result["runs"]
    ]  # fmt: skip
    headings = ["run", "rank", "method", "step", *(columns[key] for key in shown), *(["k-NN"] if labelled else [])]
    if any("low" in one for one in result["runs"]):
        headings.append(f"95 % of {result['by']}" + (" (-|x - 1|)" if result["by"] == "alpha" else ""))
        rows = [[*row, _interval(one)] for row, one in zip(rows, result["runs"], strict=True)]
    print_table(headings, rows, numbers=True)
    say("", f"Recommended: {result['recommended']}, by {result['by']}", f"Reliability: {result['reliability']}")
    if result["kendall_tau"]:
        say(f"With labels: {_taus(result['kendall_tau'])}")


def _taus(taus: dict[str, float | None]) -> str:
    """Return how well each measure orders these runs by k-NN."""
    known = [f"{by} {tau:+.2f}" for by, tau in taus.items() if _known(tau)]
    if not known:
        return "Kendall's tau cannot be computed, because these runs are equal by k-NN or by every measure"
    return f"Kendall's tau with k-NN here: {', '.join(known)}"


def _interval(one: dict[str, Any]) -> str:
    return "" if one["low"] is None else f"{one['low']:.3g} to {one['high']:.3g}"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
