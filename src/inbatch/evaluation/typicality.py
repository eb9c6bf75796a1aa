"""Typical images: the densest rows of k-means clusters, the clusters with the fewest labels first (TypiClust).

Hacohen, Dekel and Weinshall 2022, "Active learning on a budget", section 3.2.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.evaluation.neighbours import unit_rows
from inbatch.nn.clustering import k_means
from inbatch.rng import fold

_TILE = 1 << 13
_CLUSTERS, _SMALLEST = 500, 5
"""Largest number of clusters, and size of clusters that are used first, as in the authors' code."""
_FITTED = 50_000
"""Rows, at most, to which k-means is fitted; all rows are then assigned."""
_OTHERS, _NEAREST = 1000, 20
"""Rows of a cluster, at most, among which the nearest are searched, and the number of nearest rows."""


def typical_rows(
    vectors: Float[Tensor, "n f"], labelled: Bool[Tensor, "n"], count: int, seed: int
) -> tuple[Int[Tensor, "c"], Float[Tensor, "c"], Int[Tensor, "c"], Int[Tensor, "c"]]:
    """Return the positions of typical unlabelled rows, their typicality, their cluster and its number of rows.

    There are as many clusters as rows labelled and chosen, at most 500. The next row is the densest remaining one of
    the cluster with the fewest labelled and chosen rows; of such clusters the largest comes first, and those of fewer
    than five rows last. The density is the mean similarity to the 20 nearest rows of the cluster.
    """
    draw = torch.Generator().manual_seed(fold(seed, 21))
    clusters = min(count + int(labelled.sum()), _CLUSTERS, len(vectors))
    assignment = _clustered(vectors, clusters, draw, seed)
    size = assignment.bincount(minlength=clusters)
    known = assignment[labelled].bincount(minlength=clusters)
    members = assignment.argsort(stable=True).split(size.tolist())
    ranked = [_ranked(vectors, rows, labelled, draw) for rows in members]
    order = [
        (taken, bool(size[c] < _SMALLEST), -int(size[c]), c, place)
        for c in range(clusters)
        for place, taken in enumerate(range(int(known[c]), int(known[c]) + len(ranked[c][0])))
    ]
    chosen = [(c, place) for *_, c, place in sorted(order)[:count]]
    rows = torch.stack([ranked[c][0][place] for c, place in chosen])
    density = torch.stack([ranked[c][1][place] for c, place in chosen])
    cluster = torch.tensor([c for c, _ in chosen])
    return rows, density, cluster, size[cluster]


def _clustered(vectors: Tensor, clusters: int, draw: torch.Generator, seed: int) -> Int[Tensor, "n"]:
    """Return the cluster of each row."""
    sample = torch.randperm(len(vectors), generator=draw)[:_FITTED].sort().values
    fitted = unit_rows(vectors[sample])
    centres, assignment, _ = k_means(fitted, clusters, 1, 50, fold(seed, 22))
    if len(sample) == len(vectors):
        return assignment
    shift = centres.square().sum(1) / 2
    return torch.cat([(unit_rows(rows) @ centres.T - shift).argmax(1) for rows in vectors.split(_TILE)])


def _ranked(vectors: Tensor, rows: Tensor, labelled: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the unlabelled rows of a cluster by falling density, and their densities."""
    free = rows[~labelled[rows]]
    if len(rows) < 2:  # k-means of identical rows leaves clusters empty
        return free, torch.ones(len(free))
    others = rows if len(rows) <= _OTHERS else rows[torch.randperm(len(rows), generator=draw)[:_OTHERS]]
    bank, density = unit_rows(vectors[others]), torch.empty(len(free))
    for at in torch.arange(len(free)).split(_TILE):
        similarity = unit_rows(vectors[free[at]]) @ bank.T
        similarity.masked_fill_(free[at][:, None] == others, -torch.inf)
        density[at] = similarity.topk(min(_NEAREST, len(others) - 1), dim=1).values.mean(1)
    order = density.argsort(descending=True, stable=True)
    return free[order], density[order]
