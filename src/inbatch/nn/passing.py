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

from inbatch.nn import exponentials
from inbatch.nn.pair_weights import PairWeights, PassingWeights
from inbatch.nn.row_blocks import Block, softmax_of
from inbatch.nn.tiles import LogSumExpConfig, Peers, zeros

PIECE = 4096
"""Rows of a rank that pass at a time: their copies on the way are what a rank holds besides its own rows."""

Visit = Callable[[Sequence[Tensor], int, list[Tensor] | None], list[Tensor]]
"""(block, its rank, what it has collected; None at its first stop) -> what it has collected now."""
Arrival = Callable[[], list[Tensor]]
"""Waits for tensors that are on their way, and returns them."""
Receive = Callable[[slice, list[Tensor]], None]
"""(piece of the own rows, what it has collected)."""


def pass_blocks(peers: Peers, sizes: Sequence[int], tensors: Sequence[Tensor], stops: int, first: Callable[[], None],
           visit: Visit, receive: Receive | None) -> None:  # fmt: skip
    """Send own rows to the next `stops` ranks, `PIECE` at a time, and visit the blocks that arrive here.

    The next piece is on its way while one is visited, and what a piece has collected while the next one is.

    Args:
        peers: the ranks.
        sizes: number of rows of every rank.
        tensors: tensors with an entry for each own row.
        stops: number of ranks that every block visits.
        first: called while the first block is on its way.
        visit: called for every block.
        receive: called for every piece of the own rows with what it has collected, an entry for each of its rows; None:
            nothing is collected.
    """
    starts = range(0, max(1, *sizes), PIECE) if stops else ()
    pieces = [[min(PIECE, max(0, size - start)) for size in sizes] for start in starts]
    own = [slice(start, start + counts[peers.rank]) for start, counts in zip(starts, pieces, strict=True)]

    def send(number: int) -> Arrival | None:
        if number == len(pieces):
            return None
        return peers.exchange([x[own[number]] for x in tensors], 1, pieces[number][peers.rank - 1])

    def receive_piece(number: int, home: Arrival | None) -> None:
        if receive is not None and home is not None:
            receive(own[number], home())

    home: Arrival | None = None
    following = send(0)
    first()
    for number, counts in enumerate(pieces):
        arrives, following = following, send(number + 1)
        before, home = home, _pass_piece(peers, counts, arrives, stops, visit, receive is not None)
        receive_piece(number - 1, before)
    receive_piece(len(pieces) - 1, home)


def _pass_piece(peers: Peers, sizes: Sequence[int], arrives: Arrival | None, stops: int, visit: Visit,
                 collects: bool) -> Arrival | None:  # fmt: skip
    """Visit one block of every rank, send it on, and return what waits for what the own one has collected."""
    rank, world = peers.rank, peers.world
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
    return follows


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
        keys = q if k is None else k

        def first() -> None:
            nonlocal lse, mean
            own = Block(q, k, *self.pairs, self.plan)
            keep = exponentials.KEPT // self.peers.world if keeps else 0  # all ranks together as much as one process
            lse, _, mean = own.sums(weighs=weighs, keep=keep)
            self.kept = own.kept

        def visit(block: Sequence[Tensor], origin: int, totals: list[Tensor] | None) -> list[Tensor]:
            if symmetric and totals is None:
                totals = [lse.new_full((len(block[0]),), -torch.inf)]
            for rows, columns in self._compared_slices(origin, len(q), len(block[0]), symmetric):
                here, other, near = self._block(q, block, rows, columns).sums(columns=symmetric, weighs=weighs)
                before = lse[rows].clone()
                torch.logaddexp(before, here, out=lse[rows])
                if mean is not None and near is not None:
                    mean.mul_(softmax_of(before, lse)[:, None]).add_(near.mul_(softmax_of(here, lse)[:, None]))
                if other is not None and totals is not None:
                    torch.logaddexp(totals[0][columns], other, out=totals[0][columns])
            return totals or []

        def receive(piece: slice, home: list[Tensor]) -> None:
            torch.logaddexp(lse[piece], home[0], out=lse[piece])

        self._pass_blocks([keys], symmetric, first, visit, receive if symmetric else None)
        return lse, mean

    def gradients(
        self, q: Tensor, k: Tensor | None, side: tuple[Tensor, Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of q and k, or their sum if they are the same rows, from those of the log-sum-exps."""
        dq, dk, symmetric = None, None, k is None
        collects = symmetric or needs[1]

        def first() -> None:
            nonlocal dq, dk
            own = Block(q, k, *self.pairs, self.plan)
            own.kept, self.kept = self.kept, {}
            dq, dk = own.gradients(side, side if symmetric else None, (needs[0], needs[1] and not symmetric))

        def visit(block: Sequence[Tensor], origin: int, totals: list[Tensor] | None) -> list[Tensor]:
            if collects and totals is None:
                totals = [zeros(block[0])]
            for rows, columns in self._compared_slices(origin, len(q), len(block[0]), symmetric):
                own, entries = (side[0][rows], side[1][rows]), block[1:]
                other = (block[1][columns], block[2][columns]) if symmetric else None
                pair = self._block(q, [block[0], *(entries[2:] if symmetric else entries)], rows, columns)
                here, there = pair.gradients(own, other, (needs[0], collects))
                if dq is not None and here is not None:
                    dq[rows] += here
                if there is not None and totals is not None:
                    totals[0][columns] += there
            return totals or []

        def receive(piece: slice, home: list[Tensor]) -> None:
            total = dq if symmetric else dk
            assert total is not None
            total[piece] += home[0]

        tensors = [q, *side] if k is None else [k]
        self._pass_blocks(tensors, symmetric, first, visit, receive if collects else None)
        return dq, dk

    def _pass_blocks(
        self, tensors: list[Tensor], symmetric: bool, first: Callable[[], None], visit: Visit, receive: Receive | None
    ) -> None:
        stops = self.peers.world // 2 if symmetric else self.peers.world - 1
        pass_blocks(self.peers, self.sizes, [*tensors, *self.entries], stops, first, visit, receive)

    def _compared_slices(self, origin: int, own: int, count: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
        """Yield the own rows and the rows of a piece that this rank compares: half of them if another rank does, too.

        Every piece of the lower rank is halved: its first half meets on the higher rank, its second half on itself, so
        that both compute at the same time.

        Args:
            origin: rank of the piece.
            own: number of own rows.
            count: number of rows of the piece.
            symmetric: whether pairs of rows meet once.
        """
        rank, world = self.peers.rank, self.peers.world
        slices = [(slice(own), slice(count))]
        if symmetric and (rank - origin) % world * 2 == world:
            if rank > origin:
                slices = [(slice(own), slice(count // 2))]
            else:
                ends = [(start, min(own, start + PIECE)) for start in range(0, own, PIECE)]
                slices = [(slice(start + (end - start) // 2, end), slice(count)) for start, end in ends]
        yield from (pair for pair in slices if own and count and pair[1].stop)

    def _block(self, q: Tensor, block: Sequence[Tensor], rows: slice, columns: slice) -> Block:
        """Return the pairs of own rows and a block: its keys, and the entries of its weights."""
        scale, _, weights = self.pairs
        if isinstance(weights, PassingWeights):
            weights = weights.among(rows, [x[columns] for x in block[1:]])
        return Block(q[rows], block[0][columns], scale, False, weights, self.plan)
