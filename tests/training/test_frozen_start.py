"""Frozen start: at first only the heads learn; the encoder keeps every weight and every statistic."""

import copy
from pathlib import Path

import pytest
import torch
from rank_pool import on_ranks
from small_methods import VARIANTS, literal, train
from small_runs import assert_same_state, saved, stop_after, tiny
from step_states import N, assert_same

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, Preempted
from inbatch.training import checkpoint

FROZEN = {"schedule.freeze_encoder_epochs": 1, "schedule.warmup_epochs": 0}


@pytest.mark.grid(4)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_groups_equal_plain_autograd(variant: str, groups: int) -> None:
    assert_same(train(variant, N, groups, 3, frozen=2), literal(variant, N, groups, 3, frozen=2))


def train_frozen(variant: str, groups: int) -> dict:
    return train(variant, N, groups, 3, frozen=2)


@pytest.mark.parametrize(
    ("variant", "world", "groups"),
    [("byol", 2, 2), *(pytest.param(v, w, g, marks=pytest.mark.slow) for v in VARIANTS for w, g in ((2, 1), (4, 1)))],
)
def test_ranks_equal_plain_autograd(variant: str, world: int, groups: int) -> None:
    for result in on_ranks(world, train_frozen, variant, groups):
        assert_same(result, literal(variant, N, world * groups, 3, frozen=2))


def test_the_encoder_keeps_weights_and_statistics() -> None:
    """Also with a number of groups whose mean of equal values is rounded, and with a target network."""
    options = {"subset": 90, "batch_size": 30, "context": 10, "epochs": 3, "device": "cpu"}
    settings = {"method.queue_size": 60, "method.momentum": 0.9, "schedule.freeze_encoder_epochs": 1}
    built = api.prepare("digits-canvas", "moco", settings=settings, **options)
    before = {k: x.clone() for k, x in built.encoder.state_dict().items()}
    heads = [p.detach().clone() for p in built.network.heads.parameters()]
    assert built.step.frozen == 3
    for step, batch in enumerate(built.loader.epoch(0)):
        built.step(batch, step)
    for encoder in (built.encoder, built.target.encoder):
        assert_same_state(encoder.state_dict(), before)
    assert not any(map(torch.equal, heads, built.network.heads.parameters()))
    assert not any(p in built.optimizer.state for p in built.encoder.parameters())
    built.step(next(iter(built.loader.epoch(1))), 3)
    after = built.encoder.state_dict()
    assert not any(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 7])
def test_a_resumed_run_is_the_same(stop: int, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("byol", tmp_path / "whole", settings=FROZEN)
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(Preempted):
            tiny("byol", tmp_path / "parts", settings=FROZEN)
    tiny("byol", tmp_path / "parts", settings=FROZEN, resume=True)
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


def test_state_restored_within_the_start_continues_bit_for_bit() -> None:
    """Parts without an optimiser state for the encoder, as saved then, are accepted and continue in the same way."""
    options = {"subset": 80, "batch_size": 20, "context": 10, "epochs": 2, "device": "cpu"}
    settings = {"method.hidden_dim": 8, "method.out_dim": 8} | FROZEN
    whole, parts = (api.prepare("digits-canvas", "byol", settings=settings, **options) for _ in range(2))
    batches = [*whole.loader.epoch(0), next(iter(whole.loader.epoch(1)))]
    for step, batch in enumerate(batches):
        if step == 2:
            state = {name: copy.deepcopy(part.state_dict()) for name, part in whole.parts().items()}
            checkpoint.restore(parts.parts(), state)
        whole.step(batch, step)
        if step >= 2:
            parts.step(batch, step)
    for name, part in parts.parts().items():
        assert_same_state(part.state_dict(), whole.parts()[name].state_dict(), name)


def test_wrong_lengths_are_refused() -> None:
    def built(**settings: float) -> object:
        named = {key.replace("_", ".", 1): value for key, value in settings.items()}
        return api.prepare("digits-canvas", "simclr", settings=named, subset=80, batch_size=40, epochs=2, device="cpu")

    with pytest.raises(ConfigError, match=r"freeze_encoder_epochs = 2 freezes the encoder in all 4 steps"):
        built(schedule_freeze_encoder_epochs=2)
    with pytest.raises(ConfigError, match=r"freeze_encoder_epochs = -1"):
        built(schedule_freeze_encoder_epochs=-1)
    assert inbatch.dry_run("digits-canvas", subset=80, batch_size=40, epochs=2, settings=FROZEN)["description"].count(
        "encoder frozen for 2 steps"
    )


def test_a_length_in_steps_limits_it_to_a_tenth() -> None:
    options = {"subset": 80, "batch_size": 40, "steps": 30, "device": "cpu"}
    built = api.prepare("digits-canvas", "simclr", settings={"schedule.freeze_encoder_epochs": 9}, **options)
    assert built.step.frozen == 3
