"""Outliers among features: distance from the distribution, from the nearest neighbours, and relative density.

Self-supervised features spread photographs over the sphere and map pictures of little content close together. Noise, a
blurred copy or a black image therefore has near neighbours: distances to neighbours rank it last. It is far from the
distribution in the leading principal components, by which scores are ordered unless another one is requested.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.evaluation.neighbours import nearest_others, unit_rows
from inbatch.runtime.isolation import usual_numerics

COMPONENTS = 32
"""Number of principal components; the documentation has the measurement."""

_ROWS = 1 << 14  # rows in memory at a time


@dataclass(frozen=True)
class OutlierScores:
    """Three scores per row, larger for outliers.

    Attributes:
        distribution: (N,) Mahalanobis distance of unit rows in their first `COMPONENTS` principal components, relative
            to its root mean square.
        distance: (N,) mean Euclidean distance of unit rows to their k nearest others, 0 to 2.
        density: (N,) local outlier factor (Breunig et al. 2000): mean density of the neighbours relative to that of the
            row; near 1 inside a cluster.
    """

    distribution: Float[Tensor, "n"]
    distance: Float[Tensor, "n"]
    density: Float[Tensor, "n"]


def outlier_scores(vectors: Float[Tensor, "n f"], k: int, index: str = "exact") -> OutlierScores:
    """Return the outlier scores of features.

    Args:
        vectors: Features, for example memory-mapped.
        k: Number of neighbours, 1 to N - 1.
        index: As in `neighbours.nearest_others`.

    Raises:
        ConfigError: If k is not in 1 to N - 1, for another index, or if its library is not installed.
        DataError: If a value is not finite.
    """
    similarity, place = nearest_others(vectors, k, index=index)
    distance = (2 - 2 * similarity.double()).clamp_(min=0).sqrt_()
    return OutlierScores(
        distribution_distance(vectors), distance.mean(1).float(), _local_outlier_factor(distance, place)
    )


@usual_numerics()
@torch.no_grad()
def distribution_distance(vectors: Float[Tensor, "n f"], components: int = COMPONENTS) -> Float[Tensor, "n"]:
    """Return the Mahalanobis distance of unit rows in their leading principal components; mean of its square is 1.

    Args:
        vectors: Features, for example memory-mapped.
        components: Number of components, at most half as many as rows and all of the features' dimensions.

    Raises:
        DataError: If a value is not finite.
    """
    rows, width = len(vectors), vectors.shape[1]
    mean, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in vectors.split(_ROWS):
        mean += unit_rows(part).sum(0, dtype=torch.float64) / rows
    for part in vectors.split(_ROWS):
        centred = (unit_rows(part) - mean).float()  # before the products: features of similar direction cancel
        squares += (centred.T @ centred).double()
    variance, axes = torch.linalg.eigh(squares / rows)
    count = max(1, min(components, rows // 2, width))
    variance, axes = variance[-count:].clamp(min=0), axes[:, -count:]
    scale = torch.where(variance > 1e-12, variance, torch.inf).rsqrt().float()  # identical rows have no axis
    distances = [
        ((unit_rows(part) - mean).float() @ axes.float() * scale).square().mean(1).sqrt()
        for part in vectors.split(_ROWS)
    ]
    return torch.cat(distances)


def _local_outlier_factor(distance: Float[Tensor, "n k"], place: Int[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """Return the factor of scikit-learn, which takes known neighbours as a sparse graph that includes the rows."""
    import numpy as np
    from scipy.sparse import csr_array
    from sklearn.neighbors import LocalOutlierFactor

    count, k = distance.shape
    values = torch.cat([torch.zeros(count, 1, dtype=distance.dtype), distance], 1)
    columns = torch.cat([torch.arange(count)[:, None], place], 1)
    starts = np.arange(0, count * (k + 1) + 1, k + 1)
    graph = csr_array((values.flatten().numpy(), columns.flatten().numpy(), starts), shape=(count, count))
    factor = LocalOutlierFactor(n_neighbors=k, metric="precomputed").fit(graph)
    return torch.from_numpy(-factor.negative_outlier_factor_).float()
