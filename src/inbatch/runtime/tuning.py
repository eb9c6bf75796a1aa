"""What a process sets for speed before it computes: allocator, threads, denormal numbers.

These hold for the whole process, so they are the program's to set (`inbatch ...`), or a script's that asks for it
(`inbatch.tune()`), never the library's.
"""

import ctypes
import os
import sys
import time

from inbatch.runtime.resources import affine, cores

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_PAD = 2**28
"""Bytes asked of the system at a time."""
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
"""Variables by which a user says how threads wait."""
_SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""Waiting threads sleep after some 20 microseconds (GNU's OpenMP) or at once (others).

GNU's default is to spin for milliseconds, so a thread whose core another process uses stops all others."""

_added: dict[str, str] = {}
"""What of it `begin` has put into the environment."""

started = time.monotonic()
"""When this module was loaded: by the program, as one of its first."""
tuned = False
"""Whether this process has been set up."""
keeps_memory = False
"""Whether freed memory is kept for the next step."""
_began: float | None = None
"""When the program began, until a command has taken it."""


def program_begins() -> None:
    """Note the time at which the program `inbatch` began: a budget counts from there."""
    global _began
    _began = time.perf_counter()


def command_began() -> float:
    """Return when the command that runs now began: the program's start, once, else now."""
    global _began
    began, _began = _began, None
    return time.perf_counter() if began is None else began


def tune() -> None:
    """Set this process up for training. Call it first, before anything is computed; twice is as once.

    Freed memory is kept by glibc's allocator instead of given back and cleared anew at every step: more memory is held
    for it, and INBATCH_ALLOCATOR=system leaves it alone. There are no more threads than the cores that a container's
    quota gives, where torch is not yet loaded and OMP_NUM_THREADS does not say how many. Waiting threads sleep soon, if
    torch is not yet loaded and none of OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME is set. A run on a CPU takes
    fewer threads while other processes are busy, if OMP_NUM_THREADS is not set (`runtime.threads`). Numbers too small
    to be normal count as 0, which some processors multiply much slower.
    """
    begin()
    ready()


def begin() -> None:
    """The part of `tune` that wants to come before torch is loaded, and needs no torch."""
    global tuned, keeps_memory
    if tuned:
        return
    tuned = True
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client, which timm loads, is loaded
    if os.environ.get("INBATCH_ALLOCATOR") != "system":
        keeps_memory = _keep_freed_memory()
    if "torch" in sys.modules:
        return  # its threads are set up when it is loaded
    if cores() < affine():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    if not _WAITING & os.environ.keys():
        os.environ.update(_SLEEP)
        _added.update(_SLEEP)


def untuned() -> dict[str, str]:
    """Return the environment without what says how threads wait, unless the user has said it: for other programs."""
    return {name: value for name, value in os.environ.items() if name not in _added}


def ready() -> None:
    """The rest, which needs torch; nothing in a process that nobody has begun to tune."""
    if tuned:
        import torch

        torch.set_flush_denormal(True)  # False where the processor cannot


def _keep_freed_memory() -> bool:
    """Whether the C library could be told to; it is glibc's alone."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD)))
