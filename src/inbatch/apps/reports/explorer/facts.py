"""Facts about images from one set of features: map, neighbours, clusters, outlier scores; groups of near duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.apps.reports.explorer.sprite import Sprite
from inbatch.evaluation.near_duplicates import representatives, unique_pairs
from inbatch.evaluation.neighbours import nearest_others, unit_rows
from inbatch.evaluation.outliers import distribution_distance
from inbatch.evaluation.thumbnail_alignment import THRESHOLD, compare
from inbatch.nn.clustering import k_means

_CANDIDATES = 5
"""Nearest neighbours of an image that are compared with it, as many as `inbatch duplicates` compares."""
_CLUSTERED = 20_000
"""Images of which k-means computes the centroids; the others are assigned to them."""


@dataclass(frozen=True)
class Facts:
    """Facts about N images with k neighbours each.

    Attributes:
        places: (N, 2) coordinates in [-1, 1].
        neighbours: (N, k) positions of the nearest other images, nearest first.
        similarities: (N, k) their cosine similarities.
        clusters: (N,) cluster of k-means.
        cluster_names: Name of each cluster.
        outliers: (N,) distance from the distribution of all images, as `inbatch outliers` orders them.
    """

    places: Float[Tensor, "n 2"]
    neighbours: Int[Tensor, "n k"]
    similarities: Float[Tensor, "n k"]
    clusters: Int[Tensor, "n"]
    cluster_names: tuple[str, ...]
    outliers: Float[Tensor, "n"]


def gather_facts(collection: Collection, places: Tensor, *, k: int, clusters: int, index: str, seed: int) -> Facts:
    """Compute the facts about a collection.

    Args:
        collection: N images with features.
        places: (N, 2) their coordinates.
        k: Number of neighbours, at most N - 1.
        clusters: Number of clusters, at most N.
        index: How neighbours are searched, "exact" or "approximate".
        seed: Seed of k-means.
    """
    if k:
        similarities, neighbours = nearest_others(collection.vectors, k, index=index)
    else:
        similarities, neighbours = torch.empty(len(collection), 0), torch.empty(len(collection), 0, dtype=torch.long)
    assigned = _clusters(collection.vectors, clusters, seed)
    return Facts(
        places=places,
        neighbours=neighbours,
        similarities=similarities,
        clusters=assigned,
        cluster_names=_cluster_names(assigned, clusters, collection.labels, collection.classes),
        outliers=distribution_distance(collection.vectors),
    )


def common_neighbours(first: Int[Tensor, "n k"], second: Int[Tensor, "n k"]) -> Int[Tensor, "n"]:
    """Return how many neighbours of each image are the same in both, in any order."""
    common = torch.zeros(len(first), dtype=torch.long)
    for column in second.T:  # k is small: no (N, k, k) in memory
        common += (first == column[:, None]).any(1)
    return common


def _clusters(vectors: Tensor, count: int, seed: int) -> Int[Tensor, "n"]:
    rows = unit_rows(vectors)
    if len(rows) <= _CLUSTERED:
        return k_means(rows, count, 3, 100, seed)[1]
    sample = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:_CLUSTERED]
    centroids = k_means(rows[sample], count, 3, 100, seed)[0]
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in rows.split(1 << 15)])


def _cluster_names(
    assigned: Int[Tensor, "n"], count: int, labels: Int[Tensor, "n"], classes: Sequence[str]
) -> tuple[str, ...]:
    """Return "cluster 1 (62% dog)": the most frequent class is named if it has at least 30% of the labelled images."""
    names = []
    for cluster in range(count):
        known = labels[(assigned == cluster) & (labels >= 0)]
        counts = torch.bincount(known, minlength=1)
        share = float(counts.max()) / len(known) if len(known) else 0.0
        note = f" ({share:.0%} {classes[int(counts.argmax())]})" if share >= 0.3 else ""
        names.append(f"cluster {cluster + 1}{note}")
    return tuple(names)


def near_duplicates(sprite: Sprite, neighbours: Sequence[Int[Tensor, "n k"]]) -> Int[Tensor, "n"]:
    """Return the number of the group of near duplicates of each image from 1, 0 without one.

    Images with the same thumbnail, and the nearest neighbours whose thumbnails agree after an alignment, are near
    duplicates; of each group, all images are near duplicates of its first one.

    Args:
        sprite: What was drawn of the images.
        neighbours: Neighbours of each image, nearest first, by one or several sets of features.
    """
    readable = torch.tensor([digest is not None for digest in sprite.digests])
    own = torch.arange(len(readable))
    near = [
        torch.stack([own.repeat(k), indices.T[:k].flatten()], 1)
        for indices in neighbours
        if (k := min(_CANDIDATES, indices.shape[1]))
    ]
    pairs = torch.cat([torch.zeros(0, 2, dtype=torch.long), *near])
    pairs, _ = unique_pairs(pairs[readable[pairs].all(1)], torch.zeros(int(readable[pairs].all(1).sum())))
    pairs = pairs[compare(sprite.grey, pairs).check >= THRESHOLD]
    first: dict[bytes, int] = {}
    copies = [(first.setdefault(digest, i), i) for i, digest in enumerate(sprite.digests) if digest is not None]
    copies = [(one, other) for one, other in copies if one != other]
    pairs = torch.cat([pairs, torch.tensor(copies, dtype=torch.long).view(-1, 2)])
    chosen = representatives(len(readable), unique_pairs(pairs, torch.zeros(len(pairs)))[0], own)
    several = (chosen.bincount(minlength=len(own)) > 1).long()
    return (several.cumsum(0) * several)[chosen]
