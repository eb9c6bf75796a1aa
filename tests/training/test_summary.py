"""Estimates of a dry run compared with the real costs of a run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inbatch.api import prepare
from inbatch.errors import ConfigError
from inbatch.training import size_estimate, summary
from inbatch.training.build import RunComponents


def built(method: str = "simclr", **settings: Any) -> RunComponents:
    requested = {"subset": 200, "batch_size": 64, "method.queue_size": 640} | {
        k.replace("__", "."): v for k, v in settings.items()
    }
    if method != "moco":
        del requested["method.queue_size"]
    return prepare("digits-canvas", method, settings=requested, device="cpu")


def total(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.grid(2)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "adam"])
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_bytes_are_those_of_a_real_step(method: str, optimizer: str) -> None:
    run = built(method, optimizer__name=optimizer, optimizer__lr=0.01)
    memory = size_estimate.estimate(run)["memory_bytes_estimate"]
    run.step(next(iter(run.loader.epoch(0))), 0)
    states = (x for state in run.optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim)
    assert memory["optimiser"] == pytest.approx(total(states), rel=1e-3)
    assert memory["gradients"] == total(p.grad for p in run.network.parameters() if p.requires_grad)
    assert memory["target_network"] == (total(run.target.state_dict().values()) if run.target else 0)
    assert memory["method"] == pytest.approx(640 * 128 * 4 if method == "moco" else 0, abs=64)
    assert memory["sum"] == sum(value for name, value in memory.items() if name != "sum")


@pytest.mark.parametrize("context", [16, 64])
def test_activations_are_those_of_a_whole_group(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are measured on a few samples, and depend on the context, not on the batch."""

    def activations() -> int:
        return size_estimate.estimate(built(context=context))["memory_bytes_estimate"]["activations_of_a_group"]

    estimate = activations()
    monkeypatch.setattr(size_estimate, "_SAMPLES", context)  # not linear: the group itself is measured
    assert estimate == pytest.approx(activations(), rel=1e-3)


def test_the_warm_up_is_that_of_the_run() -> None:
    run = built(steps=20, schedule__warmup_epochs=5)  # limited to two of three steps an epoch
    assert "warm-up of 0.667 epochs" in summary.describe(run)
    rates = []
    for step in range(3):
        run.step.schedule(run.optimizer, step)
        rates.append(run.optimizer.param_groups[0]["lr"] / run.lr)
    assert rates == [0, 0.5, 1]
    with pytest.raises(ConfigError, match=r"schedule.warmup_epochs = 5 is longer than the run of 2 epochs"):
        built(epochs=2, schedule__warmup_epochs=5)


def test_settings_without_effect_are_noted() -> None:
    for settings, words in (
        ({"grow_from": 0.5}, "grow_from = 0.5 has no effect with grow_until = 0"),
        ({"grow_until": 0.5}, "grow_from = 1 has no effect with grow_until = 0.5"),
        ({"schedule__milestones": [0.5]}, "schedule.milestones has no effect with schedule.name = cosine"),
        ({"schedule__end": 0.1, "schedule__name": "step"}, "schedule.end has no effect with schedule.name = step"),
    ):
        assert [note for note in built(**settings).notes if note.startswith(words)], words
    assert not built(grow_from=0.5, grow_until=0.5, schedule__end=0.1).notes


def test_shapes_and_parameters() -> None:
    run = built("supervised")
    estimate = size_estimate.estimate(run)
    assert estimate["parameters"] == {"encoder": 74_400, "classifier": 96 * 10 + 10}
    images = run.step.views(next(iter(run.loader.epoch(0))))
    assert estimate["views"] == [list(image.shape) for image in images]
    with torch.no_grad():
        rows = run.network(images)
    assert estimate["rows"] == {name: list(x.shape) for name, x in rows.items()}


def test_recipe_as_text() -> None:
    words = summary.describe(built(context=16, schedule__scaling="linear", optimizer__lr=0.3))
    assert "64 = 4 context groups of 16" in words and "lr 0.075 = 0.3 x 64/256" in words
