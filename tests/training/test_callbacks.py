"""Callbacks: what they receive, may do and may not do, and what a run does if they fail."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_code import Count, Ends, Evaluates, Fails, Meddle, Meddles
from rank_pool import on_ranks
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after, tiny, use_few_images

import inbatch
from inbatch.errors import ConfigError, InbatchError, Preempted, TrainingError
from inbatch.training.callbacks import Callback, named


def test_callbacks_are_called_log_and_stop(brief: None, tmp_path: Path) -> None:
    count = Count()
    run = tiny("simclr", tmp_path / "called", callbacks=[count, Ends], epochs=1)
    assert (count.steps, count.evaluations) == (3, 2)
    assert run.result["steps"] == 3 and run.result["stopped"] == "Ends: it is enough"
    assert run.result["curve"][-1]["step"] == 3 and (tmp_path / "called" / "encoder").is_dir()
    records = [json.loads(line) for line in (tmp_path / "called" / "metrics.jsonl").read_text().splitlines()]
    assert [one["Count/count"] for one in records if "Count/count" in one] == [1, 2, 3]
    assert saved(tmp_path / "called")["callback Count"] == {"steps": 3}
    assert run.recipe.replans == ((3, 0),) and not run.recipe.own


class StopsInASignal(Callback):
    """Ask to stop in the step in which a signal arrives."""

    def on_step(self, moment: inbatch.training.callbacks.Moment) -> None:
        if moment.step == 3:
            moment.stop("it is enough")
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_in_the_step_of_a_signal_is_kept(brief: None, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        tiny("simclr", tmp_path, callbacks=[StopsInASignal])
    result = tiny("simclr", tmp_path, callbacks=[StopsInASignal], resume=True).result
    assert result["steps"] == 3 and result["stopped"] == "StopsInASignal: it is enough"


def test_a_callback_with_state_may_come_and_go(brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in (([Count], []), ([], [Count])):
        out = tmp_path / str(len(before))
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, 3)
            tiny("simclr", out, callbacks=before, epochs=1)
        tiny("simclr", out, callbacks=after, epochs=1, resume=True)
        assert saved(out).get("callback Count") == ({"steps": 2} if after else None)


class FailsAfterAnEpoch(Callback):
    """Fail after the first epoch and its evaluation."""

    def on_epoch(self, moment: inbatch.training.callbacks.Moment) -> None:
        raise RuntimeError("it fails")


class KeepsNumPy(Callback):
    """Keeps a number of NumPy, from the beginning or from the first step on."""

    def __init__(self, value: float = np.float64(0.5)) -> None:
        self.value = value

    def on_step(self, moment: inbatch.training.callbacks.Moment) -> None:
        self.value = np.float64(self.value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": [self.value]}


def test_state_that_a_checkpoint_cannot_hold_is_named(brief: None, tmp_path: Path) -> None:
    words = r"the callback KeepsNumPy returns numpy.float64 in state_dict: .* float\(\.\.\.\)"
    with pytest.raises(InbatchError, match=words):
        tiny("simclr", tmp_path / "first", callbacks=[KeepsNumPy], epochs=1)
    assert not (tmp_path / "first").exists(), "before the first step"
    with pytest.raises(InbatchError, match=words):
        tiny("simclr", tmp_path / "later", callbacks=[KeepsNumPy(0.5)], epochs=1)
    assert json.loads((tmp_path / "later" / "run.json").read_text())["status"] == "failed"


class FailsAtTheStart(Callback):
    """Fail after the evaluation before the first step."""

    def on_evaluation(self, moment: inbatch.training.callbacks.Moment) -> None:
        raise RuntimeError("it fails")


def test_the_first_evaluation_before_a_failing_callback_is_recorded_once(brief: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="FailsAtTheStart"):
        tiny("simclr", tmp_path, callbacks=[FailsAtTheStart], epochs=1)
    assert [one["step"] for one in tiny("simclr", tmp_path, epochs=1, resume=True).result["curve"]] == [0, 5]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records if "knn" in one] == [0, 5]


def test_an_evaluation_before_a_failing_callback_is_recorded_once(brief: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="FailsAfterAnEpoch"):
        tiny("simclr", tmp_path, callbacks=[FailsAfterAnEpoch], evaluate_every=1)
    steps = [one["step"] for one in tiny("simclr", tmp_path, resume=True, evaluate_every=1).result["curve"]]
    assert steps == [0, 5, 10]


@pytest.mark.slow
def test_callback_that_fails_or_changes_weights_is_named(brief: None, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"callback Fails \(on_step, step 2\) failed: KeyError: 'gone'; a checkpoint"
    ):
        tiny("simclr", tmp_path / "fails", callbacks=[Fails])
    assert saved(tmp_path / "fails")["progress"]["step"] == 2
    resumed = tiny("simclr", tmp_path / "fails", resume=True)
    whole = tiny("simclr", tmp_path / "whole", callbacks=[])
    assert resumed.result["steps"] == whole.result["steps"]
    assert_same_state(saved(tmp_path / "fails"), saved(tmp_path / "whole"))
    with pytest.raises(
        TrainingError, match=r"callback Meddle \(on_step, step 1\) changed weights.*changes_weights = True"
    ):
        tiny("simclr", tmp_path / "meddle", callbacks=[Meddle])
    with pytest.raises(TrainingError, match=r"callback Evaluates \(on_epoch, step 5\) changed the mode of layers"):
        tiny("simclr", tmp_path / "mode", callbacks=[Evaluates])
    run = tiny("simclr", tmp_path / "meddles", callbacks=[Meddles()], epochs=1)
    assert list(run.recipe.own) == ["callback own_code:Meddles"]
    with pytest.raises(ConfigError, match="--callback own_code:Meddles"):
        tiny("simclr", tmp_path / "meddles", epochs=1, resume=True)
    with pytest.raises(ConfigError, match="changes weights, and the run began without it"):
        tiny("simclr", tmp_path / "whole", resume=True, callbacks=[Meddles])


def called_on_rank(out: str, shard: bool = False) -> str:
    patch = pytest.MonkeyPatch()
    use_few_images(patch)
    leave_out_evaluation(patch)
    try:
        tiny("simclr", Path(out), callbacks=[FailsOnRank1, Count], context=8, precision="float32", shard=shard)
    except TrainingError as error:
        return str(error)
    finally:
        patch.undo()
    return ""


class FailsOnRank1(Callback):
    """Fails on one rank only."""

    def on_step(self, moment: inbatch.training.callbacks.Moment) -> None:
        if moment.rank == 1 and moment.step == 2:
            raise ValueError("only here")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_callback_that_fails_on_one_rank_ends_all(shard: bool, tmp_path: Path) -> None:
    first, second = on_ranks(2, called_on_rank, str(tmp_path / "run"), shard)
    assert "a callback failed on another rank; a checkpoint is saved" in first
    assert "ValueError: only here; a checkpoint is saved" in second
    assert saved(tmp_path / "run")["progress"]["step"] == 2


def refused_on_rank(out: str) -> str:
    try:
        tiny("simclr", Path(out), callbacks=[Meddles], context=8, batch_size=16, shard=True)
    except ConfigError as error:
        return str(error)
    return ""


def test_callback_that_changes_weights_is_refused_with_shards(tmp_path: Path) -> None:
    for message in on_ranks(2, refused_on_rank, str(tmp_path / "run")):
        assert "shard and the callback Meddles exclude each other" in message
    assert not (tmp_path / "run").exists()


def test_callbacks_have_names() -> None:
    assert list(named([Count(), Ends(), Count()])) == ["Count", "Ends", "Count-2"]
    with pytest.raises(ConfigError, match="derive its class from it"):
        named([len])  # type: ignore[list-item]
