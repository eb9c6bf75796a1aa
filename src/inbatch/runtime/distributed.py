"""Distributed training of a run, by PyTorch's engine; `inbatch.distributed` is for loops of the user's own."""

import datetime
import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from inbatch.runtime.sharding import is_sharded

_TIMEOUT = 1800.0
_LINGER = 2.0
_RUNS = itertools.count()  # all ranks count the same runs
_roll: RankStore | None = None
"""Store of the current run."""


def setup(expect: int | None = None, device: str = "cpu", timeout: float = _TIMEOUT) -> bool:
    """Join the other processes: an existing group, the variables of torchrun or SLURM, or a single process.

    Never starts a process.

    Args:
        expect: required number of processes.
        device: device type of the run.
        timeout: seconds after which a collective that some rank never joins is an error.

    Returns:
        Whether a group was created here, which the caller must then destroy.
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
            except ValueError as error:  # a variable is missing or not a number
                raise ConfigError(f"the processes cannot connect: {error}") from None
            except RuntimeError as error:
                many = f"{os.environ['WORLD_SIZE']} processes did not connect within {timeout:,.0f} s"
                raise RankError(f"{many}: {error}", speaks=True) from error
            made = True
    if expect is not None and expect != world():
        found = world()
        if made:
            dist.destroy_process_group()
        raise ConfigError(
            f"{expect} processes were expected, {found} started: correct the command of the launcher "
            f"(torchrun --nproc-per-node {expect} -m inbatch ...)"
        )
    return made


def _init(backend: str, timeout: float) -> None:
    """Create the process group that the environment describes."""
    wait = datetime.timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=wait)
        return
    store, rank, world = next(rendezvous("env://", timeout=wait))
    store = dist.PrefixStore(fresh(store, rank, world, timeout), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)


@contextmanager
def process_group(
    expect: int | None = None, device: str = "cpu", timeout: float = _TIMEOUT, how: str = ""
) -> Iterator[None]:
    """Run all ranks within one group (`setup`); an error that ends one of them ends all, with its reason.

    how: how the work of a lost rank is continued; by default with --resume.
    """
    global _roll
    made, before = setup(expect, device, timeout), _roll
    try:
        if world() > 1:
            _roll = _new_roll(timeout, how)
        with shared_errors():
            yield
    except Exception as error:
        if made and not isinstance(error, Preempted | Interrupted):
            _hang_up()  # references to the group (DDP) outlive its end, and the others would wait for this process
            ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            # The store with its messages may be in rank 0, which then waits. If it is in the launcher, which ends all
            # ranks when one has ended, rank 0 ends first: it reports an error that all ranks have found.
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
    """Share an error raised within the context with the other ranks; if a rank is lost, raise an error that names it.

    Under NCCL most losses raise nothing: its watchdog ends the process after the timeout, with its own message.
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
        with suppress(RuntimeError):  # the store may be lost
            own = str(error) if isinstance(error, InbatchError) else f"{type(error).__name__}: {error}"
            _roll.tell(f"rank {rank()}: {own}", getattr(error, "exit_code", InbatchError.exit_code))
        raise


def _is_loss(error: BaseException) -> bool:
    """Return whether a collective failed; gloo has no error type, and errors of DDP are raised in the backward pass."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def _hang_up() -> None:
    """Close gloo's connections, so that ranks that wait for this one, not for the lost one, notice it now.

    After a failed context gloo closes nothing; on a timeout it closes everything.
    """
    if dist.get_backend() == "gloo":
        for other in range(world()):
            if other != rank():
                with suppress(RuntimeError):
                    waiting = dist.irecv(torch.empty(1), other)
                    if waiting is not None:
                        waiting.wait(datetime.timedelta(milliseconds=1))


def _new_roll(timeout: float, how: str = "") -> RankStore:
    store = dist.distributed_c10d._get_default_store()  # there is no other way to get the store of an existing group
    return RankStore(store, f"inbatch run {next(_RUNS)}", rank(), world(), timeout, how)


def interrupt(number: int) -> None:
    """Tell the other ranks, without waiting for them, that this one was stopped by a signal."""
    if _roll is not None:
        _roll.interrupt(number)


def interrupted() -> int:
    """Return the signal by which another rank was stopped; 0 without one."""
    return 0 if _roll is None else _roll.interrupted()


def advance(work: str, finished: bool = False) -> None:
    """Record that this rank goes on with some work, or has finished it, for the ranks that `follow` it."""
    if _roll is not None:
        _roll.advance(work, finished)


def follow(work: str, ranks: Iterable[int]) -> None:
    """Wait until ranks have finished some work, as long as each of them goes on; no collective, so no limit in all."""
    if _roll is not None:
        _roll.follow(work, ranks)


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


def assert_equal_across_ranks(facts: Mapping[str, object]) -> None:
    """Raise ConfigError with the differences if ranks differ in values that must be equal (recipe, data, version).

    A rank that ends before this call (for example without its image folder) ends the others immediately. No collective
    is used: the first one of NCCL would wait for that rank until its timeout.
    """
    if world() > 1:
        (_roll or _new_roll(_TIMEOUT)).meet({name: str(value) for name, value in facts.items()})


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
