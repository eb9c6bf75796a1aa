"""Clustering of the whole data set: k-means, concentrations, and prototypes stored between steps."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.errors import DataError, check_range
from inbatch.nn.batch_sums import whole
from inbatch.nn.functional import normalize
from inbatch.nn.logsumexp import check_temperature
from inbatch.rng import fold, uniform

Spread = Callable[[Callable[[int], Any], int], list[Any]]
"""spread(task, n) -> [task(0), ..., task(n - 1)], distributed over the ranks."""


def k_means(
    rows: Float[Tensor, "m d"], count: int, restarts: int, iterations: int, seed: int
) -> tuple[Float[Tensor, "k d"], Int[Tensor, "m"], Float[Tensor, "m"]]:
    """Return centroids, the cluster of each row and its Euclidean distance to the centroid, of the best restart.

    scikit-learn's k-means on one thread: several threads add their sums in no fixed order, so that the same rows would
    not always give the same clusters. It is initialised by k-means++ on a sample of ten times as many rows as clusters:
    on all rows, the initialisation takes longer than the iterations.

    Args:
        rows: rows to cluster.
        count: number of clusters.
        restarts: number of initialisations.
        iterations: maximum number of iterations per restart.
        seed: seed of the initialisations.

    Raises:
        ValueError: if there are more clusters than rows.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus
    from threadpoolctl import threadpool_limits

    if count > len(rows):
        raise ValueError(f"{count:,} clusters cannot be made of {len(rows):,} rows")

    def begin(x: Any, count: int, random_state: Any) -> Any:
        sample = x if len(x) <= 10 * count else x[random_state.permutation(len(x))[: 10 * count]]
        return kmeans_plusplus(sample, count, random_state=random_state)[0]

    means = KMeans(count, init=begin, n_init=restarts, max_iter=iterations, random_state=seed % 2**32)
    with threadpool_limits(1), ignore_missing_clusters():
        assignment = torch.from_numpy(means.fit_predict(rows.numpy())).long()
    centroids = torch.from_numpy(means.cluster_centers_)
    return centroids, assignment, torch.linalg.vector_norm(rows - centroids[assignment], dim=1)


