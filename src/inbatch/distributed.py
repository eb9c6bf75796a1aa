"""Losses of the whole batch in a training loop of several processes: gather the rows, then compute the loss.

    loss = inbatch.losses.nt_xent(gather_rows(model(views)))  # model: DistributedDataParallel
    loss.backward()

With `own_rows`, no process holds the rows of all:

    with own_rows():
        loss = inbatch.losses.nt_xent(model(views))
    loss.backward()

The methods of this package need neither: their step does it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from inbatch.errors import ConfigError
from inbatch.nn import logsumexp
from inbatch.runtime.distributed import world
from inbatch.runtime.ring import OwnRows

__all__ = ["LocalRowsWarning", "gather_rows", "own_rows"]

P = ParamSpec("P")
R = TypeVar("R")

_TYPES = tuple(sorted((t for t in vars(torch).values() if isinstance(t, torch.dtype)), key=str))
_MOST = 6  # dimensions of rows
_GATHERS = ("gather", "sync", "reduce", "alltoall")  # parts of the names of autograd functions between processes
_checked: set[str] = set()


class LocalRowsWarning(UserWarning):
    """A loss that compares the samples of a batch was given the rows of one of several processes."""


def gather_rows(rows: Tensor, *, dim: int | None = None, group: Any = None) -> Tensor:
    """Return the rows of all processes, joined along the samples in the order of the ranks.

    The gradient flows to the process that computed a row and is the sum over processes, so that the mean over processes
    in DistributedDataParallel gives the gradient of the loss of the whole batch, without any factor. Call it on every
    process; processes may hold different numbers of samples. With one process, the rows are returned unchanged.

    Args:
        rows: rows (V, n, D) or (n, D) of any type, also labels or indices (n,).
        dim: dimension of the samples; by default the last but one, or the only one.
        group: process group of torch.distributed; by default all processes.

    Returns:
        The rows, (V, N, D), (N, D) or (N,), equal on all processes.

    Raises:
        ConfigError: if processes pass rows of different type or shape (apart from the number of samples), or only some
            of them pass rows with a gradient.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    dim = max(rows.ndim - 2, 0) if dim is None else dim % max(rows.ndim, 1)
    gathered: Tensor = _Gather.apply(rows, dim, _sizes(rows, dim, group), group)
    return gathered


@contextmanager
def own_rows(group: Any = None) -> Iterator[None]:
    """Compute the losses of `inbatch.losses` of the whole batch, on every process from its own rows.

    Rows pass from process to process in blocks, or are added up, so that memory decreases with the number of processes;
    a part of an equation that needs all rows at once (the sorted projections of VISReg, the singular values of MMCR)
    gathers what it needs. Labels, groups and indices that a loss takes are those of own samples. As with `gather_rows`,
    the value is equal on all processes, processes may hold different numbers of samples, and the mean of the gradients
    over processes in DistributedDataParallel is the gradient of the loss of the whole batch. Call the loss and its
    backward pass on every process, in the same order, and the same factor if the loss has one: gradients that every
    process can compute are not exchanged. With one process it changes nothing.

    Args:
        group: process group of torch.distributed; by default all processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        yield
        return
    with logsumexp.using(peers=OwnRows(group)):
        yield


def _sizes(rows: Tensor, dim: int, group: Any) -> list[int]:
    """Return the number of samples of every process; raise ConfigError if their rows cannot be joined."""
    if not 1 <= rows.ndim <= _MOST:
        raise ConfigError(f"gather_rows takes rows of 1 to {_MOST} dimensions, not {rows.ndim}")
    graded = rows.requires_grad and torch.is_grad_enabled()
    facts = [_TYPES.index(rows.dtype), int(graded), dim, rows.ndim, *rows.shape, *[0] * (_MOST - rows.ndim)]
    own = torch.tensor(facts, device=rows.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group)
    ranks = torch.stack(every).tolist()
    sizes = [rank[4 + dim] for rank in ranks]
    for rank in ranks:
        rank[4 + dim] = 0
    if any(rank != ranks[0] for rank in ranks):
        odd = next(i for i, rank in enumerate(ranks) if rank != ranks[0])
        described = [_described(ranks[i], sizes[i]) for i in (0, odd)]
        raise ConfigError(
            f"gather_rows cannot join the rows of the processes: rank 0 has {described[0]}, rank {odd} {described[1]}. "
            "Only the number of samples may differ"
        )
    return sizes


def _described(facts: list[int], samples: int) -> str:
    kind, graded, dim, ndim, *shape = facts
    shape[dim] = samples
    return f"{_TYPES[kind]} of shape {tuple(shape[:ndim])} {'with' if graded else 'without'} gradient"


class _Gather(torch.autograd.Function):
    """all_gather of parts of any size, with a gradient summed over processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dim: int, sizes: list[int], group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        rank, most = dist.get_rank(group), max(sizes)
        ctx.place = sum(sizes[:rank]), sizes[rank]
        part = rows.detach().movedim(dim, 0).contiguous()
        if len(part) < most:
            part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
        parts = [torch.empty_like(part) for _ in sizes]
        dist.all_gather(parts, part, group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.narrow(ctx.dim, *ctx.place), None, None, None


def compares_samples(loss: Callable[P, R]) -> Callable[P, R]:
    """Decorate a loss that compares samples: warn once if it gets the rows of one of several processes."""

    @wraps(loss)
    def call(*args: P.args, **options: P.kwargs) -> R:
        # A step of inbatch passes whole rows, and says so by sharing the products of the loss among its ranks.
        if world() > 1 and logsumexp.shared_by() == 1 and loss.__name__ not in _checked:
            _check(loss.__name__, [x for x in (*args, *options.values()) if isinstance(x, Tensor)])
        return loss(*args, **options)

    return call


def _check(name: str, tensors: list[Tensor]) -> None:
    """Warn if rows with a gradient come from computations of this process only; rows of unknown origin pass."""
    nodes = [x.grad_fn for x in tensors if x.grad_fn is not None]
    if not nodes:
        return
    _checked.add(name)
    if not _passes_processes(nodes):
        warnings.warn(
            f"{name} compares the samples of a batch, and there are {world()} processes, but its rows come from this "
            "process only: the gradient, averaged over processes, is not that of the whole batch. Call it within "
            f"inbatch.distributed.own_rows(), pass {name}(inbatch.distributed.gather_rows(rows)), or ignore "
            "inbatch.distributed.LocalRowsWarning if each process has a batch of its own by intention",
            LocalRowsWarning, stacklevel=4,
        )  # fmt: skip


def _passes_processes(nodes: list[Any]) -> bool:
    """Return whether the graph of these nodes contains communication, except that of synchronised norms."""
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        name = node.name().lower().replace("_", "")
        own = isinstance(node, BackwardCFunction) and "syncbatchnorm" not in name  # a function written in Python
        if (own and any(word in name for word in _GATHERS)) or "allgather" in name:
            return True
        more = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= more
        nodes.extend(more)
    return False
