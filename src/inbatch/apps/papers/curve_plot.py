"""Plot the curves of a table's rows over the epochs."""

import io
from itertools import cycle, product
from statistics import mean, stdev

from inbatch.apps.papers.filled_table import FilledTable, Line
from inbatch.runtime.picture_mark import MARK

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")


def curves(filled: FilledTable) -> bytes | None:
    """Return a PNG of the rows' curves over the epochs, mean and spread over seeds; None without curves.

    There is a panel for each data set and number. The number is that of the table if it is a figure of curves, else
    loss, k-NN, feature_std and rankme.
    """
    curve = filled.table.curve_at(filled.scale)
    numbers = [curve] if curve else ["loss", "knn", "feature_std", "rankme"]
    kinds = [
        data
        for data in filled.table.scales[filled.scale].data
        if any(_curve(line, data, "epoch") for line in filled.lines)
    ]
    if not kinds:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(kinds), 3.2 * len(numbers)), layout="constrained")
    panels = figure.subplots(len(numbers), len(kinds), squeeze=False)
    for across, data in enumerate(kinds):
        for down, number in enumerate(numbers):
            panel = panels[down][across]
            for line, (dashes, colour) in zip(filled.lines, cycle(product(("-", "--", ":"), COLOURS)), strict=False):
                if series := _curve(line, data, number):
                    epochs, means, spreads = series
                    panel.plot(epochs, means, dashes, color=colour, linewidth=1.3, label=line.row.name)
                    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
                    panel.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.set(xlabel="epoch", ylabel={"knn": "k-NN, %"}.get(number, number), title=data)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    names, shown = [], []
    for panel in panels.flat:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            if name not in names:
                names.append(name)
                shown.append(handle)
    figure.legend(shown, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, dpi=100, format="png", metadata=MARK)
    return out.getvalue()


def _curve(line: Line, data: str, number: str) -> tuple[list[float], list[float], list[float]] | None:
    """Return epochs, means and standard deviations over the seeds, at epochs for which every seed has the number."""
    scale = 100.0 if number == "knn" else 1.0
    runs: list[dict[float, float]] = [
        {
            float(entry["epoch"] or 0): scale * value
            for entry in record.curve
            if (value := entry.get(number)) is not None
        }
        for cell, record in zip(line.cells, line.records, strict=True)
        if cell.data == data and record.curve
    ]
    epochs = sorted(set.intersection(*map(set, runs))) if runs else []
    if not epochs:
        return None
    every = [[run[epoch] for run in runs] for epoch in epochs]
    return list(epochs), [mean(v) for v in every], [stdev(v) if len(v) > 1 else 0.0 for v in every]
