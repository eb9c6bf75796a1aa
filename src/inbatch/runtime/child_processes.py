"""Child processes that end when the process that started them ends, also if it is killed."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.util import Finalize
from typing import IO, Any

# Only the standard library: `apps/bench/worker.py` loads this file in a Python that may lack inbatch.

PARENT = "INBATCH_PARENT"
"""Environment variable by which `start` passes its process id to the program that it starts."""
STOP_SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT")
"""Names of the signals that stop a run; Windows lacks some.

SIGUSR1 and SIGUSR2 are warnings of schedulers before a time limit, SIGXCPU is that of the system (`ulimit -t`), and
SIGHUP means a closed terminal.
"""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL = 0.5  # seconds


def start(words: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a program that calls `end_with_parent` first, such as `inbatch`; options are those of `Popen`.

    The thread that calls this must outlive the program: Linux ends the program with that thread.
    """
    env = {**options.pop("env", os.environ), PARENT: str(os.getpid())}
    return subprocess.Popen(words, text=True, env=env, **options)


def start_reader(words: Sequence[str], log: IO[str]) -> "subprocess.Popen[str]":
    """Start a program that ends by itself after its standard input has ended, which a kill of this process ends, too.

    It is in a session of its own, so that signals to the job of this process do not reach it.

    Args:
        words: Command line.
        log: Open file that receives its standard error; its standard output is a pipe.
    """
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True)


def start_fork(task: Callable[..., None], *arguments: Any) -> "multiprocessing.process.BaseProcess":
    """Call a function in a fork of this process, which ends with it; only where the start method "fork" exists."""
    child = multiprocessing.get_context("fork").Process(
        target=_in_fork, args=(os.getpid(), task, arguments), daemon=True
    )
    child.start()
    return child


def _in_fork(parent: int, task: Callable[..., None], arguments: Sequence[Any]) -> None:
    end_with_parent(parent)
    task(*arguments)


def end_with_parent(parent: int | None = None) -> None:
    """Make the system kill this process as soon as its parent ends. Call it first in a child process.

    On Linux the kernel sends SIGKILL, also to a stopped process. On other POSIX systems, and if there is a wrapper
    between the two processes, a thread polls. Windows is not supported: nothing is done there.

    Args:
        parent: process id of the parent; by default the id passed by `start`; without one, nothing is done.
    """
    named = os.environ.pop(PARENT, "")  # not inherited by children of this process
    parent = parent or (int(named) if named.isdigit() else 0)
    if not parent or os.name != "posix":
        return
    above = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if sys.platform != "linux" or above != parent:
        threading.Thread(target=_watch, args=(above, parent), daemon=True).start()
    if not _is_alive(above, parent):  # it ended before the call to the kernel
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(above: int, parent: int) -> None:
    while _is_alive(above, parent):
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(above: int, parent: int) -> bool:
    """Return whether the parent and the process directly above (possibly a wrapper or a fork server) are alive."""
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
    """End a DataLoader worker with the process that reads from it (a `worker_init_fn`)."""
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else parent.pid)


def begin_worker(worker: int) -> None:
    """Like `follow`, and ignore signals (a `worker_init_fn` for workers that `end_workers` ends).

    A signal to the whole process group is handled by the trainer: it saves a checkpoint, then ends its workers.
    """
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    follow(worker)


def end_workers(batches: Any) -> None:
    """End the worker processes of an iterator over a DataLoader, if any, and wait for them.

    They ignore SIGTERM, by which multiprocessing ends its children at exit; without this call the exit would hang.
    """
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()


def batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a DataLoader with `begin_worker` workers, which end with this generator, or at exit."""
    iterator = iter(loader)
    end = Finalize(None, end_workers, (iterator,), exitpriority=10)
    try:
        yield from iterator
    finally:
        end()
