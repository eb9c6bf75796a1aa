"""Run a function on several ranks (gloo, this machine) and return the result of each."""

import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# What the functions import, loaded once: a child that imports timm and pytest itself takes seconds, and the digits
# import scikit-learn. A process has one such server, and whoever starts it decides what it loads: every test that needs
# one takes this context.
_context.set_forkserver_preload([
    "torch.distributed", "inbatch.api", "inbatch.apps.cli", "timm", "sklearn.datasets", "numba", "pytest", "hypothesis",
    "small_methods",
])  # fmt: skip


def start_server() -> None:
    """Start the fork server as a fork of this process, which has imported everything; a new process takes seconds.

    The libraries may not have started threads yet. Where Python starts its server in another way, it is a new process.
    """
    multiprocessing.resource_tracker.ensure_running()  # a process of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.util, "spawnv_passfds", _fork, raising=False)
        multiprocessing.forkserver.ensure_running()


def _fork(program: bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
    """Run the Python code of a command line in a fork of this process, which keeps only these open files."""
    if child := os.fork():
        return child
    try:
        for below, above in itertools.pairwise([2, *sorted({*files} - {0, 1, 2}), os.sysconf("SC_OPEN_MAX")]):
            os.closerange(below + 1, above)
        exec(arguments[-1], {})
    finally:
        os._exit(1)


def _child(rank: int, world: int, rendezvous: str, function: Callable[..., Any], args: tuple, answers: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        answers.put((rank, function(*args), None))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the result of `function(*args)` on each of `world` ranks; numpy and plain types only."""
    with tempfile.TemporaryDirectory() as folder:
        answers = _context.Queue()
        children = [
            _context.Process(target=_child, args=(r, world, f"{folder}/meet", function, args, answers), daemon=True)
            for r in range(world)
        ]
        for child in children:
            child.start()
        results = {}
        for _ in children:
            rank, value, error = answers.get(timeout=120)
            if error:
                for child in children:
                    child.kill()
                raise AssertionError(f"rank {rank}:\n{error}")
            results[rank] = value
        for child in children:
            child.join(30)
    return [results[r] for r in range(world)]
