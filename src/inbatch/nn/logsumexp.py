"""Log-sum-exps of products of rows, and their gradients, without materialising the matrix of products ("tiled").

Each tile of S = q k^T / T is computed, exponentiated, summed and discarded; the backward pass computes the tiles again.
Memory is O((N + M) D), not O(N M). If q and k are the same rows, S is symmetric and half of the tiles suffice. GPUs use
the Triton kernels (`triton_logsumexp`), other devices products of PyTorch on tiles that fit into the processor's cache.

Ranks share the tiles and add up their results: time decreases with their number, and every rank has the whole result,
as in a run on one rank.
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
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from inbatch.nn import triton_logsumexp
from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.pair_weights import PairWeights, SameGroup

__all__ = ["LogSumExpConfig", "PairWeights", "SameGroup", "check_temperature", "logsumexp", "nearest", "shared_by",
           "using"]  # fmt: skip

Mode = Literal["auto", "never", "always"]
MatmulPrecision = triton_logsumexp.MatmulPrecision

LEAST = 2**17
"""Matrices with fewer pairs (362 by 362) are materialised: half a megabyte, and faster than tiles."""
TILE = 512
"""Rows and columns of a tile for one core: with its operands it stays in the level-2 cache."""
APART = 2**19
"""From this number of pairs on, cores work in parallel, each on its own tiles."""
PARTS = 4
"""Maximum number of parallel parts, each with its own sums; additional cores share the operations of each part."""
_BLOCK = 2**22
"""Pairs in memory at once if neither tiles nor a whole matrix can be used."""
_REACH = {torch.float32: 60.0, torch.float64: 600.0}
"""Largest absolute logit of which the exponential, and sums of billions of them, are still finite and not 0."""


def _alone(x: Tensor) -> None:
    """Sum over a single rank: do nothing."""


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
    """

    mode: Mode = "auto"
    products: MatmulPrecision = "float32"
    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], None] = _alone


_PLAN: ContextVar[LogSumExpConfig] = ContextVar("plan", default=LogSumExpConfig())  # noqa: B039 (it is frozen)


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[LogSumExpConfig]:
    """Compute log-sum-exps with these fields of `LogSumExpConfig` within the context."""
    token = _PLAN.set(replace(_PLAN.get(), **changes))
    try:
        yield _PLAN.get()
    finally:
        _PLAN.reset(token)


def shared_by() -> int:
    """Return the number of ranks that share the products of a log-sum-exp: above 1 in a step on several ranks."""
    return _PLAN.get().world


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
    plan, scale = _PLAN.get(), 1 / temperature
    if plan.mode == "never" or (plan.mode == "auto" and len(q) * len(k) < LEAST):
        return _whole(q, k, scale, exclude_self, weights)
    if _on_kernels(q, k, weights) or _reach(q, k) <= temperature * _REACH.get(q.dtype, 0):
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

    plan, place = _PLAN.get(), torch.zeros(len(q), count, dtype=torch.long, device=q.device)
    start, stop = _share(len(q), plan)
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


def _reach(q: Tensor, k: Tensor) -> float:
    """Return an upper bound of the products of a row of q and a row of k."""
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
                lse, mean = _sums(_Tiles(q, k, scale, exclude_self, plan, weights), weighs)
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
                tiles = _Tiles(q, k, ctx.scale, ctx.exclude_self, ctx.plan, ctx.weights)
                both = _gradients(tiles, lse, gradient, needs)
        return *both, None, None, None, None


Found = tuple[Tensor, Tensor | None]


def _sums(tiles: "_Tiles", weighs: bool) -> Found:
    """Return the log-sum-exps (n) and, if requested, the rows of k averaged with each query's weights (n, D)."""
    q, k, plan = tiles.q, tiles.k, tiles.plan
    right = q if k is None else k

    def work(part: int) -> Found:
        sums, mean = q.new_zeros(len(q)), _zeros(q) if weighs else None
        for rows, columns, e in tiles(part):
            sums[rows] += e.sum(1)
            if k is None and rows != columns:
                sums[columns] += e.sum(0)
            if mean is not None:
                mean[rows].addmm_(e, right[columns])
        return sums, mean

    sums, mean = tiles.spread(work)
    assert sums is not None
    plan.add(sums)
    if mean is not None:
        plan.add(mean)
        mean /= sums.masked_fill(sums == 0, 1)[:, None]
    return sums.log_(), mean


