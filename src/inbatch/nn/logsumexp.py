"""Log-sum-exps of products of rows, and their gradients, without materialising the matrix of products ("tiled").

Each tile of S = q k^T / T is computed, exponentiated, summed and discarded; the backward pass computes the tiles again,
except, on a CPU, the first 64 MB of them. Memory is O((N + M) D), not O(N M). If q and k are the same rows, S is
symmetric and half of the tiles suffice. GPUs use the Triton kernels (`triton_logsumexp`), other devices products of
PyTorch on tiles that fit into the processor's cache.

Ranks and cores share the tiles (`tiles`).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from inbatch.nn import triton_logsumexp
from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.pair_weights import PairWeights, SameGroup, multiplier
from inbatch.nn.tiles import (
    PLAN,
    LogSumExpConfig,
    MatmulPrecision,
    Mode,
    Tiles,
    add_product,
    diagonal,
    rounded,
    share,
    shared_by,
    using,
    zeros,
)  # fmt: skip

__all__ = [
    "LogSumExpConfig", "MatmulPrecision", "Mode", "PairWeights", "SameGroup", "check_temperature", "logsumexp",
    "nearest", "shared_by", "using",
]  # fmt: skip

LEAST = 2**17
"""Matrices with fewer pairs (362 by 362) are materialised: half a megabyte, and faster than tiles."""
KEPT = 2**24
"""Numbers of tiles that are kept from the forward to the backward pass on a CPU: 64 MB in float32."""
_BLOCK = 2**22
"""Pairs in memory at once if neither tiles nor a whole matrix can be used."""
_REACH = {torch.float32: 60.0, torch.float64: 600.0}
"""Largest absolute logit of which the exponential, and sums of billions of them, are still finite and not 0."""


def check_temperature(*temperatures: float) -> None:
    """Raise ValueError unless each is a finite number above 0: at 0 a loss is nan, below 0 its sign is reversed."""
    for temperature in temperatures:
        if not 0 < temperature < math.inf:
            raise ValueError(f"a temperature of {temperature:g} divides no similarity: it must be finite and above 0")


def logsumexp(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], temperature: float, exclude_self: bool = False,
    weights: PairWeights | None = None,
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

    Raises:
        ValueError: unless T is a finite number above 0, and the weights are those of as many rows.
    """
    check_temperature(temperature)
    if isinstance(weights, SameGroup):
        weights.check_rows(len(q), len(k))
    plan, scale = PLAN.get(), 1 / temperature
    if plan.mode == "never" or (plan.mode == "auto" and len(q) * len(k) < LEAST):
        return _whole(q, k, scale, exclude_self, weights)
    if _on_kernels(q, k, weights) or reach(q, k) <= temperature * _REACH.get(q.dtype, 0):
        symmetric = k is q and (weights is None or (isinstance(weights, SameGroup) and weights.symmetric))
        return _Tiled.apply(q, None if symmetric else k, scale, exclude_self, weights, plan)
    # Logits too large for exponentials without a running maximum, which would double the cost of a tile.
    size = max(1, _BLOCK // max(1, len(k)))
    parts = [checkpoint(_whole, some, k, scale, exclude_self, weights, i * size, use_reentrant=False)
             for i, some in enumerate(q.split(size))]  # fmt: skip
    return torch.cat(parts)


def nearest(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], leave_out: Bool[Tensor, "m"] | None = None, count: int = 1
) -> Int[Tensor, "n count"]:
    """Return the indices of the rows of k (except `leave_out`) with the largest products with each row of q."""

    def best(some: Tensor) -> Tensor:
        products = some @ k.T
        products = products if leave_out is None else products.masked_fill_(leave_out, -torch.inf)
        return products.argmax(1, keepdim=True) if count == 1 else products.topk(count).indices

    plan, place = PLAN.get(), torch.zeros(len(q), count, dtype=torch.long, device=q.device)
    start, stop = share(len(q), plan)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False), fast_products():
        for first in range(start, stop, size := max(1, _BLOCK // len(k))):
            place[first : min(first + size, stop)] = best(q[first : min(first + size, stop)])
    plan.add(place)
    return place


def _on_kernels(q: Tensor, k: Tensor, weights: PairWeights | None) -> bool:
    """Return whether the Triton kernels compute this log-sum-exp; they know no weights."""
    return weights is None and triton_logsumexp.usable(q, k)


def _whole(
    q: Tensor, k: Tensor, scale: float, exclude_self: bool, weights: PairWeights | None, first: int = 0
) -> Tensor:
    """Compute it from the materialised matrix; q holds rows first, first + 1, ... of all queries."""
    with torch.autocast(q.device.type, enabled=False):
        logits = (q @ k.T) * scale
    if exclude_self:
        itself = torch.arange(first, first + len(q), device=q.device)[:, None] == torch.arange(len(k), device=q.device)
        logits = logits.masked_fill(itself, -torch.inf)
    if weights is not None:
        w = weights.tile(slice(first, first + len(q)), slice(0, len(k))).detach().to(logits.dtype)
        logits = (logits + w.masked_fill(w == 0, 1).log()).masked_fill(w == 0, -torch.inf)
    return logits.logsumexp(1)


def reach(q: Tensor, k: Tensor) -> float:
    """Return an upper bound of the products of a row of q and a row of k."""
    if not (len(q) and len(k)):
        return 0.0
    longest = [torch.linalg.vector_norm(x.detach(), dim=1).max() for x in ([q] if k is q else [q, k])]
    return float(longest[0] * longest[-1])


class _Tiled(torch.autograd.Function):
    """Autograd function of `logsumexp`; k is None if it is q."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> Tensor:  # fmt: skip
        # If the keys need no gradient, the backward pass only needs their mean weighted by each query's softmax.
        weighs = ctx.needs_input_grad[0] and k is not None and not ctx.needs_input_grad[1]
        ctx.kernels = _on_kernels(q, q if k is None else k, weights)
        with torch.autocast(q.device.type, enabled=False):
            if ctx.kernels:
                lse, mean = _kernel_sums(q, k, scale, exclude_self, weighs, plan)
            else:
                tiles = _Exponentials(q, k, scale, exclude_self, weights, plan)
                tiles.keeps = any(ctx.needs_input_grad[:2]) and not weighs
                lse, mean = _sums(tiles, weighs)
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
                both = _kernel_gradients(q, k, lse, gradient, ctx.scale, ctx.exclude_self, needs, ctx.plan)
            else:
                tiles = _Exponentials(q, k, ctx.scale, ctx.exclude_self, ctx.weights, ctx.plan)
                tiles.kept = ctx.kept
                both = _gradients(tiles, lse, gradient, needs)
        return *both, None, None, None, None


Found = tuple[Tensor, Tensor | None]


class _Exponentials(Tiles):
    """Tiles of w exp(S), 0 for pairs that are left out.

    Attributes:
        keeps: on a CPU, keep the first tiles, up to `KEPT` numbers, so that the backward pass need not compute them.
    """

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> None:  # fmt: skip
        super().__init__(q, k, scale, plan)
        self.exclude_self, self.weigh = exclude_self, weights and multiplier(weights, q.dtype)
        self.keeps = False

    def __call__(self, part: int) -> Iterator[tuple[slice, slice, Tensor]]:
        spare, room = self.buffer() if self.weigh else None, KEPT // self.parts if self.keeps else 0
        for rows, columns, e in super().__call__(part):
            place = rows.start, columns.start
            if self.kept.pop(place, None) is None:  # a kept tile may be changed by the pass that gets it
                e.exp2_()
                if self.exclude_self:
                    diagonal(e, rows, columns).zero_()
                if self.weigh and spare is not None:
                    self.weigh(e, rows, columns, self.view(spare, rows, columns))
                if self.q.device.type == "cpu" and (room := room - e.numel()) >= 0:
                    self.kept[place] = e.clone()
            yield rows, columns, e


def _sums(tiles: _Exponentials, weighs: bool) -> Found:
    """Return the log-sum-exps (n) and, if requested, the rows of k averaged with each query's weights (n, D)."""
    q, k, plan = tiles.q, tiles.k, tiles.plan

    def work(part: int) -> Found:
        sums, mean = q.new_zeros(len(q)), zeros(q) if weighs else None
        for rows, columns, e in tiles(part):
            sums[rows].add_(e.sum(1))
            if tiles.symmetric and rows != columns:
                sums[columns].add_(e.sum(0))
            if mean is not None:
                mean[rows].addmm_(e, k[columns])
        return sums, mean

    sums, mean = tiles.spread(work)
    assert sums is not None
    plan.add(sums)
    if mean is not None:
        plan.add(mean)
        mean /= sums.masked_fill(sums == 0, 1)[:, None]
    return sums.log_(), mean


def _gradients(
    tiles: _Exponentials, lse: Tensor, gradient: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dq_i = sum_j W_ij k_j / T, dk_j = sum_i W_ij q_i / T; if k = q, their sum.

    W_ij = g_i w_ij exp(S_ij - lse_i), and 0 if row i has no pair of positive weight.
    """
    q, k, scale, plan, symmetric = tiles.q, tiles.k, tiles.scale, tiles.plan, tiles.symmetric
    if not len(q):
        return (zeros(q) if needs[0] else None), (zeros(k) if needs[1] and not symmetric else None)
    top = gradient.abs().max().clamp(min=torch.finfo(q.dtype).tiny)  # prevents underflow of small gradients
    weight = (gradient / top) * (-lse).exp().masked_fill(lse == -torch.inf, 0)
    left, right = rounded(q if symmetric else weight[:, None] * q, plan), rounded(k, plan)

    def work(part: int) -> tuple[Tensor | None, Tensor | None]:
        dq = zeros(q) if needs[0] else None
        dk = zeros(k) if not symmetric and needs[1] else None
        both = tiles.buffer() if symmetric else None
        for rows, columns, e in tiles(part):
            if both is not None:
                e *= torch.add(weight[rows, None], weight[columns], out=tiles.view(both, rows, columns))
            if dq is not None:
                add_product(dq[rows], e, right[columns])
                if symmetric and rows != columns:
                    add_product(dq[columns], e.T, left[rows])
            if dk is not None:
                add_product(dk[columns], e.T, left[rows])
        return dq, dk

    dq, dk = tiles.spread(work)
    if dq is not None:
        plan.add(dq)
        dq *= scale * top if symmetric else (scale * top * weight)[:, None]
    if dk is not None:
        plan.add(dk)
        dk *= scale * top
    return dq, dk


def _kernel_sums(
    q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weighs: bool, plan: LogSumExpConfig
) -> Found:
    """Compute `_sums` with the Triton kernels; each rank computes its share of the rows."""
    start, stop = share(len(q), plan)
    lse, mean = q.new_zeros(len(q)), zeros(q) if weighs else None
    keys = q if k is None else k
    lse[start:stop], some = triton_logsumexp.forward(q, keys, scale, exclude_self, start, stop, weighs, plan.products)
    plan.add(lse)
    if mean is not None and some is not None:
        mean[start:stop] = some
        plan.add(mean)
    return lse, mean


def _kernel_gradients(
    q: Tensor, k: Tensor | None, lse: Tensor, gradient: Tensor, scale: float, exclude_self: bool,
    needs: tuple[bool, bool], plan: LogSumExpConfig,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute `_gradients` with the Triton kernels."""
    its, none, keys = (lse, gradient), (None, None), q if k is None else k

    def whole(a: Tensor, b: Tensor, own: tuple[Any, Any], other: tuple[Any, Any]) -> Tensor:
        start, stop = share(len(a), plan)
        out = zeros(a)
        out[start:stop] = triton_logsumexp.backward(
            a, b, scale, exclude_self, start, stop, *own, *other, products=plan.products
        )
        plan.add(out)
        return out

    dq = whole(q, keys, its, its if k is None else none) if needs[0] else None
    return dq, whole(keys, q, none, its) if k is not None and needs[1] else None