def concentration(
    distance: Float[Tensor, "m"], assignment: Int[Tensor, "m"], count: int, temperature: float, alpha: float = 10.0
) -> Float[Tensor, "k"]:
    """Return phi of each cluster, the temperature of its prototype: small for dense clusters (Li et al. 2021, Eq. 12).

    phi = mean distance to the centroid / log(Z + alpha) for Z members, and the largest phi of all if Z < 2; clamped to
    the 10th and 90th percentile; scaled to the mean `temperature`. The minimum is a hundredth of that: clusters of
    identical rows have a phi of 0.

    Raises:
        ValueError: unless `temperature` is finite and above 0.
    """
    check_temperature(temperature)
    size = torch.bincount(assignment, minlength=count).to(distance.dtype)
    total = torch.zeros_like(size).index_add(0, assignment, distance)
    phi = torch.where(size > 1, total / size.clamp(min=1) / (size + alpha).log(), 0)
    phi = torch.where(size > 1, phi, phi.max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    share = phi / phi.mean() if phi.mean() > 0 else torch.ones_like(phi)
    return temperature * share.clamp(min=0.01)


@contextlib.contextmanager
def ignore_missing_clusters() -> Iterator[None]:
    """Silence scikit-learn's warning that rows have fewer different values than clusters; the results count them."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def compared(labels: Int[Tensor, "n"], clusters: Int[Tensor, "n"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
    """Return labels and clusters of the samples with a known label; noise (negative clusters) is -1.

    Raises:
        DataError: if no label is known.
    """
    known = labels >= 0
    if not known.any():
        raise DataError(f"none of {len(labels):,} labels is known (all are below 0): clusters need classes to compare.")
    return labels[known], clusters[known].clamp(min=-1)


def nmi(labels: Int[Tensor, "n"], clusters: Int[Tensor, "n"]) -> float:
    """Return the normalised mutual information in [0, 1], by the arithmetic mean of the two entropies.

    Samples with a negative (unknown) label are left out; those with a negative cluster (noise) form one cluster.
    """
    from sklearn.metrics import normalized_mutual_info_score

    labels, clusters = compared(labels, clusters)
    return float(normalized_mutual_info_score(labels.numpy(), clusters.numpy()))


class Clustering(nn.Module):
    """Prototypes of `count` clusters and the cluster of every image of the data set, saved in the checkpoint.

    Attributes:
        centroids: (count, dim), unit rows.
        density: (count,), temperature of each prototype.
        assignment: (images,), cluster of each image.
        made: 1 if there are clusters, 0 before.
    """

    centroids: Tensor
    density: Tensor
    assignment: Tensor
    made: Tensor

    def __init__(self, count: int, dim: int, images: int) -> None:
        super().__init__()
        if not 2 <= count <= images:
            raise ValueError(f"{count:,} clusters cannot be made of {images:,} images: choose 2 to {images:,}")
        self.register_buffer("centroids", torch.zeros(count, dim))
        self.register_buffer("density", torch.ones(count))
        self.register_buffer("assignment", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("made", torch.zeros(()))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        assignment, errors = state.get(f"{prefix}assignment"), rest[-1]
        if assignment is not None and not 0 <= int(assignment.min()) <= int(assignment.max()) < len(self.density):
            errors.append(f"{prefix}assignment is not a number of 0 to {len(self.density) - 1} for each image")
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def remember(
        self, centroids: Float[Tensor, "k d"], density: Float[Tensor, "k"], assignment: Int[Tensor, "m"]
    ) -> None:
        """Replace the clusters; m is the number of images that could be read."""
        self.centroids.copy_(centroids)
        self.density.copy_(density)
        self.assignment[: len(assignment)] = assignment.to(self.assignment.device)
        self.made.fill_(1)

    def columns(
        self, batch: Batch, most: int, key: int = 0
    ) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c"], Bool[Tensor, "c"]]:
        """Return the prototype of each sample, then negatives: prototypes, densities, and a mask of valid ones.

        Negatives are the prototypes that belong to no sample of the batch: all of them, or `most` of them, drawn for
        this batch independently of the order of its samples.
        """
        own, count, every = self.assignment[batch.index], len(self.density), whole(batch.index)
        taken = torch.zeros(count, dtype=torch.bool, device=own.device).index_fill(0, self.assignment[every], True)
        place = every.sum() * count + torch.arange(count, device=own.device)
        # Prototypes of samples are drawn last and masked.
        chance = uniform(batch.seed, batch.epoch, place, key, 1)[:, 0].masked_fill(taken, 2)
        others = chance.topk(min(most, count), largest=False).indices
        chosen, counts = torch.cat([own, others]), torch.cat([torch.ones_like(own, dtype=torch.bool), ~taken[others]])
        return self.centroids[chosen], self.density[chosen], counts


class Clusterings(nn.Module):
    """Clusterings of one data set into different numbers of clusters.

    Args:
        counts: number of clusters of each clustering.
        dim: width of the rows.
        negatives: maximum number of negatives, see `Clustering.columns`.
        temperature: see `concentration`.
        alpha: see `concentration`.
        restarts: see `k_means`.
        iterations: see `k_means`.
    """

    every: Any  # a ModuleList of Clustering

    def __init__(
        self,
        counts: Sequence[int],
        dim: int,
        negatives: int,
        temperature: float,
        alpha: float,
        restarts: int,
        iterations: int,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_range(1, clusterings=len(counts), restarts=restarts, iterations=iterations)
        check_range(0, negatives=negatives, alpha=alpha)
        self.counts, self.dim, self.negatives = tuple(counts), dim, negatives
        self.temperature, self.alpha, self.restarts, self.iterations = temperature, alpha, restarts, iterations
        self.every = nn.ModuleList()

    def allocate(self, images: int) -> None:
        """Allocate the clusterings for this number of images; ValueError if there are fewer images than clusters."""
        self.every = nn.ModuleList(Clustering(count, self.dim, images) for count in self.counts)

    @property
    def work(self) -> list[tuple[int, int, int]]:
        """Clusters, restarts and iterations of each k-means."""
        return [(count, self.restarts, self.iterations) for count in self.counts]

    def mean(self, loss: Callable[..., Tensor], batch: Batch) -> Float[Tensor, ""]:
        """Return loss(prototypes, densities, mask) averaged over the clusterings; 0 before there are clusters."""
        terms = [c.made * loss(*c.columns(batch, self.negatives, key)) for key, c in enumerate(self.every)]
        return torch.stack(terms).mean()

    def survey(
        self, rows: Float[Tensor, "m d"], label: Int[Tensor, "m"], epoch: int, spread: Spread
    ) -> dict[str, float]:
        """Compute and store new clusters, one task of `spread` per clustering; return their agreement with labels.

        "used_K": number of clusters with an image, if it is below K.
        """
        u = normalize(rows)

        def cluster(i: int) -> list[Any]:
            count = self.counts[i]
            centroids, assignment, distance = k_means(u, count, self.restarts, self.iterations, fold(epoch, i))
            density = concentration(distance, assignment, count, self.temperature, self.alpha)
            return [x.numpy() for x in (normalize(centroids), density, assignment)]  # sent between ranks

        figures, known = {}, label >= 0
        for clustering, arrays in zip(self.every, spread(cluster, len(self.counts)), strict=True):
            centroids, density, assignment = map(torch.from_numpy, arrays)
            clustering.remember(centroids, density, assignment)
            if known.any():
                figures[f"nmi_{len(density)}"] = nmi(label, assignment)
            if (used := len(assignment.unique())) < len(density):
                figures[f"used_{len(density)}"] = used
        return figures
