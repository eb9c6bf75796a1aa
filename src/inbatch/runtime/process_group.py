"""The process group of a run: its start and its end, and the errors, signals and settings that its ranks share."""

import datetime
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from inbatch.errors import ConfigError, InbatchError, Interrupted, Preempted, RankError, TrainingError
from inbatch.runtime.distributed import rank, world
from inbatch.runtime.rank_store import RankStore, new_prefix
from inbatch.runtime.resources import launched
from inbatch.runtime.signals import StopRequested

_TIMEOUT = 1800.0
_LINGER = 2.0
_RUNS = itertools.count()  # all ranks count the same runs
_store: RankStore | None = None
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
    created = False
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
                raise ConfigError(f"the processes cannot connect: {error}; start them with torchrun") from None
            except RuntimeError as error:
                many = f"{os.environ['WORLD_SIZE']} processes did not connect within {timeout:,.0f} s"
                raise RankError(f"{many}: {error}", reports_for_all=True) from error
            created = True
    if expect is not None and expect != world():
        started = world()
        if created:
            dist.destroy_process_group()
        raise ConfigError(
            f"{expect} processes were expected, {started} started: correct the command of the launcher "
            f"(torchrun --nproc-per-node {expect} -m inbatch ...)"
        )
    return created


def _init(backend: str, timeout: float) -> None:
    """Create the process group that the environment describes."""
    wait = datetime.timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=wait)
        return
    store, number, count = next(rendezvous("env://", timeout=wait))
    store = dist.PrefixStore(new_prefix(store, number, count, timeout), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=wait)


@contextmanager
def process_group(
    expect: int | None = None, device: str = "cpu", timeout: float = _TIMEOUT, how: str = ""
) -> Iterator[None]:
    """Run all ranks within one group (`setup`); an error that ends one of them ends all, with its reason.

    how: how the work of a lost rank is continued; by default with --resume.
    """
    global _store
    created, before = setup(expect, device, timeout), _store
    try:
        if world() > 1:
            _store = _new_store(timeout, how)
        with shared_errors():
            yield
    except Exception as error:
        if created and not isinstance(error, Preempted | Interrupted):
            # References to the group (DDP) outlive its end, and the others would wait for this process.
            _close_connections()
            ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            # The store with its messages may be in rank 0, which then waits. If it is in the launcher, which ends all
            # ranks when one has ended, rank 0 ends first: it reports an error that all ranks have found.
            shared = isinstance(error, ConfigError | TrainingError) and not error.alone
            if rank() == 0 if ours else rank() and shared:
                time.sleep(_LINGER)
        raise
    finally:
        _store = before
        if created:
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
        if _store is None:
            raise
        if _is_loss(error):
            _close_connections()
            raise _store.find_failure() from error
        with suppress(RuntimeError):  # the store may be lost
            known = isinstance(error, InbatchError | StopRequested)
            own = str(error) if known else f"{type(error).__name__}: {error}"
            _store.report(f"rank {rank()}: {own}", getattr(error, "exit_code", InbatchError.exit_code))
        raise


def _is_loss(error: BaseException) -> bool:
    """Return whether a collective failed; gloo has no error type, and errors of DDP are raised in the backward pass."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def _close_connections() -> None:
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


def _new_store(timeout: float, how: str = "") -> RankStore:
    store = dist.distributed_c10d._get_default_store()  # there is no other way to get the store of an existing group
    return RankStore(store, f"inbatch run {next(_RUNS)}", rank(), world(), timeout, how)


def interrupt(number: int) -> None:
    """Tell the other ranks, without waiting for them, that this one was stopped by a signal."""
    if _store is not None:
        _store.interrupt(number)


def interrupted() -> int:
    """Return the signal by which another rank was stopped; 0 without one."""
    return 0 if _store is None else _store.interrupted()


def advance(work: str, finished: bool = False) -> None:
    """Record that this rank goes on with some work, or has finished it, for the ranks that `follow` it."""
    if _store is not None:
        _store.advance(work, finished)


def follow(work: str, ranks: Iterable[int]) -> None:
    """Wait until ranks have finished some work, as long as each of them goes on; no collective, so no limit in all."""
    if _store is not None:
        _store.follow(work, ranks)


def assert_equal_across_ranks(facts: Mapping[str, object]) -> None:
    """Raise ConfigError with the differences if ranks differ in values that must be equal (recipe, data, version).

    A rank that ends before this call (for example without its image folder) ends the others immediately. No collective
    is used: the first one of NCCL would wait for that rank until its timeout.
    """
    if world() > 1:
        (_store or _new_store(_TIMEOUT)).compare_facts({name: str(value) for name, value in facts.items()})
