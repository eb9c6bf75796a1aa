"""Test of a method on two real ranks: processes with gloo on this machine, compared with one process."""

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from inbatch.errors import reason
from inbatch.runtime import child_processes
from inbatch.testing.report import Finding
from inbatch.testing.training import TOLERANCE
from inbatch.testing.trial import State, Trial, difference

WORLD, TIMEOUT = 2, 600.0


class RanksUnavailable(Exception):
    """Ranks cannot be started here."""


def ranks(trial: Trial) -> Finding:
    """Test that two ranks give the state of one process with two context groups."""
    expected = trial.train(trial.parts(), groups=WORLD)
    try:
        states = _on_ranks(trial)
    except RanksUnavailable as error:
        return Finding("two ranks", None, f"not run: {error}")
    except RuntimeError as error:
        return Finding("two ranks", False, f"a run on two ranks ends with an error: {error}")
    for rank, state in enumerate(states):
        gap, where = difference(state, expected)
        if not gap < TOLERANCE:
            return Finding("two ranks", False, f"rank {rank} of 2 differs from one process by {gap:.2g} in {where}: a "
                           "statistic of a rank's own rows must not be kept without the other ranks'. The loss and "
                           "after_step get the rows of the whole batch; compute it there, into a buffer. The "
                           "constructor must also give the same weights and values in every process")  # fmt: skip
    return Finding("two ranks", True, "two ranks end with the state of one process")


def rank_state(trial: Trial, rank: int, folder: str) -> State:
    """Return the state of this process as one of the ranks."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)  # ranks draw different numbers
    try:
        return trial.train(trial.parts())
    finally:
        dist.destroy_process_group()


def _write(trial: Trial, rank: int, folder: str) -> None:
    """Write the state of a rank, or its error, to the folder."""
    try:
        torch.save(rank_state(trial, rank, folder), f"{folder}/{rank}.pt.new")
        os.replace(f"{folder}/{rank}.pt.new", f"{folder}/{rank}.pt")
    except BaseException as error:
        Path(folder, f"{rank}.error").write_text(reason(error))
        os._exit(1)


def _on_ranks(trial: Trial) -> list[State]:
    """Return the state of every rank; in new interpreters if they can import the method, else in forks."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise RanksUnavailable("this build of PyTorch has no gloo")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        start = _imported if _importable(trial.make) else _forked
        alive = [start(trial, rank, folder, stack) for rank in range(WORLD)]
        end = time.monotonic() + TIMEOUT
        while any(poll() for poll in alive) and not list(Path(folder).glob("*.error")) and time.monotonic() < end:
            time.sleep(0.02)
        if errors := sorted(Path(folder).glob("*.error")):
            raise RuntimeError(errors[0].read_text())
        files = [Path(folder, f"{rank}.pt") for rank in range(WORLD)]
        if not all(file.exists() for file in files):
            raise RuntimeError(f"a rank ended without a result, or did not end within {TIMEOUT:.0f} s")
        return [torch.load(file, weights_only=True) for file in files]


def _importable(make: Callable[..., Any]) -> bool:
    module = sys.modules.get(make.__module__)
    return make.__module__ != "__main__" and getattr(module, make.__qualname__, None) is make


def _imported(trial: Trial, rank: int, folder: str, stack: contextlib.ExitStack) -> Callable[[], bool]:
    """Start a new interpreter for a rank; return a function that returns whether it runs."""
    tuples = [name for name, value in trial.options.items() if isinstance(value, tuple)]
    facts = {
        "path": sys.path, "module": trial.make.__module__, "name": trial.make.__qualname__, "options": trial.options,
        "tuples": tuples, "batch": trial.batch, "count": trial.count, "rank": rank, "folder": folder,
    }  # fmt: skip
    code = "import json, sys; facts = json.load(sys.stdin); sys.path[:] = facts['path']; "
    code += "from inbatch.runtime.child_processes import end_with_parent; end_with_parent(); "
    code += "from inbatch.testing.ranks import main; main(facts)"
    process = child_processes.start(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdin is not None
    with process.stdin as pipe:
        json.dump(facts, pipe)
    return lambda: process.poll() is None


def main(facts: dict[str, Any]) -> None:
    """Run a rank in a new interpreter."""
    options = {name: tuple(x) if name in facts["tuples"] else x for name, x in facts["options"].items()}
    make = getattr(importlib.import_module(facts["module"]), facts["name"])
    _write(Trial(make, options, facts["batch"], facts["count"]), facts["rank"], facts["folder"])


def _forked(trial: Trial, rank: int, folder: str, stack: contextlib.ExitStack) -> Callable[[], bool]:
    """Fork this process for a rank of a method that was defined in a script, a notebook or a function."""
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin" or torch.cuda.is_initialized():
        raise RanksUnavailable(f"other processes cannot import {trial.make.__qualname__}: define it in a module")
    process = child_processes.start_fork(_write, trial, rank, folder)
    stack.callback(process.join)
    stack.callback(process.kill)
    return process.is_alive
