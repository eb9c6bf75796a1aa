"""Communication of ranks that hold their own rows of a batch: sums, gathers, and blocks that pass from rank to rank."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.runtime.distributed import record_exchange

_TYPES = tuple(sorted((t for t in vars(torch).values() if isinstance(t, torch.dtype)), key=str))
_MOST = 6
"""Largest number of dimensions of rows."""


class OwnRows:
    """The ranks of a process group, as `nn.tiles.Peers`.

    Args:
        group: process group of torch.distributed; None: all processes.
        equal: all ranks hold equal numbers of rows, so that these need not be exchanged.
    """

    def __init__(self, group: Any = None, equal: bool = False) -> None:
        self.group, self.equal = group, equal
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def add(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""
        record_exchange()
        dist.all_reduce(torch.view_as_real(x) if x.is_complex() else x, group=self.group)

    def largest(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its maximum over ranks."""
        record_exchange()
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)

    def sizes(self, x: Tensor) -> list[int]:
        """Return the number of rows of every rank.

        Raises:
            ConfigError: on every rank, if rows differ in type or in more than their number; it names the rank.
        """
        if self.equal:
            return [len(x)] * self.world
        facts = [_TYPES.index(x.dtype), x.ndim, *x.shape, *[0] * (_MOST - x.ndim)]
        own = torch.tensor(facts, device=x.device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self.group)
        ranks = torch.stack(every).tolist()
        kinds = [(*rank[:2], *rank[3:]) for rank in ranks]
        if any(kind != kinds[0] for kind in kinds):
            odd = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            first, other = (f"{_TYPES[x[0]]} of shape {tuple(x[2 : 2 + x[1]])}" for x in (ranks[0], ranks[odd]))
            raise ConfigError(
                f"a loss compares the rows of all processes, but rank 0 has {first}, rank {odd} {other}: only the "
                "number of samples may differ"
            )
        return [rank[2] for rank in ranks]

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, joined along the first dimension."""
        record_exchange()
        most, part = max(sizes), x.detach().contiguous()
        if len(part) < most:
            part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        whole = part.new_empty(len(sizes) * most, *part.shape[1:])
        dist.all_gather(list(whole.split(most)), part, group=self.group)
        if min(sizes) == most:
            return whole
        return torch.cat([part[:size] for part, size in zip(whole.split(most), sizes, strict=True)])

    def exchange(self, tensors: Sequence[Tensor], offset: int, rows: int) -> Callable[[], list[Tensor]]:
        """Send tensors `offset` ranks forward; the returned function waits for those that arrive, of `rows` rows."""
        record_exchange()
        sent = [x.detach().contiguous() for x in tensors]
        arrived = [x.new_empty(rows, *x.shape[1:]) for x in sent]
        to, source = ((self.rank + step) % self.world for step in (offset, -offset))
        moves = [dist.P2POp(dist.isend, x, group=self.group, group_peer=to) for x in sent if x.numel()]
        moves += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=source) for x in arrived if x.numel()]
        works = dist.batch_isend_irecv(moves) if moves else []

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            sent.clear()
            return arrived

        return wait
