"""Plot the curves of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from inbatch.errors import DataError
from inbatch.runtime.files import replacing
from inbatch.runtime.picture_mark import MARK
from inbatch.runtime.text import one_line
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.reference_files import MEASURES
from inbatch.training.side_files import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Name of a number in the log -> label of its axis.
PANELS = {
    "loss": "loss",
    "lr": "learning rate",
    "images_per_second": "images / s",
    "knn": "online k-NN accuracy",
    "feature_std": "feature std",
    "rankme": "effective rank",
    "lidar": "LiDAR",
    "alpha": "alpha-ReQ",
    "sigreg_distance": "SIGReg distance",
    "leak": "context group from\none embedding",
    "curate_rounds": "redraw rounds",
    "curate_redrawn": "redraws / sample",
    "curate_violating_before": "share violating,\nas drawn",
    "curate_violating": "share violating,\nleft",
    "dropped_pairs": "pairs that are\nno negatives",
}


def plot_curves(log: Path, png: Path, compared: Comparison | None = None) -> None:
    """Plot every number of `PANELS` in a run's `metrics.jsonl` over its steps.

    Args:
        log: The run's `metrics.jsonl`.
        png: File to write.
        compared: Curve of the run and its reference; the band of the reference is drawn in the background.

    Raises:
        DataError: If the log contains none of the numbers.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in filter(None, (record for _, record in read_log(log))):
        for name in PANELS:
            if name in record:
                # null represents nan: a gap in the curve.
                value = record[name]
                curves.setdefault(name, []).append((record["step"], float("nan") if value is None else value))
    names = [name for name in PANELS if name in curves]
    if not names:
        raise DataError(f"{log} holds none of {', '.join(PANELS)}: nothing has been logged yet.")

    from matplotlib.figure import Figure

    # An automatic layout takes longer than the drawing, which a run may repeat after every evaluation.
    height = 1.9 * len(names)
    figure = Figure(figsize=(7, height))
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.45 / height, top=1 - 0.25 / height, hspace=0.12)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(names, panels, strict=True):
        steps, values = zip(*curves[name], strict=True)
        if compared is not None and name in MEASURES:
            _behind(panel, name, compared)
        panel.plot(steps, values, color="#0072b2", linewidth=1.2, marker="o" if len(steps) < 30 else "", markersize=3)
        panel.set_ylabel(PANELS[name])
        panel.yaxis.set_label_coords(-0.12, 0.5)
        panel.ticklabel_format(axis="y", scilimits=(-3, 6))  # no number overlaps the label
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if name != "loss":
            panel.set_ylim(bottom=0)  # a value that falls to zero must be visible as such
    if compared is not None:
        name = one_line(compared.reference.name)[-60:]  # a path may be long, and contain characters without a glyph
        title = f"grey: {name}, seeds: {len(compared.reference.curves)}; dots: means between evaluations"
        panels[0].set_title(title, fontsize=8, parse_math=False)
    panels[-1].set_xlabel("step")
    with replacing(png) as file:
        figure.savefig(file, dpi=120, format="png", metadata=MARK)


def _behind(panel: "Axes", name: str, compared: Comparison) -> None:
    """Draw the reference's mean and band for the epochs of the run; for the loss also the compared means, as dots."""
    epochs = [epoch for epoch in compared.reference.epochs if epoch <= compared.epochs[-1]]
    bands = {epoch * compared.steps: compared.reference.band(name, epoch) for epoch in epochs}
    known = [(step, *band) for step, band in bands.items() if band is not None]
    if not known:
        return
    steps, low, mean, high = zip(*known, strict=True)
    panel.fill_between(steps, low, high, color="#999999", alpha=0.3, linewidth=0)
    panel.plot(steps, mean, color="#777777", linewidth=1, linestyle="--")
    if name == "loss":
        means = [(entry["step"], entry[name]) for entry in compared.curve if name in entry]
        panel.plot(*zip(*means, strict=True), color="#d55e00", linestyle="", marker="o", markersize=3)
