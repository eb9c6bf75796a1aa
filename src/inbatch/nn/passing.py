"""Log-sum-exps over the rows of all ranks, each of which holds its own: blocks of rows pass from rank to rank.

A rank sends its rows to the next one, computes on its own, and then on each block that arrives while the block moves
on. No rank holds more than its own rows and a few blocks. What a block collects at its stops comes back to its owner.

If queries and keys are the same rows, S is symmetric: a pair of blocks meets on one rank only, which computes both
sides, so that blocks make W / 2 stops for W ranks. If W is even, two blocks at the distance W / 2 meet on both of their
ranks, and each computes half of the pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inbatch.nn import exponentials, triton_logsumexp
from inbatch.nn.exponentials import REACH, Exponentials, logits, on_kernels, reach
from inbatch.nn.pair_weights import PairWeights, PassingWeights
from inbatch.nn.tiles import LogSumExpConfig, Peers, zeros

LEAST = 2**17
"""Blocks with fewer pairs are materialised."""
_CHUNK = 2**20
"""Pairs in memory at once if tiles cannot be used."""

Side = tuple[Tensor, Tensor] | None
"""Log-sum-exps of rows and the gradients of these; None: none."""
Visit = Callable[[Sequence[Tensor], int, list[Tensor] | None], list[Tensor]]
"""(block, its rank, what it has collected; None at its first stop) -> what it has collected now."""


def travel(peers: Peers, sizes: Sequence[int], held: Sequence[Tensor], stops: int, first: Callable[[], None],
           visit: Visit, collects: bool) -> list[Tensor] | None:  # fmt: skip
    """Send own rows to the next `stops` ranks, and visit the blocks that arrive here; return what the own rows collect.

    Args:
        peers: the ranks.
        sizes: number of rows of every rank.
        held: tensors with an entry for each own row.
        stops: number of ranks that every block visits.
        first: called while the first block is on its way.
        visit: called for every block.
        collects: whether a block carries results; they have an entry for each of its rows.
    """
    rank, world = peers.rank, peers.world
    arrives = peers.exchange(held, 1, sizes[rank - 1]) if stops else None
    first()
    results, follows = None, None
    for stop in range(1, stops + 1):
        assert arrives is not None
        block, origin = arrives(), (rank - stop) % world
        arrives = peers.exchange(block, 1, sizes[origin - 1]) if stop < stops else None
        results = visit(block, origin, follows() if follows is not None else None)
        del block
        if collects:
            onward = stop < stops
            follows = peers.exchange(results, 1 if onward else -stops, sizes[origin - 1] if onward else sizes[rank])
    return follows() if follows is not None else None


class Block:
    """Pairs of own rows q and a block of keys k, which is None if the keys are q; as in `logsumexp.logsumexp`."""

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> None:  # fmt: skip
        self.q, self.k, self.keys, self.plan = q, k, q if k is None else k, plan
        self.pairs = scale, exclude_self, weights
        self.kernels = self.tiled = False
        if plan.mode == "always" or (plan.mode == "auto" and len(q) * len(self.keys) >= LEAST):
            self.kernels = on_kernels(q, self.keys, weights)
            self.tiled = not self.kernels and scale * reach(q, self.keys) <= REACH.get(q.dtype, 0)
        self.kept: dict[tuple[int, int], Tensor] = {}

    def sums(
        self, columns: bool = False, weighs: bool = False, keep: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the log-sum-exps of q, those of k if `columns`, and the means of k by q's softmax if `weighs`.

        keep: numbers of tiles that may be kept for `gradients`.
        """
        q, k = self.q, self.keys
        if self.kernels:
            scale, exclude, products = *self.pairs[:2], self.plan.products
            lse, mean = triton_logsumexp.forward(q, k, scale, exclude, 0, len(q), weighs, products)
            other = triton_logsumexp.forward(k, q, scale, exclude, 0, len(k), False, products)[0] if columns else None
            return lse, other, mean
        if self.tiled:
            tiles = Exponentials(q, self.k, *self.pairs, self.plan)
            if columns:
                return *exponentials.both_sums(tiles), None
            tiles.keeps = keep
            lse, mean = exponentials.sums(tiles, weighs)
            self.kept = tiles.kept
            return lse, None, mean
        parts, means, other = [], [], q.new_full((len(k),), -torch.inf) if columns else None
        for _, values in self._chunks():
            parts.append(values.logsumexp(1))
            if other is not None:
                torch.logaddexp(other, values.logsumexp(0), out=other)
            if weighs:
                means.append(_softmax(values, parts[-1][:, None]) @ k)
        return torch.cat(parts), other, torch.cat(means) if weighs else None

    def gradients(self, own: Side, other: Side, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return dq_i = sum_j W_ij k_j / T and dk_j = sum_i W_ij q_i / T, where needed.

        W_ij = g_i exp(S_ij - lse_i) for `own`, plus g_j exp(S_ij - lse_j) for `other`; of q against itself, dq alone.
        """
        q, k, scale = self.q, self.keys, self.pairs[0]
        if self.kernels:
            return (
                self._by_kernels(q, k, own, other) if needs[0] else None,
                self._by_kernels(k, q, other, own) if needs[1] else None,
            )
        if self.tiled:
            tiles = Exponentials(q, self.k, *self.pairs, self.plan)
            tiles.kept = self.kept
            if tiles.symmetric and own is not None:
                return exponentials.gradients(tiles, *own, (needs[0], False))
            return exponentials.pair_gradients(tiles, own, other, needs)
        dq, dk = (zeros(x) if need else None for x, need in zip((q, k), needs, strict=True))
        for start, values in self._chunks():
            rows, w = slice(start, start + len(values)), torch.zeros_like(values)
            for side, place in ((own, (rows, None)), (other, (None, slice(None)))):
                if side is not None:
                    lse, gradient = (x[rows, None] if place[0] else x[None] for x in side)
                    w += gradient * _softmax(values, lse)
            if dq is not None:
                dq[rows] = scale * (w @ k)
            if dk is not None:
                dk.addmm_(w.T, q[rows], alpha=scale)
        return dq, dk

    def _by_kernels(self, a: Tensor, b: Tensor, own: Side, other: Side) -> Tensor:
        """Return the gradient of rows a by the Triton kernels."""
        (lse_a, grad_a), (lse_b, grad_b) = ((None, None) if side is None else side for side in (own, other))
        scale, exclude, _ = self.pairs
        sides = lse_a, grad_a, lse_b, grad_b
        return triton_logsumexp.backward(a, b, scale, exclude, 0, len(a), *sides, products=self.plan.products)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the logits of some rows at a time."""
        size = max(1, _CHUNK // max(1, len(self.keys)))
        for start in range(0, max(1, len(self.q)), size):
            yield start, logits(self.q[start : start + size], self.keys, *self.pairs, first=start)


def _softmax(values: Tensor, lse: Tensor) -> Tensor:
    """Return exp(values - lse), 0 for rows of which nothing was summed."""
    return (values - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()


class Passing(torch.autograd.Function):
    """Autograd function of `logsumexp.logsumexp` for own rows; k is None if it is q.

    The gradient of a row is that of the sum over ranks of what the ranks propagate back.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> Tensor:  # fmt: skip
        weighs = ctx.needs_input_grad[0] and k is not None and not ctx.needs_input_grad[1]
        with torch.autocast(q.device.type, enabled=False):
            ctx.ring = _Ring((scale, exclude_self, weights), plan, q if k is None else k)
            lse, mean = ctx.ring.sums(q, k, weighs, any(ctx.needs_input_grad[:2]) and not weighs)
        ctx.save_for_backward(q, k, lse, mean)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, mean = ctx.saved_tensors
        if mean is not None:
            return (ctx.ring.pairs[0] * gradient)[:, None] * mean, None, None, None, None, None
        with torch.autocast(q.device.type, enabled=False):
            both = ctx.ring.gradients(q, k, (lse, gradient), ctx.needs_input_grad[:2])
        return *both, None, None, None, None


class _Ring:
    """Own rows against the blocks of all ranks.

    Attributes:
        pairs: scale, exclude_self and weights of `logsumexp.logsumexp`.
        plan: the configuration, with the ranks.
        sizes: number of keys of every rank.
        kept: tiles of own rows, kept for the gradients.
    """

    def __init__(self, pairs: tuple[float, bool, PairWeights | None], plan: LogSumExpConfig, keys: Tensor) -> None:
        weights = pairs[2]
        if weights is not None and not isinstance(weights, PassingWeights):
            raise ValueError(
                f"{type(weights).__name__} has no weights for keys of other ranks: define `keys` and `among` "
                "(inbatch.nn.pair_weights.PassingWeights)"
            )
        assert plan.peers is not None
        self.pairs, self.plan, self.peers = pairs, plan, plan.peers
        self.sizes, self.kept = plan.peers.sizes(keys), dict[tuple[int, int], Tensor]()
        self.entries = () if weights is None else weights.keys

    def sums(self, q: Tensor, k: Tensor | None, weighs: bool, keeps: bool) -> tuple[Tensor, Tensor | None]:
        """Return the log-sum-exps of q, and the means of all keys by their softmax if `weighs`."""
        lse, mean, symmetric = torch.empty(0), None, k is None

        def first() -> None:
            nonlocal lse, mean
            own = Block(q, k, *self.pairs, self.plan)
            keep = min(exponentials.KEPT // self.peers.world, q.numel()) if keeps else 0  # at most as much as own rows
            lse, _, mean = own.sums(weighs=weighs, keep=keep)
            self.kept = own.kept

        def visit(block: Sequence[Tensor], origin: int, totals: list[Tensor] | None) -> list[Tensor]:
            rows, columns = self._meet(origin, symmetric)
            here, other, near = self._block(q, block, rows, columns).sums(columns=symmetric, weighs=weighs)
            before = lse[rows].clone()
            torch.logaddexp(before, here, out=lse[rows])
            if mean is not None and near is not None:
                mean.mul_(_softmax(before, lse)[:, None]).add_(near.mul_(_softmax(here, lse)[:, None]))
            if other is None:
                return []
            totals = [lse.new_full((len(block[0]),), -torch.inf)] if totals is None else totals
            torch.logaddexp(totals[0][columns], other, out=totals[0][columns])
            return totals

        home = self._travel([q if k is None else k], symmetric, first, visit, symmetric)
        if home is not None:
            torch.logaddexp(lse, home[0], out=lse)
        return lse, mean

    def gradients(
        self, q: Tensor, k: Tensor | None, side: tuple[Tensor, Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of q and k, or their sum if they are the same rows, from those of the log-sum-exps."""
        dq, dk, symmetric = None, None, k is None

        def first() -> None:
            nonlocal dq, dk
            own = Block(q, k, *self.pairs, self.plan)
            own.kept, self.kept = self.kept, {}
            dq, dk = own.gradients(side, side if symmetric else None, (needs[0], needs[1] and not symmetric))

        def visit(block: Sequence[Tensor], origin: int, totals: list[Tensor] | None) -> list[Tensor]:
            rows, columns = self._meet(origin, symmetric)
            own, entries = (side[0][rows], side[1][rows]), block[1:]
            other = (block[1][columns], block[2][columns]) if symmetric else None
            pair = self._block(q, [block[0], *(entries[2:] if symmetric else entries)], rows, columns)
            here, there = pair.gradients(own, other, (needs[0], symmetric or needs[1]))
            if dq is not None and here is not None:
                dq[rows] += here
            if there is None:
                return []
            if totals is None and len(there) == len(block[0]):
                return [there]
            totals = [torch.zeros_like(block[0])] if totals is None else totals
            totals[0][columns] += there
            return totals

        held = [q, *side] if k is None else [k]
        home = self._travel(held, symmetric, first, visit, symmetric or needs[1])
        if home is not None:
            returned, total = home[0], dq if symmetric else dk
            assert total is not None
            total += returned
        return dq, dk

    def _travel(
        self, held: list[Tensor], symmetric: bool, first: Callable[[], None], visit: Visit, collects: bool
    ) -> list[Tensor] | None:
        stops = self.peers.world // 2 if symmetric else self.peers.world - 1
        return travel(self.peers, self.sizes, [*held, *self.entries], stops, first, visit, collects)

    def _meet(self, origin: int, symmetric: bool) -> tuple[slice, slice]:
        """Return the own rows and the rows of a block that this rank compares: half of them if another rank does, too.

        The block of the lower rank is halved: its first part meets on the higher rank, its second part on itself.
        """
        every, rank, world = slice(None), self.peers.rank, self.peers.world
        if not symmetric or (rank - origin) % world * 2 != world:
            return every, every
        half = self.sizes[min(rank, origin)] // 2
        return (every, slice(half)) if rank > origin else (slice(half, None), every)

    def _block(self, q: Tensor, block: Sequence[Tensor], rows: slice, columns: slice) -> Block:
        """Return the pairs of own rows and a block: its keys, and the entries of its weights."""
        scale, _, weights = self.pairs
        if isinstance(weights, PassingWeights):
            weights = weights.among(rows, [x[columns] for x in block[1:]])
        return Block(q[rows], block[0][columns], scale, False, weights, self.plan)
