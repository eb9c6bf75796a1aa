"""Runs whose batches are composed by a sampler: they resume, repeat on ranks, and are refused if they cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run as run_line
from rank_pool import on_ranks
from small_runs import assert_same_state, saved, stop_after, tiny

from inbatch import api
from inbatch.data.samplers import SAMPLERS
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.training.survey import survey

HARD = {"sampler.size": 3, "sampler.candidates": 4}


def test_resuming_is_bit_exact(brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an epoch whose batches follow from the features at its start."""
    tiny("simclr", tmp_path / "whole", sampler="neighbours", settings=HARD, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 7)
        tiny("simclr", tmp_path / "cut", sampler="neighbours", settings=HARD, epochs=2)
    tiny("simclr", tmp_path / "cut", resume=True)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    near = saved(tmp_path / "whole")["sampler"]["near"]
    assert near.shape == (80, 4) and int(near.min()) >= 0


def composed(name: str) -> dict[str, Any]:
    """Return the batches of the second epoch of a run, as numbers to pass between processes."""
    options = HARD if name == "neighbours" else {"sampler.by": "cluster", "sampler.num_clusters": 4}
    built = api.prepare("digits-canvas", sampler=name, settings=options, subset=50, batch_size=10, context=5,
                        precision="float32")  # fmt: skip
    survey(built, 1)
    assert built.loader.sampler is not None and built.loader.sampler.state_dict()
    return {name: built.loader.sampler.order(1).tolist()}


@pytest.mark.parametrize("name", ["neighbours", pytest.param("balanced", marks=pytest.mark.slow)])
def test_ranks_compose_the_batches_of_one_process(name: str) -> None:
    alone = composed(name)
    assert on_ranks(2, composed, name) == [alone, alone]
    assert alone[name] != composed_at_random()


def composed_at_random() -> list[int]:
    built = api.prepare("digits-canvas", subset=50, batch_size=10, context=5)
    return torch.cat([batch.index for batch in built.loader.epoch(1)]).tolist()


def test_what_cannot_be_composed_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        api.prepare("digits-canvas", sampler="balance")
    with pytest.raises(ConfigError, match=r"sampler\.size must be at least 2"):
        api.prepare("digits-canvas", sampler="neighbours", settings={"sampler.size": 1})
    with pytest.raises(DataError, match="keeps groups apart, but digits-canvas has none"):
        api.prepare("digits-canvas", sampler="apart")
    assert set(SAMPLERS) == {"balanced", "apart", "neighbours"}
    done = run_line("pretrain --data digits-canvas --sampler balanced --epochs 1 --dry-run")
    assert done.exit_code == 0 and "balanced, by class, num_clusters 100, every 1; 10 batches" in done.stdout
