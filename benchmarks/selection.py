"""Strategies of `inbatch select`, compared by a probe: python benchmarks/selection.py NAME=FEATURES...

FEATURES is a file of `inbatch embed` with a labelled train and test split. For every seed, a pool is drawn from the
training images, each strategy chooses images of it, and a linear probe (the preset lbfgs) is fitted to the labels of
the chosen images and evaluated on all test images. Two cases: nothing is labelled before ("none"), and half of the
budget is labelled before, drawn by chance ("half"), which `uncertain` needs. A budget is a number of labels per class
times the number of classes. Writes results/selection.json after each data set, and prints Markdown tables.

--scale FILE.npy measures processor time and peak memory of each choice of 1,000 of the rows of a memory-mapped array.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inbatch.evaluation.accuracy import hits
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.feature_table import FeatureTable, read_features
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.selection import STRATEGIES, select
from inbatch.rng import permutation
from inbatch.runtime.environment import environment
from inbatch.runtime.files import read_json, write_json
from inbatch.runtime.memory import forget_peak, peak

OUT = Path(__file__).parents[1] / "results" / "selection.json"
NESTED = {"random", "diverse", "coverage"}
"""Strategies whose first choices do not depend on the number of images to choose."""


def split_of(table: FeatureTable, names: set[str], classes: int) -> tuple[Tensor, Tensor]:
    """Return vectors and labels of the images of a split, only of the first classes."""
    here = torch.tensor([split in names for split in table.splits]) & (table.labels >= 0) & (table.labels < classes)
    return table.vectors[here], table.labels[here]


def accuracy(pool: tuple[Tensor, Tensor], rows: Tensor, test: tuple[Tensor, Tensor], classes: int) -> float:
    """Return the accuracy on the test images of a linear probe on the labels of some rows of the pool."""
    train = Embeddings(pool[0][rows], pool[1][rows], ("",) * len(rows), "chosen", "")
    return float(hits(fit(train, classes).scores(test[0]), test[1])["top1"])


def one_seed(pool: tuple[Tensor, Tensor], budgets: Sequence[int], seed: int, judge: Any) -> dict[str, dict[str, float]]:
    """Return the accuracy of each case, strategy and budget; seconds of all choices of a strategy as well."""
    vectors, labels = pool
    chance = select(vectors, max(budgets), "random", seed=seed).rows
    figures: dict[str, dict[str, float]] = {}
    for case in ("none", "half"):
        for strategy in STRATEGIES:
            if strategy == "random" or (case == "none" and strategy == "uncertain"):
                continue
            row, seconds, chosen = figures.setdefault(f"{case} {strategy}", {}), 0.0, None
            for budget in sorted(budgets, reverse=True):
                before = chance[: budget // 2] if case == "half" else chance[:0]
                known = torch.zeros(len(vectors), dtype=torch.bool)
                known[before] = True
                if chosen is None or case == "half" or strategy not in NESTED:
                    began, more = time.process_time(), budget - len(before)
                    chosen = select(vectors, more, strategy, labelled=known, labels=labels, seed=seed).rows
                    seconds += time.process_time() - began
                row[str(budget)] = judge(torch.cat([before, chosen[: budget - len(before)]]))
            row["seconds"] = seconds
    figures["random"] = {str(budget): judge(chance[:budget]) for budget in budgets}
    return figures


def measure(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracies of a data set, a list over the seeds each."""
    table = read_features(file)
    classes = min(args.classes, len(table.classes))
    train, test = (split_of(table, names, classes) for names in ({"train"}, {"test", "val"}))
    budgets = [classes * each for each in args.per_class]
    every: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.seeds):
        drawn = permutation(seed, 0, len(train[0]))[: min(args.pool, round(0.8 * len(train[0])))]
        pool = train[0][drawn], train[1][drawn]
        for name, row in one_seed(pool, budgets, seed, lambda rows: accuracy(pool, rows, test, classes)).items():  # noqa: B023
            for key, value in row.items():
                every.setdefault(name, {}).setdefault(key, []).append(value)
        print(f"{file.name}: seed {seed} done", flush=True)
    shape = {"pool": len(pool[0]), "test": len(test[0]), "classes": classes, "width": train[0].shape[1]}
    return {
        **shape,
        "budgets": budgets,
        "accuracy": every,
        "all": accuracy(pool, torch.arange(len(pool[0])), test, classes),
    }


def scale(file: Path, rows: int, strategies: Sequence[str]) -> dict[str, Any]:
    """Return processor seconds and peak memory of choices from mapped vectors; pages of the file count as memory."""
    mapped = np.load(file, mmap_mode="c")
    vectors, report = torch.from_numpy(mapped[:rows]), dict[str, Any]()
    labels, known = torch.arange(len(vectors)) % 10, torch.arange(len(vectors)) < 200
    for strategy in strategies:
        forget_peak(torch.device("cpu"))
        before, wall = time.process_time(), time.perf_counter()
        chosen = select(vectors, 1000, strategy, labelled=known, labels=labels)
        report[strategy] = {
            "seconds": time.process_time() - before,
            "wall": time.perf_counter() - wall,
            "peak_bytes": peak(torch.device("cpu")),
        }
        print(f"{len(vectors):,} rows, {strategy}: {report[strategy]}, {chosen.notes}", flush=True)
    return report


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def table(name: str, figures: dict[str, Any]) -> str:
    """Return a Markdown table: accuracy of random choice, and differences of the others to it, paired by the seed."""
    budgets = [str(budget) for budget in figures["budgets"]]
    head = f"{name}: {figures['pool']:,} images, {figures['classes']} classes; all of them {figures['all']:.1%}"
    lines = [f"| {head} | {' | '.join(budgets)} |", "| --- |" + " --- |" * len(budgets)]
    for key, row in sorted(figures["accuracy"].items(), key=lambda item: item[0] != "random"):
        cells = []
        for budget in budgets:
            base = figures["accuracy"]["random"][budget]
            if key == "random":
                cells.append("{:.1f} ± {:.1f} %".format(*(100 * x for x in mean(base))))
            else:
                gap, error = mean([a - b for a, b in zip(row[budget], base, strict=True)])
                mark = "**" if gap > 2 * error else ""
                cells.append(f"{mark}{100 * gap:+.1f} ± {100 * error:.1f}{mark}")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="NAME=FEATURES")
    parser.add_argument(
        "--pool", type=int, default=5000, help="images to choose from, at most 80 % of the training set"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=20, help="use the first classes only")
    parser.add_argument("--per-class", type=int, nargs="+", default=[5, 10, 50], help="budgets, in labels per class")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--scale", type=Path, metavar="FILE.npy", help="measure time and memory instead")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of --scale")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), help="strategies of --scale")
    args = parser.parse_args(words)
    if args.scale:
        scale(args.scale, args.rows, args.strategies)
        return
    report = read_json(args.out) if args.out.exists() else {"sets": {}}
    report["environment"] = environment(torch.device("cpu"))
    for word in args.sets:
        name, _, file = word.partition("=")
        report["sets"][name] = measure(Path(file), args)
        write_json(args.out, report)
    for name, figures in report["sets"].items():
        print(table(name, figures), "\n")


if __name__ == "__main__":
    main()
