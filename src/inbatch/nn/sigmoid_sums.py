"""Sum of pairwise sigmoid losses over all pairs of rows, and its gradients, without the matrix of pairs ("tiled").

Each tile of logits is computed once, for the sum and for both gradients, because the gradient of a pair does not depend
on other pairs. Tiles, kernels, ranks, weights and modes are those of the log-sum-exp (`logsumexp`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from inbatch.nn import triton_sigmoid
from inbatch.nn.batch_sums import loss_sum
from inbatch.nn.exponentials import kernel_weights, on_kernels, reach
from inbatch.nn.logsumexp import LEAST
from inbatch.nn.pair_weights import PairWeights, PassingWeights, SameGroup, group_multiplier, multiplier
from inbatch.nn.passing import pass_blocks
from inbatch.nn.tiles import PLAN, LogSumExpConfig, Tiles, add_product, diagonal, rounded, share, zeros

CAP = {torch.float32: 80.0, torch.float64: 600.0}
"""Largest logit of which the exponential is computed; the loss of a larger one is the logit, its slope 1."""


def sigmoid_sum(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], bias: Float[Tensor, "n"] | None = None,
    positive: SameGroup | None = None, weights: PairWeights | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return sum_ij w_ij log(1 + exp(-y_ij (q_i . k_j + b_i))), with y = 1 for positives and -1 for other pairs.

    Args:
        q: queries, of any length.
        k: keys.
        bias: b_i, one number per query; None is 0.
        positive: pairs of one group are the positives; None: the pairs i = j.
        weights: w_ij, a function of the indices without gradient; None is 1 for all pairs.

    Raises:
        ValueError: if groups are not those of as many rows.
    """
    for groups in (positive, weights):
        if isinstance(groups, SameGroup):
            groups.check_rows(len(q), len(k))
    plan, bias = PLAN.get(), q.new_zeros(len(q)) if bias is None else bias
    if plan.peers is not None:
        return loss_sum(_Tiled.apply(q, k, bias, positive, weights, plan))
    if plan.mode == "never" or (plan.mode == "auto" and len(q) * len(k) < LEAST) or q.dtype not in CAP:
        return _whole(q, k, bias, positive, weights)
    return _Tiled.apply(q, k, bias, positive, weights, plan)


def _whole(q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: PairWeights | None) -> Tensor:
    """Compute it from the materialised matrix."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.T + bias[:, None]
    everything = slice(0, len(q)), slice(0, len(k))
    if positive is None:
        same = torch.eye(len(q), len(k), dtype=torch.bool, device=q.device)
    else:
        same = positive.q_ids[:, None] == positive.k_ids
    losses = -logsigmoid(torch.where(same, logits, -logits))
    return (losses if weights is None else losses * weights.tile(*everything).detach().to(losses.dtype)).sum()


class _Tiled(torch.autograd.Function):
    """Autograd function of `sigmoid_sum`; its forward pass computes the gradients, too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(q.device.type, enabled=False):
            if plan.peers is None:
                sums = _sums(q, k, bias, positive, weights, plan, needs)
            else:
                sums = _passing(q, k, bias, positive, weights, plan, needs)
        for x in sums:
            if x is not None:
                plan.add(x)
        ctx.save_for_backward(*sums[1:])
        assert sums[0] is not None
        return sums[0].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else gradient * x for x in ctx.saved_tensors), None, None, None


