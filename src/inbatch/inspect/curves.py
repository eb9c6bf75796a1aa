"""The curves of a run."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from inbatch.errors import DataError
from inbatch.files import replacing

# The name of a number in the log, and what stands beside its axis.
PANELS = {
    "loss": "loss",
    "lr": "learning rate",
    "images_per_second": "images / s",
    "knn": "online k-NN accuracy",
    "feature_std": "feature std",
    "leak": "group told from\none embedding",
    "curate_rounds": "redraw rounds",
    "curate_redrawn": "redraws / sample",
    "curate_violating_before": "share violating,\nas drawn",
    "curate_violating": "share violating,\nleft",
}


def plot_curves(log: Path, png: Path) -> None:
    """Draw every number of `PANELS` that a run's `metrics.jsonl` holds over its steps.

    Raises DataError where it holds none of them.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in PANELS:
            if name in record:
                # null stands for nan: a gap in the curve.
                value = record[name]
                curves.setdefault(name, []).append((record["step"], float("nan") if value is None else value))
    names = [name for name in PANELS if name in curves]
    if not names:
        raise DataError(f"{log} holds none of {', '.join(PANELS)}: nothing was logged yet.")

    figure = Figure(figsize=(7, 1.9 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        steps, values = zip(*curves[name], strict=True)
        panel.plot(steps, values, color="#0072b2", linewidth=1.2, marker="o" if len(steps) < 30 else "", markersize=3)
        panel.set_ylabel(PANELS[name])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if name != "loss":
            panel.set_ylim(bottom=0)  # what falls to nothing must look so
    panels[-1].set_xlabel("step")
    figure.align_ylabels()
    with replacing(png) as file:
        figure.savefig(file, dpi=120, format="png")
