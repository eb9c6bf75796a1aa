"""Precision and recall of `inbatch labels` on flipped labels: python benchmarks/label_errors.py NAME=FEATURES...

FEATURES is a file of `inbatch embed`, of which labelled images of the split train are used, or "pixels": the pixels of
scikit-learn's digits. A share of the labels is flipped: uniform (to any other class) or pairwise (each class to one
other). Of the suspects: their number, precision and recall; of the ranking: precision among the first n, n being the
number of flipped labels. With cleanlab installed, its filters get the same out-of-fold probabilities. Writes
results/label-errors.json after each data set, and prints Markdown tables.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.evaluation.feature_table import read_features
from inbatch.evaluation.label_errors import check_labels, cross_validate
from inbatch.rng import permutation
from inbatch.runtime.environment import environment
from inbatch.runtime.files import read_json, write_json

OUT = Path(__file__).parents[1] / "results" / "label-errors.json"
FILTERS = ("prune_by_noise_rate", "both")
"""Filters of cleanlab: its default, and the one with the best balance in a first comparison."""


def read(file: str, images: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return vectors and labels of some training images of the first classes."""
    if file == "pixels":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).long()
    table = read_features(file)
    here = torch.tensor([split in ("train", "") for split in table.splits]) & (table.labels >= 0)
    rows = (here & (table.labels < classes)).nonzero()[:, 0]
    rows = rows[permutation(0, 0, len(rows))[:images]]
    return table.vectors[rows], table.labels[rows]


def flipped(labels: Tensor, share: float, kind: str, seed: int) -> Tensor:
    """Return labels of which a share is wrong."""
    classes, count = int(labels.max()) + 1, round(share * len(labels))
    draw = torch.Generator().manual_seed(seed)
    at = torch.randperm(len(labels), generator=draw)[:count]
    step = torch.randint(1, classes, (count,), generator=draw) if kind == "uniform" else torch.ones(count).long()
    wrong = labels.clone()
    wrong[at] = (labels[at] + step) % classes
    return wrong


def scored(suspected: Tensor, wrong: Tensor) -> dict[str, float]:
    """Return number, precision and recall of the suspects."""
    hits, count = int((suspected & wrong).sum()), int(suspected.sum())
    return {"suspects": count, "precision": hits / max(count, 1), "recall": hits / int(wrong.sum())}


def one(vectors: Tensor, labels: Tensor, observed: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Return the figures of this package, and of cleanlab if it is installed."""
    wrong, began = observed != labels, time.process_time()
    errors = check_labels(vectors, observed, seed=seed)
    seconds = time.process_time() - began
    suspected = torch.zeros(len(labels), dtype=torch.bool)
    suspected[errors.checked[errors.suspects]] = True
    first = errors.checked[errors.ranking[: int(wrong.sum())]]
    ours = scored(suspected, wrong) | {"first": wrong[first].double().mean().item(), "seconds": seconds}
    figures = {"inbatch": ours | {"agreement": errors.agreement}}
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return figures
    chance = cross_validate(vectors, observed, int(observed.max()) + 1, seed=seed).chance.double()
    chance = (chance / chance.sum(1, keepdim=True)).numpy()
    order = torch.from_numpy(get_label_quality_scores(observed.numpy(), chance)).argsort()
    for name in FILTERS:
        issues = torch.from_numpy(find_label_issues(observed.numpy(), chance, filter_by=name, n_jobs=1))
        first = wrong[order[: int(wrong.sum())]].double().mean().item()
        figures[f"cleanlab {name}"] = scored(issues, wrong) | {"first": first}
    return figures


def measure(file: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean figures of a data set for each kind and share of errors."""
    vectors, labels = read(file, args.images, args.classes)
    report: dict[str, Any] = {"images": len(labels), "classes": int(labels.max()) + 1, "width": vectors.shape[1]}
    report["errors"] = {}
    for kind in ("uniform", "pairwise"):
        for share in (0.05, 0.1, 0.2):
            runs = [one(vectors, labels, flipped(labels, share, kind, seed), seed) for seed in range(args.seeds)]
            report["errors"][f"{kind} {share:.0%}"] = {
                name: {key: sum(run[name][key] for run in runs) / len(runs) for key in figures}
                for name, figures in runs[0].items()
            } | {"each": [run["inbatch"] for run in runs]}
            print(f"{file}: {kind} {share:.0%} done", flush=True)
    return report


def table(name: str, report: dict[str, Any]) -> str:
    """Return a Markdown table."""
    lines = [
        f"| {name}: {report['images']:,} images, {report['classes']} classes | number | precision | recall | first n |",
        "| --- | --- | --- | --- | --- |",
    ]
    for errors, row in report["errors"].items():
        for judge, f in row.items():
            if judge != "each":
                cells = f"{f['suspects']:,.0f} | {f['precision']:.0%} | {f['recall']:.0%} | {f['first']:.0%}"
                lines.append(f"| {errors}, {judge} | {cells} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="NAME=FEATURES")
    parser.add_argument("--images", type=int, default=3000, help="images of each set, drawn by a fixed seed")
    parser.add_argument("--classes", type=int, default=10, help="use the first classes only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    report = read_json(args.out) if args.out.exists() else {"sets": {}}
    report["environment"] = environment(torch.device("cpu"))
    for word in args.sets:
        name, _, file = word.partition("=")
        report["sets"][name] = measure(file, args)
        write_json(args.out, report)
    for name, errors in report["sets"].items():
        print(table(name, errors), "\n")


if __name__ == "__main__":
    main()
