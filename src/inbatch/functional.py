"""Equations that two or more methods share. Pure functions of tensors of any floating type, computed in float32 or
wider, inside autocast too.

The log-sum-exps stand here so that a method's file never decides how they are computed.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Rows of length 1. One shorter than 1e-12 stays as it is, so that its gradient does not grow by 1e12."""
    x = wide(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length < 1e-12, 1)


def product(a: Float[Tensor, "n m"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
    """The matrix product; autocast does not make it a half-precision one."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def logsumexp_others(u: Float[Tensor, "n d"], temperature: float) -> Float[Tensor, "n"]:
    """log sum_{k != i} exp(u_i . u_k / T) for every row i: the denominator of in-batch contrast."""
    itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
    return (product(u, u.T) / temperature).masked_fill(itself, -torch.inf).logsumexp(1)


def logsumexp_rows(q: Float[Tensor, "n d"], keys: Float[Tensor, "k d"], temperature: float) -> Float[Tensor, "n"]:
    """log sum_k exp(q_i . k / T) for every row i, over all keys."""
    return (product(q, keys.T) / temperature).logsumexp(1)
