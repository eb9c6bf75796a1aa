"""Facts about images, from one set of features: map, neighbours, clusters, outlier scores, near duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.evaluation.neighbours import nearest_others, unit_rows
from inbatch.nn.clustering import k_means

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
        outliers: (N,) mean cosine distance to the k neighbours; zeros for one image.
        groups: (N,) number of the group of near duplicates from 1, 0 without one.
    """

    places: Float[Tensor, "n 2"]
    neighbours: Int[Tensor, "n k"]
    similarities: Float[Tensor, "n k"]
    clusters: Int[Tensor, "n"]
    cluster_names: tuple[str, ...]
    outliers: Float[Tensor, "n"]
    groups: Int[Tensor, "n"]


def gather_facts(
    collection: Collection, places: Tensor, *, k: int, clusters: int, threshold: float, seed: int
) -> Facts:
    """Compute the facts about a collection.

    Args:
        collection: N images with features.
        places: (N, 2) their coordinates.
        k: Number of neighbours, at most N - 1.
        clusters: Number of clusters, at most N.
        threshold: Cosine similarity from which two images are near duplicates.
        seed: Seed of k-means.
    """
    if k:
        similarities, neighbours = nearest_others(collection.vectors, k)
    else:
        similarities, neighbours = torch.empty(len(collection), 0), torch.empty(len(collection), 0, dtype=torch.long)
    assigned = _clusters(collection.vectors, clusters, seed)
    return Facts(
        places=places,
        neighbours=neighbours,
        similarities=similarities,
        clusters=assigned,
        cluster_names=_cluster_names(assigned, clusters, collection.labels, collection.classes),
        outliers=1 - similarities.mean(1) if k else torch.zeros(len(collection)),
        groups=_groups(neighbours, similarities >= threshold),
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


def _groups(neighbours: Int[Tensor, "n k"], same: Tensor) -> Int[Tensor, "n"]:
    """Return the connected components of the pairs that are near duplicates, numbered from 1 by their first image."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, rank = same.nonzero(as_tuple=True)
    pairs = (np.ones(len(first), bool), (first.numpy(), neighbours[first, rank].numpy()))
    _, component = connected_components(coo_array(pairs, shape=(len(neighbours),) * 2), directed=False)
    members = np.bincount(component)
    numbers = np.zeros(len(members), np.int64)
    several = dict.fromkeys(component[members[component] > 1].tolist())
    numbers[list(several)] = np.arange(1, len(several) + 1)
    return torch.from_numpy(numbers[component])
