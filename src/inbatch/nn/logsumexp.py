"""Log-sum-exps of products of rows, and their gradients, without materialising the matrix of products ("tiled").

Each tile of S = q k^T / T is computed, exponentiated, summed and discarded; the backward pass computes the tiles again,
except, on a CPU, the first 64 MB of them. Memory is O((N + M) D), not O(N M). If q and k are the same rows, S is
symmetric and half of the tiles suffice. GPUs use the Triton kernels (`triton_logsumexp`), other devices products of
PyTorch on tiles that fit into the processor's cache.

Ranks and cores share the tiles (`tiles`), or ranks hold different rows and pass them on (`passing`).
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from inbatch.nn import exponentials
from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.exponentials import (
    REACH,
    Exponentials,
    gradients,
    kernel_gradients,
    kernel_sums,
    logits,
    on_kernels,
    reach,
    sums,
)  # fmt: skip
from inbatch.nn.pair_weights import PairWeights, SameGroup
from inbatch.nn.passing import Passing
from inbatch.nn.tiles import PLAN, LogSumExpConfig, MatmulPrecision, Mode, share, shared_by, using

__all__ = [
    "LogSumExpConfig", "MatmulPrecision", "Mode", "PairWeights", "SameGroup", "check_temperature", "logsumexp",
    "nearest", "shared_by", "using",
]  # fmt: skip

LEAST = 2**17
"""Matrices with fewer pairs (362 by 362) are materialised: half a megabyte, and faster than tiles."""
_BLOCK = 2**22
"""Pairs in memory at once if neither tiles nor a whole matrix can be used."""


def check_temperature(*temperatures: float) -> None:
    """Raise ValueError unless each is a finite number above 0: at 0 a loss is nan, below 0 its sign is reversed."""
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"a temperature of {temperature:g} divides no similarity: it must be finite and above 0")


def logsumexp(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], temperature: float, exclude_self: bool = False,
    weights: PairWeights | None = None, shared: bool = False,
) -> Float[Tensor, "n"]:  # fmt: skip
    """Return log sum_j w_ij exp(q_i . k_j / T) for every row i, over all rows j of k.

    Rows may have any length; if k is q (and the weights are symmetric), only half of the tiles are computed. A row of
    which every pair has weight 0 returns -inf, and gives no gradient to any row.

    Args:
        q: queries.
        k: keys.
        temperature: T.
        exclude_self: leave out j = i (k may have more rows than q).
        weights: w_ij, a function of the indices without gradient; None is 1 for all pairs.
        shared: k is the same on every rank, such as a memory bank, and not rows of the batch. It makes a difference
            only if each rank holds its own rows of the batch (`nn.batch_sums`), where the sum is over those of all.

    Raises:
        ValueError: unless T is a finite number above 0, and the weights are those of as many rows.
    """
    check_temperature(temperature)
    if isinstance(weights, SameGroup):
        weights.check_rows(len(q), len(k))
    plan, scale = PLAN.get(), 1 / temperature
    symmetric = k is q and (weights is None or (isinstance(weights, SameGroup) and weights.symmetric))
    if plan.peers is not None and not shared:
        return Passing.apply(q, None if symmetric else k, scale, exclude_self, weights, plan)
    if plan.mode == "never" or (plan.mode == "auto" and len(q) * len(k) < LEAST):
        return _whole(q, k, scale, exclude_self, weights)
    if on_kernels(q, k, weights) or reach(q, k) <= temperature * REACH.get(q.dtype, 0):
        return _Tiled.apply(q, None if symmetric else k, scale, exclude_self, weights, plan)
    # Logits too large for exponentials without a running maximum, which would double the cost of a tile.
    size = max(1, _BLOCK // max(1, len(k)))
    parts = [checkpoint(_whole, block, k, scale, exclude_self, weights, i * size, use_reentrant=False)
             for i, block in enumerate(q.split(size))]  # fmt: skip
    return torch.cat(parts)


def nearest(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], leave_out: Bool[Tensor, "m"] | None = None, count: int = 1
) -> Int[Tensor, "n count"]:
    """Return the indices of the rows of k (except `leave_out`) with the largest products with each row of q."""

    def best(rows: Tensor) -> Tensor:
        products = rows @ k.T
        products = products if leave_out is None else products.masked_fill_(leave_out, -torch.inf)
        return products.argmax(1, keepdim=True) if count == 1 else products.topk(count).indices

    plan, place = PLAN.get(), torch.zeros(len(q), count, dtype=torch.long, device=q.device)
    start, stop = share(len(q), plan)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), fast_products():
        for first in range(start, stop, size := max(1, _BLOCK // len(k))):
            place[first : min(first + size, stop)] = best(q[first : min(first + size, stop)])
    plan.add(place)
    return place


def _whole(
    q: Tensor, k: Tensor, scale: float, exclude_self: bool, weights: PairWeights | None, first: int = 0
) -> Tensor:
    """Compute it from the materialised matrix; q holds rows first, first + 1, ... of all queries."""
    return logits(q, k, scale, exclude_self, weights, first).logsumexp(1)


class _Tiled(torch.autograd.Function):
    """Autograd function of `logsumexp`; k is None if it is q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> Tensor:  # fmt: skip
        # If the keys need no gradient, the backward pass only needs their mean weighted by each query's softmax.
        weighs = ctx.needs_input_grad[0] and k is not None and not ctx.needs_input_grad[1]
        ctx.kernels = on_kernels(q, q if k is None else k, weights)
        with torch.autocast(q.device.type, enabled=False):
            if ctx.kernels:
                lse, mean = kernel_sums(q, k, scale, exclude_self, weights, weighs, plan)
            else:
                tiles = Exponentials(q, k, scale, exclude_self, weights, plan)
                tiles.keeps = exponentials.KEPT if any(ctx.needs_input_grad[:2]) and not weighs else 0
                lse, mean = sums(tiles, weighs)
                ctx.kept = tiles.kept
        ctx.save_for_backward(q, k, lse, mean)
        ctx.scale, ctx.exclude_self, ctx.weights, ctx.plan = scale, exclude_self, weights, plan
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, mean = ctx.saved_tensors
        if mean is not None:
            return (ctx.scale * gradient)[:, None] * mean, None, None, None, None, None
        needs = ctx.needs_input_grad[:2]
        with torch.autocast(q.device.type, enabled=False):
            if ctx.kernels:
                pairs = ctx.scale, ctx.exclude_self, ctx.weights
                both = kernel_gradients(q, k, lse, gradient, *pairs, needs, ctx.plan)
            else:
                tiles = Exponentials(q, k, ctx.scale, ctx.exclude_self, ctx.weights, ctx.plan)
                tiles.kept = ctx.kept
                both = gradients(tiles, lse, gradient, needs)
        return *both, None, None, None, None
