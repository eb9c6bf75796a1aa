"""Ranks and collectives of a run, by PyTorch's engine; `inbatch.distributed` is for loops of the user's own."""

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch.runtime.resources import launched
from inbatch.runtime.sharding import is_sharded


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _joined() else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, which selects its GPU."""
    return launched("LOCAL_RANK", 0)


def wrap(network: nn.Module) -> nn.Module:
    """Return the network with gradients averaged over ranks in the backward pass.

    That is the network itself on one rank, or if it is sharded; parameters that are not divided are then averaged by
    the step.
    """
    if world() == 1 or is_sharded(network):
        return network
    device = next(network.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    unsynced: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **unsynced,
    )


_first: float | None = None
"""Time of the first exchange since the last call of `first_exchange`."""


def first_exchange() -> float | None:
    """Return when (`time.perf_counter`) this rank first exchanged tensors since the last call; None if it did not."""
    global _first
    time_then, _first = _first, None
    return time_then


def record_exchange() -> None:
    """Record the time of an exchange if it is the first since the last call of `first_exchange`."""
    global _first
    if _first is None:
        _first = time.perf_counter()


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Return every rank's tensor, of equal shapes, joined along `dim` in the order of ranks. Carries no gradient."""
    if world() == 1:
        return x
    record_exchange()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """Return the rows of all ranks joined in their order; ranks may have different numbers of them, or none."""
    shapes: list[Any] = distribute_tasks(lambda _: tuple(x.shape), world())
    shape = max(shapes)[1:]  # a rank without rows does not know their width
    whole = x.new_empty(sum(shape[0] for shape in shapes), *shape)
    for source, part in enumerate(whole.split([shape[0] for shape in shapes])):
        if len(part):
            sent = x if source == rank() else part
            sent = sent.cuda() if dist.get_backend() == "nccl" else sent.contiguous()
            dist.broadcast(sent, source)
            part.copy_(sent)
    return whole


def local_shard(x: Tensor, dim: int = 0) -> Tensor:
    """Return this rank's part of a gathered tensor."""
    return x.chunk(world(), dim)[rank()]


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place and in one collective."""
    if world() == 1 or not tensors:
        return
    record_exchange()
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def all_reduce_max(value: int) -> int:
    """Return the largest value of all ranks: for example, whether one of them received a signal."""
    if world() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value (a plain Python object) on every rank; the others wait for it."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in place."""
    if world() > 1:
        for x in tensors:
            sent = x.cuda() if dist.get_backend() == "nccl" else x.contiguous()
            dist.broadcast(sent, 0)
            x.copy_(sent)


def distribute_tasks(task: Callable[[int], Any], count: int) -> list[Any]:
    """Return [task(0), ..., task(count - 1)], shared over the ranks; all get every result (plain or numpy)."""
    if world() == 1:
        return [task(i) for i in range(count)]
    parts: list[dict[int, Any]] = [{}] * world()
    dist.all_gather_object(parts, {i: task(i) for i in range(rank(), count, world())})
    done = {i: value for part in parts for i, value in part.items()}
    return [done[i] for i in range(count)]


def add_(x: Tensor) -> None:
    """Replace a contiguous tensor by its sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)


class _SumOverRanks(torch.autograd.Function):
    """all_reduce with a gradient that is also summed over ranks: each rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        record_exchange()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of all ranks' tensors; its gradient is the sum of all ranks' gradients."""
    return _SumOverRanks.apply(x)


class _AllOverRanks(torch.autograd.Function):
    """all_gather along dim 0 with a gradient summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return local_shard(gradient)


def make_context_global(module: nn.Module) -> None:
    """Extend the context groups of the module's parts (those with `gather` and `own`) over all ranks."""
    if world() == 1:
        return
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "gather") and hasattr(part, "own"):
            part.gather, part.own = _AllOverRanks.apply, local_shard
