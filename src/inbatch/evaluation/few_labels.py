"""Few labels: a classifier on the same features, trained with the labels of a small share of the images."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.embeddings import Embeddings, matched
from inbatch.evaluation.knn import knn
from inbatch.evaluation.linear_probe import linear_probe
from inbatch.evaluation.probe_presets import Lbfgs, Sgd
from inbatch.rng import permutation

SHARES = (0.01, 0.1, 0.5)
"""Shares of the labels; the first two are those of the papers' tables."""


def few_labels(labels: Int[Tensor, "n"], share: float, seed: int = 0) -> Int[Tensor, "m"]:
    """Return the sorted positions of the kept labels: the same share of every class, rounded, at least one image.

    A smaller share of the same seed is a subset of a larger one.

    Args:
        labels: (N,) int64; negative labels are never kept.
        share: share of the labels, 0 < share <= 1.
        seed: seed of the draw.

    Raises:
        ConfigError: unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a share of the labels is above 0 and at most 1, not {share:g}.")
    order = permutation(seed, 0, len(labels))
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]  # by class; within a class, in the order of the seed
    counts = labels[order].bincount()
    wanted = (share * counts.double()).round().long().clamp(min=1)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank < wanted[labels[order]]].sort().values


def evaluate_few_labels(
    train: Embeddings,
    test: Embeddings,
    *,
    shares: Sequence[float] = SHARES,
    draws: int = 3,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    probe: str | Lbfgs | Sgd = "lbfgs",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return top1 and top5 in [0, 1] of k-NN and linear probe: means over draws of the labels, and each figure.

    For every share, the result includes the number of labelled images, and their minimum and maximum per class.

    Args:
        train: training features.
        test: test features.
        shares: shares of the labels.
        draws: number of draws, with the seeds seed, seed + 1, ...
        k: number of neighbours, at most the number of labelled images.
        temperature: of k-NN.
        distance: of k-NN.
        probe: see `linear_probe`.
        seed: seed of the first draw.
        device: device of the probe.

    Raises:
        ConfigError: if there is no draw or no share.
    """
    if draws < 1 or not shares:
        raise ConfigError(f"few labels need a share and a draw at least, not {len(shares)} and {draws}.")
    train, test, _ = matched(train, test)
    seeds = list(range(seed, seed + draws))
    figures: dict[str, Any] = {}
    for share in shares:
        draws_kept = [few_labels(train.labels, share, s) for s in seeds]
        counts, nearest = train.labels[draws_kept[0]].bincount(), min(k, len(draws_kept[0]))
        knn_figures, probe_figures = [], []
        for s, kept in zip(seeds, draws_kept, strict=True):
            part = train.take(kept)
            knn_figures.append(knn(part, test, nearest, temperature, distance, device=device))
            probe_figures.append(linear_probe(part, test, probe, seed=s, device=device))
        figures[percent(share)] = {
            "images": len(draws_kept[0]),
            "of_a_class": {"least": int(counts[counts > 0].min()), "most": int(counts.max())},
            "knn": {**_means(knn_figures), "k": nearest},
            "linear": _means(probe_figures),
        }
    name = probe if isinstance(probe, str) else "custom"
    protocol = {"probe": name, "distance": distance, "temperature": temperature if distance == "cosine" else None}
    return {"shares": figures, "seeds": seeds, **protocol, "drawn": "the same share of every class, nested by seed"}


def percent(share: float) -> str:
    """Return a share as text: 0.01 is "1%"."""
    return f"{100 * share:.6g}%"


def _means(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of top1, top5 and the halves of top1; `each` holds those of the single draws."""
    each = {name: [one[name] for one in figures] for name in ("top1", "top5")}
    parts = zip(*(one["halves"] for one in figures), strict=True)
    halves = [None if None in part else sum(part) / len(part) for part in parts]
    return {name: sum(values) / len(values) for name, values in each.items()} | {"halves": halves, "each": each}
