"""Measures of features that need no labels: collapse, effective rank, decay of the spectrum, and normality."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import DataError
from inbatch.nn.slicing import random_directions, sigreg

FIT = (10, 100)
"""First index (from 0) and end of the eigenvalues to which `alpha_req` fits a power law, as in the authors' package."""


def feature_std(rows: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the mean standard deviation per dimension of the L2-normalised rows, times sqrt(D).

    About 1 for rows spread over the sphere, 0 if all are equal (Chen and He 2021, section 4.1).
    """
    return F.normalize(rows.float()).std(0, correction=0).mean() * rows.shape[1] ** 0.5


def rankme(rows: Float[Tensor, "n d"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """Return the effective rank, 1 to min(N, D): exp of the singular values' entropy (Garrido et al. 2023, eq. 1).

    1 if all rows are zero, nan if one is not finite.
    """
    rows = rows.float()
    if not rows.isfinite().all():
        return rows.new_tensor(torch.nan)  # LAPACK would raise an error
    values = torch.linalg.svdvals(rows)
    p = values / values.sum().clamp(min=torch.finfo(rows.dtype).tiny) + eps
    return (-(p * p.log()).sum()).exp()


@torch.no_grad()
def lidar(views: Float[Tensor, "n q d"], delta: float = 1e-4, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Return LiDAR, 1 to D: the effective rank of the LDA matrix whose classes are the images (Thilak et al. 2023).

    With m_i the mean of the q views of image i, and m the mean of all m_i,

        S_b = sum_i (m_i - m)(m_i - m)^T / (n - 1)
        S_w = sum_iv (z_iv - m_i)(z_iv - m_i)^T / (n (q - 1)) + delta I
        LiDAR = exp(-sum_k p_k log p_k),  p = (lambda + eps) / sum(lambda + eps),

    where lambda are the D eigenvalues of S_w^-1/2 S_b S_w^-1/2, at most n - 1 of them not 0. The paper has n = 1000,
    q = 50 and delta = 1e-4. The value depends on n, on q (a mean of q views has a q-th of the variance of one view)
    and, because of delta, on the scale of the features.

    Args:
        views: Features of q views of each of n images, in any precision; computed in float64 on their device.
        delta: Variance that is added to that within an image.
        eps: Constant added to every eigenvalue.

    Returns:
        A float64 scalar. 1 if the features are constant, nan if one is not finite.

    Raises:
        DataError: If there are fewer than two images or two views.
    """
    n, q, width = views.shape
    if n < 2 or q < 2:
        raise DataError(f"LiDAR needs at least 2 views of 2 images, not {q} of {n}: pass features (n, q, D)")
    if not views.isfinite().all():
        return views.new_tensor(torch.nan, dtype=torch.float64)
    views = views.double()
    means = views.mean(1)
    between = (means - means.mean(0)) / (n - 1) ** 0.5
    inside = (views - means[:, None]).flatten(0, 1) / (n * (q - 1)) ** 0.5
    within = inside.T @ inside
    within.diagonal().add_(delta)
    # The eigenvalues of the matrix are the squared singular values of L^-1 between^T, with S_w = L L^T.
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)
    gram = half.T @ half if n < width else half @ half.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    total = values.sum()
    if total <= width * eps:  # eps alone would determine the value, which would be D
        return total.new_tensor(1.0)
    p = F.pad(values, (0, width - len(values))).add(eps) / (total + width * eps)
    return (-(p * p.log()).sum()).exp()


@torch.no_grad()
def alpha_req(rows: Float[Tensor, "n d"], fit: tuple[int, int] = FIT) -> Float[Tensor, ""]:
    """Return alpha of alpha-ReQ: the exponent of the decay of the spectrum, k^-alpha (Agrawal et al. 2022).

    The eigenvalues lambda_k (k = 1, 2, ...) of the covariance of the rows are fitted by log lambda_k = b - alpha log k,
    by least squares with weights 1 / k. The authors' package fits k = 11 to 100, and so does this function, as far as
    there are eigenvalues that are not 0: their number is at most min(N - 1, D). About 1 is favourable according to the
    paper; the value does not depend on the scale of the features.

    Args:
        rows: Features, in any precision; computed in float64 on their device.
        fit: First index, from 0, and end of the eigenvalues to fit.

    Returns:
        A float64 scalar. nan if fewer than two eigenvalues remain (a narrow encoder, few rows, constant features) or if
        a feature is not finite.
    """
    if not rows.isfinite().all() or len(rows) < 2:
        return rows.new_tensor(torch.nan, dtype=torch.float64)
    precision, size = torch.finfo(rows.dtype if rows.dtype == torch.float64 else torch.float32).eps, max(rows.shape)
    rows = rows.double()
    rows = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T).flip(0)
    # Smaller eigenvalues are rounding errors, of the features or of this product.
    least = values[0] * size * max(size * precision**2, torch.finfo(values.dtype).eps)
    values = values[values > least]
    first, end = fit[0], min(fit[1], len(values))
    if end - first < 2:
        return values.new_tensor(torch.nan)
    k = torch.arange(first + 1, end + 1, dtype=values.dtype, device=values.device)
    x, y, weight = k.log(), values[first:end].log(), 1 / k / (1 / k).sum()
    x = x - (weight * x).sum()
    return -(weight * x * y).sum() / (weight * x * x).sum()


@torch.no_grad()
def sigreg_distance(rows: Float[Tensor, "n d"], slices: int = 256) -> Float[Tensor, ""]:
    """Return how far features are from an isotropic normal distribution: the statistic of SIGReg, divided by N.

    The features are centred and divided by the root of their mean variance, so that their position, their scale and a
    rotation have no effect (the rotation up to the choice of directions). The statistic is that of
    `inbatch.nn.slicing.sigreg` along directions that are the same on every call. 0 for an isotropic normal distribution
    (1.05 / N on average for a sample of it), 0.40 for constant features, at most 1.45.

    Args:
        rows: Features, in any precision; computed in float64 on their device.
        slices: Number of directions.

    Returns:
        A float64 scalar. nan if a feature is not finite.
    """
    if not rows.isfinite().all() or not rows.numel():
        return rows.new_tensor(torch.nan, dtype=torch.float64)
    constant = (rows == rows[:1]).all()  # the mean of equal numbers differs from them by rounding
    rows = rows.double()
    rows = rows - rows.mean(0)
    size = rows.square().mean().sqrt().masked_fill(constant, torch.inf)
    return sigreg((rows / size)[None], random_directions(rows.shape[1], slices, device=rows.device), scale="one")
