"""Tiles of the matrix of products of all pairs of rows: one after the other in the same memory, never all of them.

Ranks share the tiles and add up their results: time decreases with their number, and every rank has the whole result,
as in a run on one rank. The cores of a rank have their own tiles, too.
"""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.triton_logsumexp import MatmulPrecision

Mode = Literal["auto", "never", "always"]

TILE = 320
"""Rows of a tile for one core, which has twice as many columns: with its operands it stays near the level-2 cache."""
APART = 2**19
"""From this number of pairs on, cores work in parallel, each on its own tiles."""
PARTS = 4
"""Maximum number of parallel parts, each with its own sums; additional cores share the operations of each part."""


def _alone(x: Tensor) -> None:
    """Sum over a single rank: do nothing."""


class Peers(Protocol):
    """The ranks of a batch of which each holds its own rows. Every method is called by all ranks, in one order.

    Attributes:
        rank: index of this rank.
        world: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def add(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its sum over ranks."""

    def largest(self, x: Tensor) -> None:
        """Replace a contiguous tensor by its maximum over ranks."""

    def sizes(self, x: Tensor) -> list[int]:
        """Return the number of rows (the first dimension) of every rank."""

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, joined along the first dimension."""

    def exchange(self, tensors: Sequence[Tensor], offset: int, rows: int) -> Callable[[], list[Tensor]]:
        """Send tensors `offset` ranks forward; the returned function waits for those that arrive, of `rows` rows."""


@dataclass(frozen=True)
class LogSumExpConfig:
    """Configuration of the log-sum-exps.

    Attributes:
        mode: "auto" uses tiles if the matrix would be large, "never" materialises it, "always" uses tiles.
        products: "float32"; "bf16" rounds the operands to bfloat16 (on a CPU only in the backward pass, because its
            products are rounded, too); "tf32x3" replaces one product by three in TF32, nearly float32, in the GPU
            kernels only. Materialised matrices are float32.
        rank: index of this rank; it computes every world-th tile.
        world: number of ranks that share the tiles.
        add: sums a tensor over ranks in place.
        peers: the other ranks, if each rank holds its own rows (`nn.batch_sums`); `world` is then 1. None: every rank
            holds the rows of the whole batch.
    """

    mode: Mode = "auto"
    products: MatmulPrecision = "float32"
    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], None] = _alone
    peers: Peers | None = None


PLAN: ContextVar[LogSumExpConfig] = ContextVar("plan", default=LogSumExpConfig())  # noqa: B039 (it is frozen)


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[LogSumExpConfig]:
    """Compute log-sum-exps with these fields of `LogSumExpConfig` within the context."""
    token = PLAN.set(replace(PLAN.get(), **changes))
    try:
        yield PLAN.get()
    finally:
        PLAN.reset(token)


def shared_by() -> int:
    """Return the number of ranks that share the products of a log-sum-exp: above 1 in a step on several ranks."""
    plan = PLAN.get()
    return plan.world if plan.peers is None else plan.peers.world


class Tiles:
    """Tiles of S = scale * q k^T (if k = q, those on and above the diagonal), shared over ranks and cores of this rank.

    S is in units of log 2, because exp2 is faster than exp. Each core has its own tiles and sums: no operation is split
    over cores, which would synchronise thousands of times (and wait long if another process uses one of the cores).

    Args:
        q: queries.
        k: keys; None if they are the queries.
        scale: factor of the products.
        plan: precision of products, and ranks.

    Attributes:
        kept: tiles of an earlier pass, by first row and column.
    """

    def __init__(self, q: Tensor, k: Tensor | None, scale: float, plan: LogSumExpConfig) -> None:
        self.q, self.symmetric, self.scale, self.plan = q, k is None, scale, plan
        self.k, self.kept = q if k is None else k, dict[tuple[int, int], Tensor]()
        n, m, self.threads = len(q), len(self.k), torch.get_num_threads()
        here = q.device.type == "cpu"
        self.parts = min(self.threads, PARTS) if here and n * m >= APART else 1
        side = TILE if here else 8 * TILE
        if plan.world == 1 and here:  # all ranks must use the same tiles with any number of threads
            side *= math.isqrt(self.threads // self.parts)
            if self.parts > 1 and n * m < 16 * self.parts * side**2:
                side = -(-side // 2)  # smaller tiles, so that every part has work
        self.side = -(-n // max(1, -(-n // side)))  # of all strips, so that the last one is not thin
        self.numbers = min(self.side, n) * min(2 * self.side, m)

    def __call__(self, part: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the tiles of one part: their rows, columns and S / log 2, in the same memory, or what is kept."""
        memory, strip, left = self.buffer(), None, self.q
        for rows, columns in self.places(part):
            tile = self.kept.get((rows.start, columns.start))
            if tile is None:
                if strip != rows:
                    strip, left = rows, self.q[rows] * (self.scale / math.log(2))
                tile = torch.mm(left, self.k[columns].T, out=self.view(memory, rows, columns))
            yield rows, columns, tile

    def places(self, part: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows and columns of the tiles of one part, strip by strip."""
        n, m, number = len(self.q), len(self.k), -1
        for i in range(0, n, max(1, self.side)):
            rows, j = slice(i, min(i + self.side, n)), i if self.symmetric else 0
            while j < m:
                # The first tile of a strip of a symmetric matrix is square, because half of it is computed twice.
                columns = slice(j, rows.stop if self.symmetric and i == j else min(j + 2 * self.side, m))
                j, number = columns.stop, number + 1
                if number % self.plan.world != self.plan.rank or number // self.plan.world % self.parts != part:
                    continue
                yield rows, columns

    def buffer(self) -> Tensor:
        """Return memory for a tile of any size."""
        return self.q.new_empty(self.numbers)

    @staticmethod
    def view(memory: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return a buffer as the matrix of a tile."""
        n, m = rows.stop - rows.start, columns.stop - columns.start
        return memory[: n * m].view(n, m)

    def sum_parts(self, work: Callable[[int], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Compute the tensors of all parts in parallel and add them up in a fixed order."""

        @torch.no_grad()  # gradient mode is per thread
        def alone(part: int) -> Sequence[Tensor | None]:
            return work(part)

        with fast_products():
            if self.parts == 1:
                return list(work(0))
            partial = list(_pool(os.getpid(), self.parts, self.threads // self.parts).map(alone, range(self.parts)))
        total = list(partial[0])
        for more in partial[1:]:
            for summed, x in zip(total, more, strict=True):
                if summed is not None and x is not None:
                    summed += x
        return total


@functools.lru_cache(maxsize=2)
def _pool(process: int, parts: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process (a fork has none) that each use `threads` cores; unused pools end."""
    before, all_started = torch.get_num_threads(), threading.Barrier(parts)
    pool = ThreadPoolExecutor(parts, "tiles", torch.set_num_threads, (threads,))
    list(pool.map(lambda part: all_started.wait(), range(parts)))
    torch.set_num_threads(before)  # new threads take the value that was set last, by any thread
    return pool


def zeros(x: Tensor) -> Tensor:
    """Return contiguous zeros for x of any layout, because ranks add these up."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def share(rows: int, plan: LogSumExpConfig) -> tuple[int, int]:
    """Return the first row of this rank's share and that of the next rank's."""
    return plan.rank * rows // plan.world, (plan.rank + 1) * rows // plan.world


def diagonal(e: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return the pairs i = j of a tile, possibly none, as a view."""
    return e.diagonal(rows.start - columns.start)


def rounded(x: Tensor, plan: LogSumExpConfig) -> Tensor:
    """Return the rows in the precision of the products in which they are used by `add_product`."""
    return x.bfloat16() if plan.products == "bf16" else x


def add_product(to: Tensor, e: Tensor, x: Tensor) -> None:
    """Add e x in place; x in bfloat16 rounds e, too."""
    if x.dtype == to.dtype:
        to.addmm_(e, x)
    else:
        to += e.to(x.dtype) @ x
