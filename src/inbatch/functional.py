"""Equations that two or more methods share. Pure functions of tensors, in the precision they are given.

The log-sum-exps stand here so that a method's file never decides how they are computed.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["logsumexp_others", "logsumexp_rows", "normalize"]


def logsumexp_others(u: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, "n"]:
    """log sum_{k != i} exp(u_i . u_k / T) for every row i: the denominator of in-batch contrast."""
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    return (u @ u.T / temperature).masked_fill(itself, -torch.inf).logsumexp(1)


def logsumexp_rows(q: Float[Tensor, "n d"], keys: Float[Tensor, "k d"], temperature: float) -> Float[Tensor, "n"]:
    """log sum_k exp(q_i . k / T) for every row i, over all keys."""
    return (q @ keys.T / temperature).logsumexp(1)
