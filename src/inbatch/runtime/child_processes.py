"""Child processes end when the process that started them ends, also if it is killed."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.util import Finalize
from typing import Any

# Only the standard library: `bench/contest.py` loads this file in a Python that may have no inbatch.

PARENT = "INBATCH_PARENT"
"""Environment variable by which `start` passes its process id to the program that it starts."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL = 0.5  # seconds


def start(words: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a program that calls `end_with_parent` first, such as `inbatch`; options are those of `Popen`.

    The thread that calls this must outlive the program: Linux ends the program with that thread.
    """
    env = {**options.pop("env", os.environ), PARENT: str(os.getpid())}
    return subprocess.Popen(words, text=True, env=env, **options)


def end_with_parent(parent: int | None = None) -> None:
    """Make the system kill this process as soon as its parent ends. Call it first in a child process.

    On Linux the kernel sends SIGKILL, also to a process that is halted. On other POSIX systems, and if a wrapper stands
    between the two processes, a thread polls. Nothing is done on Windows.

    Args:
        parent: process id of the parent; by default what `start` passed, and without that nothing is done.
    """
    named = os.environ.pop(PARENT, "")  # not for the children of this process
    parent = parent or (int(named) if named.isdigit() else 0)
    if not parent or os.name != "posix":
        return
    above = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if sys.platform != "linux" or above != parent:
        threading.Thread(target=_watch, args=(above, parent), daemon=True).start()
    if not _lives(above, parent):  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(above: int, parent: int) -> None:
    while _lives(above, parent):
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(above: int, parent: int) -> bool:
    """Whether the parent lives, and the process directly above, which may be a wrapper or a server of forks."""
    if os.getppid() != above:
        return False
    try:
        os.kill(parent, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def follow(worker: int) -> None:
    """A `worker_init_fn` of torch's DataLoader: the worker ends with the process that reads from it."""
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)


def begin_worker(worker: int) -> None:
    """A `worker_init_fn` for workers that `end_workers` ends: they also ignore signals.

    A signal to the whole process group is the trainer's to answer: it saves a checkpoint, then ends its workers.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    follow(worker)


def end_workers(batches: Any) -> None:
    """End the worker processes of an iterator over a DataLoader, if it has any, and wait for them.

    They ignore SIGTERM, by which multiprocessing ends its children at exit; without this the exit would wait forever.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a DataLoader whose workers call `begin_worker`: they end with this generator, or at exit."""
    found = iter(loader)
    end = Finalize(None, end_workers, (found,), exitpriority=10)
    try:
        yield from found
    finally:
        end()
