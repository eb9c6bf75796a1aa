"""Processes that train together. The only file that names torch.distributed; the engine is PyTorch's own."""

import datetime
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from inbatch.errors import ConfigError
from inbatch.limits import launched


def setup(expect: int | None = None, device: str = "cpu", timeout: float = 1800.0) -> bool:
    """Join the other processes: an existing group as it is, torchrun's or SLURM's variables, or alone.

    expect: refuse to start with another number of processes than this.
    timeout: seconds after which a collective that some rank never joins is an error.
    Returns whether a group was made here, which `teardown` then ends. Never starts a process.
    """
    made = False
    if not (dist.is_available() and dist.is_initialized()):
        if "WORLD_SIZE" not in os.environ and launched("SLURM_NTASKS") > 1 and "SLURM_PROCID" in os.environ:
            os.environ["WORLD_SIZE"], os.environ["RANK"] = (
                os.environ["SLURM_NTASKS"],
                os.environ["SLURM_PROCID"],
            )
            os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
            if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
                raise ConfigError(
                    f"SLURM started {os.environ['SLURM_NTASKS']} tasks, but MASTER_ADDR and MASTER_PORT are not set: "
                    "export them in the batch script, or start with `srun torchrun ...`"
                )
        if launched("WORLD_SIZE") > 1:
            backend = "nccl" if device == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
            except ValueError as error:  # a variable that is missing, or no number
                raise ConfigError(f"the processes cannot meet: {error}") from None
            made = True
    if expect is not None and expect != world():
        found = world()
        if made:
            dist.destroy_process_group()
        raise ConfigError(
            f"{expect} processes were expected, {found} started: the launcher did not do what was asked "
            f"(torchrun --nproc-per-node {expect} -m inbatch ...)"
        )
    return made


def teardown() -> None:
    """End the process group."""
    dist.destroy_process_group()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else 1


def local_rank() -> int:
    """This process's number on its machine: which GPU is its own."""
    return launched("LOCAL_RANK", 0)


def wrap(tower: nn.Module) -> nn.Module:
    """The tower with its gradients averaged over ranks during the backward pass; itself where it is alone."""
    if world() == 1:
        return tower
    device = next(tower.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    unsynced: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(
        tower,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **unsynced,
    )


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Every rank's tensor, of equal shapes, joined along `dim` in the order of ranks. Carries no gradient."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


def own(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of a gathered tensor."""
    return x.chunk(world(), dim)[rank()]


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place and in one collective."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def largest(value: int) -> int:
    """The largest of every rank's values: how ranks agree that one of them was asked to stop."""
    if world() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def share(value: Any) -> Any:
    """Rank 0's value (a plain Python object) on every rank; the others wait for it."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def spread(task: Callable[[int], Any], count: int) -> list[Any]:
    """[task(0), ..., task(count - 1)], shared out over the ranks; every rank gets all of it (plain or numpy values)."""
    if world() == 1:
        return [task(i) for i in range(count)]
    parts: list[dict[int, Any]] = [{}] * world()
    dist.all_gather_object(parts, {i: task(i) for i in range(rank(), count, world())})
    done = {i: value for part in parts for i, value in part.items()}
    return [done[i] for i in range(count)]


def agree(value: str, what: str) -> None:
    """Refuse to go on where ranks differ in something that must be equal (recipe, data, version)."""
    if world() == 1:
        return
    values: list[str] = [""] * world()
    dist.all_gather_object(values, value)
    different = [r for r, other in enumerate(values) if other != values[0]]
    if different:
        raise ConfigError(f"ranks disagree about the {what}: rank {different[0]} has another one than rank 0")


def add_(x: Tensor) -> None:
    """Replace a contiguous tensor by its sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(x)


class _SumOverRanks(torch.autograd.Function):
    """all_reduce whose gradient is summed over ranks too: each rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class _AllOverRanks(torch.autograd.Function):
    """all_gather along dim 0 whose gradient comes back summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return own(gradient)


def join_groups(module: nn.Module) -> None:
    """Context groups of the module's parts (those with `gather` and `own`) reach over all ranks from now on."""
    if world() == 1:
        return
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "gather") and hasattr(part, "own"):
            part.gather, part.own = _AllOverRanks.apply, own


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all ranks, on any device.

    torch's SyncBatchNorm refuses the CPU; this one stands in for it there, for tests and CPU clusters.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least (N, C), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world()
        mean = _SumOverRanks.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None:
            assert self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), rate)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronise_norm(module: nn.Module) -> nn.Module:
    """The module with every batch normalisation over all ranks: torch's on CUDA, `GlobalBatchNorm` elsewhere."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer) not in _PLAIN_NORMS:
            raise ConfigError(f"sync_norm knows torch's own batch normalisation, not {type(layer).__name__} at {name}")
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, old in children:
            if type(old) in _PLAIN_NORMS:
                new = GlobalBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
                new._parameters, new._buffers = old._parameters, old._buffers  # the same tensors, frozen or not
                setattr(parent, name, new.train(old.training))
    return module


_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
