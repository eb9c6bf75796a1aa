"""Sums of exponentials of products of rows, and their gradients, tile by tile or by the Triton kernels."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from inbatch.nn import triton_logsumexp
from inbatch.nn.pair_weights import PairWeights, SameGroup, multiplier
from inbatch.nn.tiles import LogSumExpConfig, Tiles, add_product, diagonal, rounded, share, zeros

KEPT = 2**24
"""Numbers of tiles that are kept from the forward to the backward pass on a CPU: 64 MB in float32."""

REACH = {torch.float32: 60.0, torch.float64: 600.0}
"""Largest absolute logit of which the exponential, and sums of billions of them, are still finite and not 0."""

Found = tuple[Tensor, Tensor | None]


def on_kernels(q: Tensor, k: Tensor, weights: PairWeights | None) -> bool:
    """Return whether the Triton kernels compute these sums: with the weights of `SameGroup` or without weights.

    Other weights are functions in Python, which no kernel can call: torch's products compute those sums in tiles.
    """
    return (weights is None or isinstance(weights, SameGroup)) and triton_logsumexp.usable(q, k)


def kernel_weights(weights: PairWeights | None) -> SameGroup | None:
    """Return weights that the kernels compute."""
    assert weights is None or isinstance(weights, SameGroup)
    return weights


def reach(q: Tensor, k: Tensor) -> float:
    """Return an upper bound of the products of a row of q and a row of k."""
    if not (len(q) and len(k)):
        return 0.0
    longest = [torch.linalg.vector_norm(x.detach(), dim=1).max() for x in ([q] if k is q else [q, k])]
    return float(longest[0] * longest[-1])


def logits(
    q: Tensor, k: Tensor, scale: float, exclude_self: bool, weights: PairWeights | None, first: int = 0
) -> Tensor:
    """Return the matrix S + log w, -inf for pairs that are left out; q holds rows first, first + 1, ... of all."""
    with torch.autocast(q.device.type, enabled=False):
        values = (q @ k.T) * scale
    if exclude_self:
        itself = torch.arange(first, first + len(q), device=q.device)[:, None] == torch.arange(len(k), device=q.device)
        values = values.masked_fill(itself, -torch.inf)
    if weights is not None:
        w = weights.tile(slice(first, first + len(q)), slice(0, len(k))).detach().to(values.dtype)
        values = (values + w.masked_fill(w == 0, 1).log()).masked_fill(w == 0, -torch.inf)
    return values


class Exponentials(Tiles):
    """Tiles of w exp(S), 0 for pairs that are left out.

    Attributes:
        keeps: numbers of the first tiles that are kept on a CPU, so that the backward pass need not compute them.
    """

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> None:  # fmt: skip
        super().__init__(q, k, scale, plan)
        self.exclude_self, self.weigh = exclude_self, weights and multiplier(weights, q.dtype)
        self.keeps = 0

    def __call__(self, part: int) -> Iterator[tuple[slice, slice, Tensor]]:
        spare, room = self.buffer() if self.weigh else None, self.keeps // self.parts
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


def sums(tiles: Exponentials, weighs: bool) -> Found:
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

    sums, mean = tiles.sum_parts(work)
    assert sums is not None
    plan.add(sums)
    if mean is not None:
        plan.add(mean)
        mean /= sums.masked_fill(sums == 0, 1)[:, None]
    return sums.log_(), mean


def both_sums(tiles: Exponentials) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps of queries (n) and of keys (m), which are other rows."""
    q, k = tiles.q, tiles.k

    def work(part: int) -> tuple[Tensor, Tensor]:
        rows_sums, column_sums = q.new_zeros(len(q)), q.new_zeros(len(k))
        for rows, columns, e in tiles(part):
            rows_sums[rows].add_(e.sum(1))
            column_sums[columns].add_(e.sum(0))
        return rows_sums, column_sums

    row_sums, column_sums = tiles.sum_parts(work)
    assert row_sums is not None and column_sums is not None
    return row_sums.log_(), column_sums.log_()


