"""Metrics of collapse in a batch of features."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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
