"""Small complete runs, and comparisons of their results."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import small_settings

import inbatch
from inbatch.models import backbones
from inbatch.training import checkpoint, evaluation_plan, run_result
from inbatch.training.metric_logger import Log
from inbatch.training.monitors.online_evaluation import limited

TINY: dict[str, Any] = {
    "subset": 200,
    "batch_size": 40,
    "epochs": 2,
    "context": 20,
    "quiet": True,
    "evaluate_every": 2,
}  # 5 steps an epoch


def tiny(method: str, out: Path, **fields: Any) -> inbatch.Run:
    options = small_settings(method)
    settings = options | fields.pop("settings", {})
    return inbatch.pretrain("digits-canvas", method, out=out, settings=settings, **(TINY | fields))


def use_narrow_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the encoder `tiny` a quarter of its width: convolutions take half of the time of a tiny run."""
    monkeypatch.setattr(backbones, "_TINY", (8, 16, 24))


def use_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tiny` learn from fewer images, and evaluate every run on few."""
    for name, value in {"subset": 80, "batch_size": 16, "context": 8}.items():
        monkeypatch.setitem(TINY, name, value)
    evaluate_on_few_images(monkeypatch)


def evaluate_on_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate runs on few images, during training and at its end."""
    real = evaluation_plan.choose_online_subsets
    monkeypatch.setattr(
        evaluation_plan, "choose_online_subsets", lambda built, split: real(built, limited(split, 60, 40))
    )


def leave_out_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """End runs without protocols, pictures and the comparison with the untrained encoder.

    Most of a tiny run's time is this; tests in test_run_evaluation.py, test_loop.py and test_cli.py check it.
    """
    evaluate_on_few_images(monkeypatch)
    leave_out_comparison(monkeypatch)
    monkeypatch.setattr(run_result, "evaluation", lambda *_: {"knn": {"top1": 0.5}})


def leave_out_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """End runs without pictures and the comparison with the untrained encoder."""
    monkeypatch.setattr(run_result, "plot_curves", lambda *_: None)
    left_out = {"initial": "untrained encoder", "untrained": None, "unlabelled": {}, "comparison_seconds": 0.0}
    monkeypatch.setattr(run_result, "compare_with_initial", lambda *_, **__: dict(left_out))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during a step."""
    real = Log.step

    def log(self: Log, at: int, *rest: Any) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        real(self, at, *rest)

    monkeypatch.setattr(Log, "step", log)


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    """Check that two states are equal bit for bit, in every tensor."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where  # a measure may be NaN


def saved(out: Path) -> dict[str, Any]:
    state = checkpoint.load(out / "checkpoints").state
    for clock in ("seconds", "cpu_seconds", "before", "machines"):
        del state["progress"][clock]
    return state
