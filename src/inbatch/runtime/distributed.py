"""Processes that train together. The only file that names torch.distributed; the engine is PyTorch's own."""

import datetime
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from inbatch.errors import ConfigError, InbatchError, Interrupted, Preempted, RankError, TrainingError
from inbatch.runtime.rank_store import RankStore, fresh
from inbatch.runtime.resources import launched

_TIMEOUT = 1800.0
_LINGER = 2.0
_RUNS = itertools.count()  # every rank counts the same runs
_roll: RankStore | None = None
"""Of the run that goes on."""


def setup(expect: int | None = None, device: str = "cpu", timeout: float = _TIMEOUT) -> bool:
    """Join the other processes: an existing group as it is, torchrun's or SLURM's variables, or alone.

    expect: refuse to start with another number of processes than this.
    timeout: seconds after which a collective that some rank never joins is an error.
    Returns whether a group was made here, which the caller then ends. Never starts a process.
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
                _init(backend, timeout)
            except ValueError as error:  # a variable that is missing, or no number
                raise ConfigError(f"the processes cannot meet: {error}") from None
            except RuntimeError as error:
                many = f"{os.environ['WORLD_SIZE']} processes were to meet within {timeout:,.0f} s"
                raise RankError(f"{many}, and did not: {error}", speaks=True) from error
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


def _init(backend: str, timeout: float) -> None:
    """Make the process group that the environment describes."""
    wait = datetime.timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=wait)
        return
    store, rank, world = next(rendezvous("env://", timeout=wait))
    store = dist.PrefixStore(fresh(store, rank, world, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)


@contextmanager
def process_group(expect: int | None = None, device: str = "cpu", timeout: float = _TIMEOUT) -> Iterator[None]:
    """One run of all ranks (`setup`), in which what ends one of them ends all, with a sentence that says why."""
    global _roll
    made, before = setup(expect, device, timeout), _roll
    try:
        if world() > 1:
            _roll = _new_roll(timeout)
        with shared_errors():
            yield
    except Exception as error:
        if made and not isinstance(error, Preempted | Interrupted):
            _hang_up()  # what holds the group (DDP) outlives its end, and the others would wait for this process's
            ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            # The store, and the word in it, may live in rank 0. Where it lives in the launcher, which ends all when one
            # has ended, rank 0 goes first: it says for all what all have found wrong.
            shared = isinstance(error, ConfigError | TrainingError) and not error.alone
            if rank() == 0 if ours else rank() and shared:
                time.sleep(_LINGER)
        raise
    finally:
        _roll = before
        if made:
            dist.destroy_process_group()


@contextmanager
def shared_errors() -> Iterator[None]:
    """An error in here is told to the other ranks; where one of those is lost, it becomes one that says who, and why.

    Under NCCL most losses raise nothing: its watchdog ends the process after the timeout, with its own words.
    """
    try:
        yield
    except (RankError, Preempted, Interrupted):
        raise
    except BaseException as error:
        if _roll is None:
            raise
        if _is_loss(error):
            _hang_up()
            raise _roll.call() from error
        with suppress(RuntimeError):  # the store may be gone
            own = str(error) if isinstance(error, InbatchError) else f"{type(error).__name__}: {error}"
            _roll.tell(f"rank {rank()}: {own}", getattr(error, "exit_code", InbatchError.exit_code))
        raise


def _is_loss(error: BaseException) -> bool:
    """Whether a collective failed; gloo has no error of its own, and DDP's come out of the backward pass."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def _hang_up() -> None:
    """Close gloo's connections, so that ranks that wait for this one, not for the lost one, notice now.

    Of a failed context gloo closes nothing; on a timeout everything.
    """
    if dist.get_backend() == "gloo":
        for other in range(world()):
            if other != rank():
                with suppress(RuntimeError):
                    waiting = dist.irecv(torch.empty(1), other)
                    if waiting is not None:
                        waiting.wait(datetime.timedelta(milliseconds=1))


def _new_roll(timeout: float) -> RankStore:
    store = dist.distributed_c10d._get_default_store()  # an existing group's can be had in no other way
    return RankStore(store, f"inbatch run {next(_RUNS)}", rank(), world(), timeout)


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


def wrap(network: nn.Module) -> nn.Module:
    """The network with its gradients averaged over ranks during the backward pass; itself where it is alone."""
    if world() == 1:
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


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Every rank's tensor, of equal shapes, joined along `dim` in the order of ranks. Carries no gradient."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


def local_shard(x: Tensor, dim: int = 0) -> Tensor:
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


def all_reduce_max(value: int) -> int:
    """The largest of every rank's values: how ranks agree that one of them was asked to stop."""
    if world() == 1:
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value (a plain Python object) on every rank; the others wait for it."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def distribute_tasks(task: Callable[[int], Any], count: int) -> list[Any]:
    """[task(0), ..., task(count - 1)], shared out over the ranks; every rank gets all of it (plain or numpy values)."""
    if world() == 1:
        return [task(i) for i in range(count)]
    parts: list[dict[int, Any]] = [{}] * world()
    dist.all_gather_object(parts, {i: task(i) for i in range(rank(), count, world())})
    done = {i: value for part in parts for i, value in part.items()}
    return [done[i] for i in range(count)]


def assert_equal_across_ranks(facts: Mapping[str, object]) -> None:
    """Refuse to go on where ranks differ in something that must be equal (recipe, data, version), and say in what.

    A rank that ends before it comes here (its folder of images is not there) ends the others at once. It needs no
    collective: NCCL's first one would wait for that rank until its timeout.
    """
    if world() > 1:
        (_roll or _new_roll(_TIMEOUT)).meet({name: str(value) for name, value in facts.items()})


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


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's tensor, differentiable: the gradient of one is the sum of every rank's, too."""
    return _SumOverRanks.apply(x)


class _AllOverRanks(torch.autograd.Function):
    """all_gather along dim 0 whose gradient comes back summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return local_shard(gradient)


def make_context_global(module: nn.Module) -> None:
    """Context groups of the module's parts (those with `gather` and `own`) reach over all ranks from now on."""
    if world() == 1:
        return
    parts: list[Any] = list(module.modules())
    for part in parts:
        if hasattr(part, "gather") and hasattr(part, "own"):
            part.gather, part.own = _AllOverRanks.apply, local_shard
