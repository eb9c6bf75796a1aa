"""Tensors in shards (FSDP2): every rank holds a part of each, and the whole of a layer while it is computed."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(module: nn.Module, units: Sequence[nn.Module], device: torch.device) -> None:
    """Divide the parameters of a module over all ranks and move them to the device, one unit at a time.

    Gradients are averaged over ranks in the backward pass, and divided in the same way. No unit stays whole between its
    forward and its backward pass.

    Args:
        module: The module.
        units: Modules in it whose tensors are gathered together when they are called.
        device: Device of the run.

    Raises:
        ValueError: If a parameter has no dimension, or is not contiguous.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # The output may be a view of a larger tensor, on which the hook of the backward pass would be lost.
    module.register_forward_hook(lambda module, inputs, output: output.clone())
    for part in (*units, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    module.to(device)  # the buffers


def is_shard(x: object) -> bool:
    """Return whether a tensor is divided over ranks."""
    loaded = sys.modules.get("torch.distributed.tensor")  # without its import, which takes a second, there is none
    return loaded is not None and isinstance(x, loaded.DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module has parameters that are divided over ranks."""
    return any(is_shard(p) for p in module.parameters())


def unit_sizes(module: nn.Module) -> list[int]:
    """Return the bytes of the tensors that are gathered together, of every unit of a module; none without shards."""
    if not is_sharded(module):
        return []
    from torch.distributed.fsdp import FSDPModule

    sizes, counted = list[int](), set[nn.Parameter]()
    for unit in reversed(list(module.modules())):  # a unit comes before the one that contains it
        if isinstance(unit, FSDPModule):
            own = set(unit.parameters()) - counted
            counted |= own
            sizes.append(sum(p.numel() * p.element_size() for p in own))
    return sizes


def local(x: Any) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; the tensor itself if it is not divided."""
    part: Tensor = x.to_local() if is_shard(x) else x
    return part


def whole(x: Any) -> Tensor:
    """Return the gathered tensor on every rank, which all must call; the tensor itself if it is not divided."""
    gathered: Tensor = x.full_tensor() if is_shard(x) else x
    return gathered


def part_of(x: Tensor, like: Any) -> Tensor:
    """Return this rank's part of a tensor that every rank has, divided like another one; without communication."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def separate(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the tensors that are divided over ranks and those that are not; operations on lists mix no two kinds."""
    divided, others = list[Tensor](), list[Tensor]()
    for x in tensors:
        (divided if is_shard(x) else others).append(x)
    return [kind for kind in (divided, others) if kind]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all elements of tensors, of which some may be divided over ranks; all ranks must call it."""
    kinds = [whole(nn.utils.get_total_norm(kind)) for kind in separate(tensors)]
    return kinds[0] if len(kinds) == 1 else nn.utils.get_total_norm(kinds)


def norms(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each whole tensor, (K,), in one collective if some are divided over ranks.

    Args:
        tensors: The tensors, or this rank's parts of them.
        like: For each of them, a tensor that is divided in the same way.
    """
    each = torch.stack(list(torch._foreach_norm([local(x) for x in tensors])))
    if not any(map(is_shard, like)):
        return each
    divided = torch.tensor([is_shard(x) for x in like], device=each.device)
    squares = torch.where(divided, each.square(), 0.0)
    dist.all_reduce(squares)
    return torch.where(divided, squares.sqrt(), each)
