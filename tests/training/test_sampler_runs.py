"""Runs whose batches are composed by a sampler: they resume, repeat on ranks, and are refused if they cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
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
    with pytest.raises(ConfigError, match=r"keeps its recipe: sampler\.name = 'apart' \(the run has 'neighbours'\)"):
        tiny("simclr", tmp_path / "cut", sampler="apart", resume=True)
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


def test_the_user_reads_what_has_no_effect(tmp_path: Path) -> None:
    """Neighbours in the only epoch, and groups that no plug-in uses; a dry run has all sentences of a run."""
    file = tmp_path / "v.npz"
    np.savez(file, images=np.random.default_rng(0).integers(256, size=(16, 8, 8, 3), dtype=np.uint8),
             video=[0] * 6 + list(range(10)))  # fmt: skip
    fields: dict[str, Any] = {
        "encoder": "tiny",
        "batch_size": 4,
        "image_size": 8,
        "settings": {"group_column": "video"},
    }

    def description(**more: Any) -> str:
        dry = api.dry_run(file, "simclr", **fields | more)["description"]
        return " ".join(dry.split())

    idle, unused = "The sampler has no effect", "group_column = video: this run does not use the groups"
    alone = description(epochs=1, sampler="neighbours")
    assert idle in alone and unused in alone
    assert idle not in description(epochs=2, sampler="neighbours") and unused in description(epochs=1)
    late = "Curation has no effect: it begins with epoch 2"
    assert late in description(epochs=1, curate="redraw") and late not in description(epochs=2, curate="redraw")
    epochs = {"method.queue_size": 8, "method.queue_start_epoch": 5, "method.freeze_prototypes_epochs": 0}
    swav = fields | {"settings": fields["settings"] | epochs}
    late = "method.queue_start_epoch = 5: the queue is filled only from epoch 6 on, after the end of the run"
    for length, said in ((5, True), (6, False)):
        dry = api.dry_run(file, "swav", **swav, epochs=length)["description"]
        assert (late in " ".join(dry.split())) == said
    apart = description(epochs=1, sampler="apart")
    assert unused not in apart and idle not in apart and "leaves out 4 images" in apart
    assert unused not in description(epochs=1, negatives="drop-similar")
    by_features = fields["settings"] | {"negatives.by": "features"}
    assert unused in description(epochs=1, negatives="drop-similar", settings=by_features)


def test_invalid_samplers_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        api.prepare("digits-canvas", sampler="balance")
    with pytest.raises(ConfigError, match=r"sampler\.size must be at least 2"):
        api.prepare("digits-canvas", sampler="neighbours", settings={"sampler.size": 1})
    with pytest.raises(DataError, match="keeps groups apart, but digits-canvas has none"):
        api.prepare("digits-canvas", sampler="apart")
    with pytest.raises(ConfigError, match=r"sampler\.by = class balances classes: leave them out"):
        api.prepare("digits-canvas", sampler="balanced", settings={"sampler.every": 2})
    with pytest.raises(ConfigError, match=r"at most sampler\.candidates = 16 neighbours of it; choose at least 19"):
        api.prepare("digits-canvas", sampler="neighbours", settings={"sampler.size": 20})
    with pytest.raises(ConfigError, match=r"sampler apart has no setting 'by'; there are none"):
        api.prepare("digits-canvas", sampler="apart", settings={"sampler.by": "class"})
    with pytest.raises(ConfigError, match=r"sampler\.name = 'mine:Sampler' is unknown"):
        api.prepare("digits-canvas", sampler="mine:Sampler")
    assert set(SAMPLERS) == {"balanced", "apart", "neighbours"}
    done = run_line("pretrain --data digits-canvas --sampler balanced --epochs 1 --dry-run")
    assert done.exit_code == 0 and "balanced, by class; 10 batches" in done.stdout