def _sums(
    q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: PairWeights | None, plan: LogSumExpConfig,
    needs: Sequence[bool], diagonal: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """Return the losses (n), summed over keys, and the gradients of queries, keys and biases that are needed.

    diagonal: without groups of positives, the pairs i = j are the positives; else none is.
    """
    if on_kernels(q, k, weights):
        return _by_kernels(q, k, bias, positive, kernel_weights(weights), plan, needs, diagonal)
    tiles = _LogisticTiles(q, k, bias, positive, weights, plan)
    if positive is None and not diagonal:
        tiles.flip = _flip_none
    return tiles.sums(tuple(needs))


def _by_kernels(
    q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: SameGroup | None, plan: LogSumExpConfig,
    needs: Sequence[bool], diagonal: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Compute `_sums` with the Triton kernel; each rank computes its share of the rows, of queries and of keys."""

    def placed(x: Tensor, start: int, stop: int, sums: list[Tensor | None]) -> list[Tensor | None]:
        whole = [None if part is None else part.new_zeros(len(x), *part.shape[1:]) for part in sums]
        for total, part in zip(whole, sums, strict=True):
            if total is not None and part is not None:
                total[start:stop] = part
        return whole

    start, stop = share(len(q), plan)
    sums = triton_sigmoid.row_sums(
        q, k, bias, None, start, stop, positive, diagonal, weights, (True, needs[0], needs[2]), plan.products
    )
    losses, dq, db = placed(q, start, stop, sums)
    if not needs[1]:
        return [losses, dq, None, db]
    start, stop = share(len(k), plan)
    positive, weights = positive and positive.flipped, weights and weights.flipped
    sums = triton_sigmoid.row_sums(
        k, q, None, bias, start, stop, positive, diagonal, weights, (False, True, False), plan.products
    )
    return [losses, dq, placed(k, start, stop, sums)[1], db]


class _LogisticTiles(Tiles):
    """Losses of the pairs of a tile, and their slopes."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> None:  # fmt: skip
        super().__init__(q, k, 1.0, plan)
        self.bias, self.cap = bias / math.log(2), CAP[q.dtype] / math.log(2)
        self.large = reach(q, k) + float(bias.detach().abs().max()) > CAP[q.dtype] if self.numbers else False
        self.weigh = None if weights is None else multiplier(weights, q.dtype)
        self.flip = _flip_diagonal if positive is None else group_multiplier(positive, -1.0, q.dtype)

    def sums(self, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Return the losses (n), summed over keys, and the gradients of queries, keys and biases that are needed."""
        q, k = self.q, self.k
        left, right = rounded(q, self.plan), rounded(k, self.plan)

        def work(part: int) -> list[Tensor | None]:
            losses, spare = q.new_zeros(len(q)), self.buffer()
            gradients = [zeros(x) if need else None for x, need in zip((q, k, self.bias), needs, strict=True)]
            dq, dk, db = gradients
            for rows, columns, x in self(part):
                other = self.view(spare, rows, columns)
                slope = self._slopes(x, rows, columns, other, losses[rows], any(needs))
                if dq is not None:
                    add_product(dq[rows], slope, right[columns])
                if dk is not None:
                    add_product(dk[columns], slope.T, left[rows])
                if db is not None:
                    db[rows].add_(slope.sum(1))
            return [losses, *gradients]

        return self.sum_parts(work)

    def _slopes(self, x: Tensor, rows: slice, columns: slice, spare: Tensor, losses: Tensor, needed: bool) -> Tensor:
        """Replace products / log 2 by the slopes of the losses of their pairs; add the losses to those of the rows."""
        self.flip(x.add_(self.bias[rows, None]), rows, columns, spare)
        over = None
        if self.large:
            over = (x - self.cap).relu_().mul_(math.log(2))
            x.clamp_(max=self.cap)
        torch.log1p(x.exp2_(), out=spare)
        spare = spare if over is None else spare.add_(over)
        if self.weigh is not None:
            self.weigh(spare, rows, columns, torch.empty_like(spare))
        losses.add_(spare.sum(1))
        if needed:
            x.div_(torch.add(x, 1, out=spare))
            self.flip(x, rows, columns, spare)
            if self.weigh is not None:
                self.weigh(x, rows, columns, spare)
        return x


def _passing(
    q: Tensor, k: Tensor, bias: Tensor, positive: SameGroup | None, weights: PairWeights | None, plan: LogSumExpConfig,
    needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Return the sums of own queries and the keys of all ranks, which pass from rank to rank and collect gradients."""
    assert plan.peers is not None
    if weights is not None and not isinstance(weights, PassingWeights):
        raise ValueError(f"{type(weights).__name__} has no weights for keys of other ranks: define `keys` and `among`")
    totals: list[Tensor | None] = []
    groups = () if positive is None else positive.keys
    entries = () if weights is None else weights.keys

    def first() -> None:
        totals.extend(_sums(q, k, bias, positive, weights, plan, needs))

    def visit(block: Sequence[Tensor], origin: int, collected: list[Tensor] | None) -> list[Tensor]:
        keys, rest = block[0], block[1 + len(groups) :]
        same = None if positive is None else positive.among(slice(None), block[1:2])
        among = None if weights is None else weights.among(slice(None), rest)
        sums = _sums(q, keys, bias, same, among, plan, needs, diagonal=False)
        for i in (0, 1, 3):
            total, x = totals[i], sums[i]
            if total is not None and x is not None:
                total += x
        dk = sums[2]
        return [] if dk is None else [dk if collected is None else collected[0].add_(dk)]

    def receive(piece: slice, home: list[Tensor]) -> None:
        if (total := totals[2]) is not None:
            total[piece] += home[0]

    stops, sizes = plan.peers.world - 1, plan.peers.sizes(k)
    pass_blocks(plan.peers, sizes, [k, *groups, *entries], stops, first, visit, receive if needs[1] else None)
    return totals


def _flip_none(x: Tensor, rows: slice, columns: slice, spare: Tensor) -> Tensor:
    return x


def _flip_diagonal(x: Tensor, rows: slice, columns: slice, spare: Tensor) -> Tensor:
    return diagonal(x, rows, columns).neg_()