def pair_gradients(
    tiles: Exponentials, own: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dq_i = sum_j W_ij k_j / T and dk_j = sum_i W_ij q_i / T for queries and keys that are other rows.

    W_ij = w_ij (g_i exp(S_ij - lse_i) + g_j exp(S_ij - lse_j)), with (lse, g) of the queries in `own`, of the keys in
    `other`; None omits a term.
    """
    q, k, plan = tiles.q, tiles.k, tiles.plan
    tiny = torch.finfo(q.dtype).tiny
    sides = [side for side in (own, other) if side is not None]
    top = max(float(g.abs().max()) if g.numel() else 0.0 for _, g in sides) or tiny  # as in `gradients`
    mine, theirs = (
        q.new_zeros(len(x))
        if side is None
        else (side[1] / top) * (-side[0]).exp().masked_fill(side[0] == -torch.inf, 0)
        for x, side in ((q, own), (k, other))
    )
    left, right = rounded(q, plan), rounded(k, plan)

    def work(part: int) -> list[Tensor | None]:
        dq, dk = (zeros(x) if need else None for x, need in zip((q, k), needs, strict=True))
        spare = tiles.buffer()
        for rows, columns, e in tiles(part):
            e *= torch.add(mine[rows, None], theirs[columns], out=tiles.view(spare, rows, columns))
            if dq is not None:
                add_product(dq[rows], e, right[columns])
            if dk is not None:
                add_product(dk[columns], e.T, left[rows])
        return [dq, dk]

    dq, dk = tiles.sum_parts(work)
    for x in (dq, dk):
        if x is not None:
            x *= tiles.scale * top
    return dq, dk


def gradients(
    tiles: Exponentials, lse: Tensor, gradient: Tensor, needs: tuple[bool, bool]
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

    dq, dk = tiles.sum_parts(work)
    if dq is not None:
        plan.add(dq)
        dq *= scale * top if symmetric else (scale * top * weight)[:, None]
    if dk is not None:
        plan.add(dk)
        dk *= scale * top
    return dq, dk


def kernel_sums(
    q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None, weighs: bool,
    plan: LogSumExpConfig,
) -> Found:  # fmt: skip
    """Compute `sums` with the Triton kernels; each rank computes its share of the rows."""
    start, stop = share(len(q), plan)
    lse, mean = q.new_zeros(len(q)), zeros(q) if weighs else None
    keys, how = q if k is None else k, (weighs, plan.products, kernel_weights(weights))
    lse[start:stop], own_mean = triton_logsumexp.forward(q, keys, scale, exclude_self, start, stop, *how)
    plan.add(lse)
    if mean is not None and own_mean is not None:
        mean[start:stop] = own_mean
        plan.add(mean)
    return lse, mean


def kernel_gradients(
    q: Tensor, k: Tensor | None, lse: Tensor, gradient: Tensor, scale: float, exclude_self: bool,
    weights: PairWeights | None, needs: tuple[bool, bool], plan: LogSumExpConfig,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute `gradients` with the Triton kernels."""
    its, none, keys, groups = (lse, gradient), (None, None), q if k is None else k, kernel_weights(weights)

    def whole(a: Tensor, b: Tensor, own: tuple[Any, Any], other: tuple[Any, Any], weights: SameGroup | None) -> Tensor:
        start, stop = share(len(a), plan)
        out = zeros(a)
        out[start:stop] = triton_logsumexp.backward(
            a, b, scale, exclude_self, start, stop, *own, *other, plan.products, weights
        )
        plan.add(out)
        return out

    dq = whole(q, keys, its, its if k is None else none, groups) if needs[0] else None
    if k is None or not needs[1]:
        return dq, None
    return dq, whole(keys, q, none, its, None if groups is None else groups.flipped)
