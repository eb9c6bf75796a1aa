"""Process settings for speed, made before computing: allocator, threads, denormal numbers.

They affect the whole process, so only the program (`inbatch ...`) or a script that requests it (`inbatch.tune()`)
sets them, never the library.
"""

import ctypes
import os
import sys
import time

from inbatch.runtime.paths import variable
from inbatch.runtime.resources import affine, cores

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h
_PAD = 2**28
"""Bytes requested from the system at a time."""
_WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
"""Variables by which a user sets how threads wait."""
_SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""Waiting threads sleep after about 20 microseconds (GNU's OpenMP) or immediately (others).

GNU's default is to spin for milliseconds, so a thread that shares its core with another process delays all others.
"""

_added: dict[str, str] = {}
"""Variables that `begin` has added to the environment."""

started = time.monotonic()
"""Time at which this module was loaded: one of the first modules of the program."""
tuned = False
"""Whether this process has been set up."""
keeps_memory = False
"""Whether freed memory is kept for the next step."""
_began: float | None = None
"""Time at which the program started, until `command_began` returns it."""


def program_begins() -> None:
    """Record the start time of the program `inbatch`: a budget counts from there."""
    global _began
    _began = time.perf_counter()


def command_began() -> float:
    """Return when the current command started: the start of the program in the first call, else now."""
    global _began
    began, _began = _began, None
    return time.perf_counter() if began is None else began


def tune() -> None:
    """Set this process up for training. Call it first, before any computation; repeated calls have no effect.

    Freed memory is kept by glibc's allocator instead of being returned and cleared at every step: the process holds
    more memory; INBATCH_ALLOCATOR=system disables this. The number of threads is limited to the cores of a container's
    quota, if torch is not yet loaded and OMP_NUM_THREADS is not set. Waiting threads sleep soon, if torch is not yet
    loaded and none of OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME is set. A run on a CPU uses fewer threads while
    other processes are busy, if OMP_NUM_THREADS is not set (`inbatch.runtime.threads`). Denormal numbers, which some
    processors multiply much more slowly, count as 0.
    """
    begin()
    keep_memory()
    ready()


def begin() -> None:
    """Do the part of `tune` that should precede the import of torch and does not need it."""
    global tuned
    if tuned:
        return
    tuned = True
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the hub's client, which timm loads, is loaded
    if "torch" in sys.modules:
        return  # its threads are set up when it is loaded
    if cores() < affine() and not variable("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(cores())
    if not any(map(variable, _WAITING)):
        os.environ.update(_SLEEP)
        _added.update(_SLEEP)


def keep_memory() -> None:
    """Keep freed memory for the next step; nothing if `begin` was not called."""
    global keeps_memory
    if tuned and not keeps_memory and variable("INBATCH_ALLOCATOR") != "system":
        keeps_memory = _keep_freed_memory()


def without_tuning() -> dict[str, str]:
    """Return the environment for other programs, without the variables on waiting threads that `begin` added."""
    return {name: value for name, value in os.environ.items() if name not in _added}


def ready() -> None:
    """Do the rest of `tune`, which needs torch; nothing if `begin` was not called."""
    if tuned:
        import torch

        torch.set_flush_denormal(True)  # False if the processor does not support it


def _keep_freed_memory() -> bool:
    """Return whether the C library accepted the settings; glibc only."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD)))