def _gradients(
    tiles: "_Tiles", lse: Tensor, gradient: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dq_i = sum_j W_ij k_j / T, dk_j = sum_i W_ij q_i / T; if k = q, their sum.

    W_ij = g_i w_ij exp(S_ij - lse_i), and 0 if row i has no pair of positive weight.
    """
    q, k, scale, plan = tiles.q, tiles.k, tiles.scale, tiles.plan
    top = gradient.abs().max().clamp(min=torch.finfo(q.dtype).tiny)  # prevents underflow of small gradients
    weight = (gradient / top) * (-lse).exp().masked_fill(lse == -torch.inf, 0)
    narrow: Callable[[Tensor], Tensor] = Tensor.bfloat16 if plan.products == "bf16" else lambda x: x
    left, right = narrow(q if k is None else weight[:, None] * q), narrow(q if k is None else k)

    def add(to: Tensor, e: Tensor, x: Tensor) -> None:
        if plan.products == "bf16":
            to += e.bfloat16() @ x
        else:
            to.addmm_(e, x)

    def work(part: int) -> tuple[Tensor | None, Tensor | None]:
        dq = _zeros(q) if needs[0] else None
        dk = _zeros(k) if k is not None and needs[1] else None
        both = q.new_empty(tiles.numbers if k is None else 0)
        for rows, columns, e in tiles(part):
            if k is None:
                e *= torch.add(weight[rows, None], weight[columns], out=both[: e.numel()].view_as(e))
            if dq is not None:
                add(dq[rows], e, right[columns])
                if k is None and rows != columns:
                    add(dq[columns], e.T, left[rows])
            if dk is not None:
                add(dk[columns], e.T, left[rows])
        return dq, dk

    dq, dk = tiles.spread(work)
    if dq is not None:
        plan.add(dq)
        dq *= scale * top if k is None else (scale * top * weight)[:, None]
    if dk is not None:
        plan.add(dk)
        dk *= scale * top
    return dq, dk


class _Tiles:
    """Tiles of w exp(S) (if k = q, those on and above the diagonal), shared over ranks and the cores of this rank.

    Each core has its own tiles and sums: no operation is split over cores, which would synchronise thousands of times
    (and wait long if another process uses one of the cores).
    """

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, plan: LogSumExpConfig,
        weights: PairWeights | None = None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.scale, self.exclude_self, self.weights, self.plan = (
            q,
            k,
            scale,
            exclude_self,
            weights,
            plan,
        )
        n, m, self.threads = len(q), len(q if k is None else k), torch.get_num_threads()
        here = q.device.type == "cpu"
        self.parts = min(self.threads, PARTS) if here and n * m >= APART else 1
        self.side = TILE if here else 8 * TILE
        if plan.world == 1 and here:  # all ranks must use the same tiles with any number of threads
            self.side *= math.isqrt(self.threads // self.parts)
            if self.parts > 1 and n * m < 8 * self.parts * self.side**2:
                self.side = -(-self.side // 2)  # smaller tiles, so that every part has work
        self.numbers = min(self.side, n) * min(self.side, m)

    def __call__(self, part: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the tiles of one part, all in the same memory."""
        q, right, number = self.q, self.q if self.k is None else self.k, -1
        memory, plan = q.new_empty(self.numbers), self.plan
        for i in range(0, len(q), self.side):
            rows, left = slice(i, min(i + self.side, len(q))), None
            for j in range(i if self.k is None else 0, len(right), self.side):
                number += 1
                if number % plan.world != plan.rank or number // plan.world % self.parts != part:
                    continue
                if left is None:
                    left = q[rows] * (self.scale / math.log(2))  # exp2 is faster than exp
                columns = slice(j, min(j + self.side, len(right)))
                e = memory[: len(left) * (columns.stop - j)].view(len(left), -1)
                torch.mm(left, right[columns].T, out=e).exp2_()
                if self.exclude_self and i == j:
                    e.diagonal().zero_()
                if isinstance(self.weights, SameGroup):
                    self.weights.scale_(e, rows, columns)
                elif self.weights is not None:
                    e *= self.weights.tile(rows, columns)
                yield rows, columns, e

    def spread(self, work: Callable[[int], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Compute the tensors of all parts in parallel and add them up in a fixed order."""

        @torch.no_grad()  # gradient mode is per thread
        def alone(part: int) -> Sequence[Tensor | None]:
            return work(part)

        with fast_products():
            if self.parts == 1:
                return list(work(0))
            found = list(_pool(os.getpid(), self.parts, self.threads // self.parts).map(alone, range(self.parts)))
        total = list(found[0])
        for more in found[1:]:
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


def _kernel_sums(
    q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weighs: bool, plan: LogSumExpConfig
) -> Found:
    """Compute `_sums` with the Triton kernels; each rank computes its share of the rows."""
    start, stop = _share(len(q), plan)
    lse, mean = q.new_zeros(len(q)), _zeros(q) if weighs else None
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
        start, stop = _share(len(a), plan)
        out = _zeros(a)
        out[start:stop] = triton_logsumexp.backward(
            a, b, scale, exclude_self, start, stop, *own, *other, products=plan.products
        )
        plan.add(out)
        return out

    dq = whole(q, keys, its, its if k is None else none) if needs[0] else None
    return dq, whole(keys, q, none, its) if k is not None and needs[1] else None


def _zeros(x: Tensor) -> Tensor:
    """Return contiguous zeros for x of any layout, because ranks add these up."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _share(rows: int, plan: LogSumExpConfig) -> tuple[int, int]:
    """Return the first row of this rank's share and that of the next rank's."""
    return plan.rank * rows // plan.world, (plan.rank + 1) * rows // plan.world
