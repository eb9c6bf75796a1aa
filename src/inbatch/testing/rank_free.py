"""Test that a method does the same on every rank, and does not communicate."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from inbatch.distributed import LocalRowsWarning
from inbatch.errors import listed
from inbatch.testing.equation import Call
from inbatch.testing.memory import buffers, changed
from inbatch.testing.report import Finding
from inbatch.testing.trial import Trial

COMMUNICATION = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
    "broadcast_object_list", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "send", "all_to_all", "all_to_all_single",
)  # fmt: skip
"""Functions of torch.distributed that communicate."""


class Communication(RuntimeError):
    """The method communicates between processes."""


@contextmanager
def as_rank(rank: int, world: int = 2) -> Iterator[None]:
    """Make torch.distributed and the environment those of this rank; communication raises an error."""

    def refuse(name: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            raise Communication(name)

        return call

    answers = {"is_available": True, "is_initialized": True, "get_rank": rank, "get_world_size": world}
    patched: dict[str, Any] = {name: (lambda *a, value=value, **k: value) for name, value in answers.items()}
    patched |= {name: refuse(name) for name in COMMUNICATION}
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    with patch.multiple(dist, **patched), patch.dict(os.environ, names), warnings.catch_warnings():
        warnings.simplefilter("ignore", LocalRowsWarning)
        yield


def rank_free(trial: Trial) -> Finding:
    """Test that loss and after_step do the same on every rank, and do not communicate."""
    method, online, target, batch = trial.rows()
    calls, states = [Call(copy.deepcopy(method), online, target, batch)], []
    try:
        for rank in (0, 1):
            there = copy.deepcopy(method)
            with as_rank(rank):
                calls.append(Call(there, online, target, batch))
                with torch.no_grad():
                    there.store(calls[-1].state)
                    there.after_step(online, target, batch, 0.0)
            states.append(buffers(there))
    except Communication as error:
        return Finding("ranks", False, f"the method calls torch.distributed.{error}: its rows are those of the whole "
                       "batch on every rank already, so that a sum over ranks counts every sample several times. "
                       "Remove the communication")  # fmt: skip
    if not (calls[0].equals(calls[1]) and calls[0].equals(calls[2])):
        values = ", ".join(f"{call.value:.6g}" for call in calls)
        return Finding("ranks", False, f"loss depends on the rank ({values} in one process, on rank 0 and on rank 1 of "
                       "2): its rows are those of the whole batch on every rank, so it must not take a rank's part of "
                       "them, or read the rank")  # fmt: skip
    if names := changed(*states):
        return Finding("ranks", False, f"after_step depends on the rank: {listed(names)} would differ between ranks, "
                       "and only those of rank 0 are saved")  # fmt: skip
    return Finding("ranks", True, "loss and after_step do not depend on the rank and do not communicate")
