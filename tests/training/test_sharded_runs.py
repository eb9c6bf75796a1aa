"""Sharded runs from the first step to the encoder: stopped, resumed on other ranks, compiled, and with a lost rank."""

import contextlib
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import on_ranks
from small_runs import leave_out_evaluation, tiny
from test_sharded_checkpoints import leaves

import inbatch
from inbatch.errors import Preempted
from inbatch.runtime import distributed
from inbatch.training import checkpoint

VIT = {
    "encoder": "vit_tiny_patch16_224", "image_size": 32, "preset": "digits", "subset": 80, "batch_size": 16,
    "context": 4, "evaluate_every": 1, "workers": 0,
}  # fmt: skip
SMALL = {
    "encoder.depth": 2,
    "encoder.embed_dim": 24,
    "encoder.patch_size": 8,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
}


class StopAt(inbatch.Callback):
    """Send this process a signal after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, moment: inbatch.Moment) -> None:
        assert bool(next(moment.encoder.parameters()).isfinite().all())
        if moment.step == self.step and moment.rank == 1 % moment.world:
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    out: Path, method: str = "byol", stop: int | None = None, more: Mapping[str, Any] | None = None, **fields: Any
) -> None:
    fields |= {"epochs": 1, "subset": 32} | dict(more) if more else {}
    callbacks = [StopAt(stop)] if stop else []
    settings = SMALL | fields.pop("settings", {}) if fields.get("encoder", "vit").startswith("vit") else {}
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(*([Preempted] if stop else [])):
        leave_out_evaluation(patch)
        tiny(method, out, settings=settings, callbacks=callbacks, **(VIT | {"shard": True} | fields))


def state(out: Path) -> list[Any]:
    saved = checkpoint.load(out / "checkpoints").state
    return [x.double().numpy() for part in ("network", "target", "method", "optimizer") if part in saved
            for x in leaves(saved[part]) if isinstance(x, torch.Tensor)]  # fmt: skip


def largest_difference(a: Path, b: Path) -> float:
    one, two = state(a), state(b)
    assert len(one) == len(two) > 50
    return max(float(np.abs(x - y).max(initial=0.0)) for x, y in zip(one, two, strict=True))


def run_and_stop(folder: Path) -> None:
    run(folder / "whole", curate="redraw")
    run(folder / "stopped", stop=7, curate="redraw")
    if distributed.rank() == 0:
        for name in ("one", "without"):
            shutil.copytree(folder / "stopped", folder / name)


def go_on(folder: Path) -> None:
    run(folder / "stopped", resume=True)
    run(folder / "without", resume=True, shard=False)


@pytest.mark.slow
def test_a_run_is_resumed_on_the_same_ranks_on_one_and_without_shards(tmp_path: Path) -> None:
    """With curation, whose copy of the network is divided, too."""
    on_ranks(2, run_and_stop, tmp_path)
    on_ranks(2, go_on, tmp_path)
    assert largest_difference(tmp_path / "whole", tmp_path / "stopped") == 0
    run(tmp_path / "one", resume=True)
    for name in ("one", "without"):
        assert largest_difference(tmp_path / "whole", tmp_path / name) < 2e-5, name
    for name in ("whole", "one"):
        encoder = inbatch.load(tmp_path / name)
        assert np.isfinite(encoder.embed(np.zeros((2, 32, 32), np.uint8))).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "compile": {"compile": True}, "compile and again": {"compile": True, "checkpoint_activations": True},
    "bf16": {"precision": "bf16"}, "bf16 and again": {"precision": "bf16", "checkpoint_activations": True},
    "norm and again": {"encoder": "resnet10", "checkpoint_activations": True},
    "norm": {"encoder": "resnet10", "sync_norm": True, "context": 8},
    "sampler": {"sampler": "neighbours", "epochs": 2, "encoder": "tiny"},
    "curated": {"curate": "redraw", "epochs": 2, "settings": {"curate.model": "live"}},
    "auto": {"context": "auto"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_work_with_shards(tmp_path: Path, name: str) -> None:
    on_ranks(2, run, tmp_path, "simclr", None, OPTIONS[name])
    assert inbatch.load(tmp_path).width > 0


def run_for_a_minute(out: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        return inbatch.pretrain(
            "digits-canvas", out=out, encoder="tiny", shard=True, budget="1m", subset=80, batch_size=16, image_size=20,
            workers=0, quiet=True,
        ).result  # fmt: skip


@pytest.mark.slow
def test_budget_works_with_shards(tmp_path: Path) -> None:
    """All ranks time the same steps; rank 0 alone times evaluations, of the gathered encoder."""
    first, second = on_ranks(2, run_for_a_minute, tmp_path)
    assert first == second and first["world"] == 2 and first["recipe"]["shard"]
    assert 30 < first["wall_seconds"] < 65 and first["steps"] > 5
