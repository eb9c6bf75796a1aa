"""Calls in a process that is not ours: the state they need, and the caller's state restored afterwards.

Results must not depend on the mode in which the caller's code runs (`no_grad`, `autocast`, a default of float64), and
the caller must not find another state of its random generators, settings or handlers than before.
"""

import functools
import logging
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from inbatch.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_QUIET = ("PIL.TiffImagePlugin", "tifffile")
"""Loggers of decoders: a damaged file raises an error that names it, and no second message is needed."""
_POLL = 0.05  # seconds

_turn = threading.RLock()
_holder: str | None = None
"""The run that holds `_turn`, for the message to others; None for calls that end soon."""


def _forked() -> None:
    """Give a forked child its own turn: the run of another thread continues in the parent only."""
    global _turn, _holder
    _turn, _holder = threading.RLock(), None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function that computes for long: one at a time in a process, in `usual_state`.

    Raises:
        ConfigError: If another thread of the process is inside such a function.
    """
    return _decorated(function, long=True)


def briefly_isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function that ends soon: as `isolated`, but calls in several threads wait for each other."""
    return _decorated(function, long=False)


def _decorated(function: Callable[P, R], long: bool) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with _alone(function.__name__, long), usual_state():
            return function(*args, **options)

    return call


@contextmanager
def _alone(name: str, long: bool) -> Iterator[None]:
    """Hold the turn of this process; raise ConfigError if a long call of another thread holds it.

    Generators, number of threads and flags of torch belong to the process, so two runs would change each other's bits.
    """
    global _holder
    turn = _turn  # of this process: a forked child has another
    while not turn.acquire(timeout=_POLL):
        if (holder := _holder) is not None:
            raise ConfigError(
                f"{name} was called while {holder} of this process, and both use the same random generators and "
                "settings of torch: wait for its end, or call it in another process"
            )
    before = _holder
    try:
        if long and before is None:
            _holder = f"{name} runs in the thread {threading.current_thread().name!r}"
        yield
    finally:
        _holder = before
        turn.release()


@contextmanager
def usual_state() -> Iterator[None]:
    """Compute with gradients, in float32 and without autocast; restore on exit what this or the work has changed.

    Restored are the generators of torch, NumPy and `random`, the number of threads, the filters of warnings, the levels
    of loggers and the environment variables. Signal handlers are restored by `signals.stop_on_signals`.
    """
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if torch.cuda.is_initialized():
            stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state())
        stack.callback(_restore_threads, torch.get_num_threads())
        stack.callback(_restore_environment, dict(os.environ))
        for name in _QUIET:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(usual_numerics())
        yield


@contextmanager
def usual_numerics() -> Iterator[None]:
    """Compute with gradients, in float32, on the CPU unless stated, and without autocast, in any mode of the caller."""
    with ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.enable_grad())
        yield


def _restore_threads(before: int) -> None:
    if torch.get_num_threads() != before:  # setting the same number would also change settings of MKL
        torch.set_num_threads(before)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
