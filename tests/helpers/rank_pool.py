"""Run a function on several ranks (gloo, this machine) and return the result of each."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

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
        found = {}
        for _ in children:
            rank, value, error = answers.get(timeout=120)
            if error:
                for child in children:
                    child.kill()
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = value
        for child in children:
            child.join(30)
    return [found[r] for r in range(world)]
