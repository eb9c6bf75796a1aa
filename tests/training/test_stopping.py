"""Signals during a step, an evaluation or a survey: lost work, saved work, and time to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import assert_same_state, saved, stop_after, tiny
from torch import nn

from inbatch import api
from inbatch.data import open_data, write_folder
from inbatch.errors import Interrupted, Preempted, RankError
from inbatch.methods.pcl import PCL
from inbatch.runtime import distributed, signals
from inbatch.runtime.signals import StopRequested, stop_on_signals
from inbatch.training import checkpoint, stopping
from inbatch.training.build import RunComponents
from inbatch.training.monitors import online_evaluation

FUSED: dict[str, Any] = {"fuse": "conv", "settings": {"curate.name": "redraw"}}
"""Epoch 1 is curated; its first step copies the curator's network."""


def in_step(monkeypatch: pytest.MonkeyPatch, step: int, place: str, number: int = signal.SIGTERM) -> None:
    """Raise a signal during the step after `step`: in the forward pass, the backward pass, ...."""
    real = api.build

    def build(*args: Any, **options: Any) -> RunComponents:
        built = real(*args, **options)
        network = built.target if place == "target" else built.network
        assert network is not None
        norm = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        make, now = built.step.__class__.__call__, [-1]

        def ask(*_: Any) -> None:
            if now[0] == step and network.training:
                now[0] = -1
                signal.raise_signal(number)

        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if place != "backward":
                ask()
            elif output.requires_grad:
                output.register_hook(ask)

        def call(self: Any, batch: Any, at: int) -> Any:
            now[0] = at
            return make(self, batch, at)

        norm.register_forward_hook(hook)
        monkeypatch.setattr(built.step.__class__, "__call__", call)
        return built

    monkeypatch.setattr(api, "build", build)
    impatient(monkeypatch)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat no step as short, so that a signal is handled immediately."""
    monkeypatch.setattr(stopping, "GRACE", 0.0)
    monkeypatch.setattr(signals, "GRACE", 0.0)


def logged(out: Path) -> list[dict[str, float]]:
    """Return the log entries of evaluations and surveys; logged steps depend on the time, but none occurs twice."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "lr" in line]
    assert steps == sorted(set(steps))
    clocks = ("training_seconds", "cpu_seconds")
    return [{key: x for key, x in line.items() if key not in clocks} for line in lines if "lr" not in line]


@pytest.mark.usefixtures("brief")
@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("method", "context", "place", "fields"),
    [
        ("simclr", None, "forward", {}),
        ("simclr", None, "backward", {}),
        ("simclr", 8, "backward", {}),
        ("moco", None, "target", {}),
        ("moco", 8, "target", {}),
        ("moco", 8, "backward", FUSED),
    ],
    ids=str,
)
def test_a_lost_step_leaves_the_state_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, context: int | None, place: str,
    fields: dict[str, Any],
) -> None:  # fmt: skip
    options = {"context": context, "checkpoint_every": 2} | fields
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Preempted, match="at step 3 of 10, checkpoint saved"):
            tiny(method, tmp_path / "between", **options)
    with monkeypatch.context() as patch:
        in_step(patch, 3, place)
        with pytest.raises(Preempted, match=r"during step 4 of 10, which is lost; the checkpoint of step 3 is saved"):
            tiny(method, tmp_path / "in", **options)
    assert json.loads((tmp_path / "in" / "run.json").read_text())["last_step"] == 3
    assert_same_state(saved(tmp_path / "in"), saved(tmp_path / "between"))

    # A second signal in the first step of an epoch, after the curator's network and a method's memory have changed.
    with monkeypatch.context() as patch:
        in_step(patch, 5, place, signal.SIGINT)
        with pytest.raises(Interrupted, match=r"during step 6 of 10"):
            tiny(method, tmp_path / "in", resume=True, **options)
    tiny(method, tmp_path / "in", resume=True, **options)
    tiny(method, tmp_path / "between", resume=True, **options)
    assert_same_state(saved(tmp_path / "in"), saved(tmp_path / "between"))
    assert logged(tmp_path / "in") == logged(tmp_path / "between")


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_the_first_step_of_an_epoch_changes_nothing_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, every in (("saved", 1), ("lost", 2)):  # the end of epoch 1 is saved, or the lost step has to save it
        with monkeypatch.context() as patch:
            in_step(patch, 5, "backward")
            with pytest.raises(Preempted, match="checkpoint of step 5 is saved"):
                tiny("moco", tmp_path / name, checkpoint_every=every, **FUSED)
    assert_same_state(saved(tmp_path / "lost"), saved(tmp_path / "saved"))


@pytest.mark.usefixtures("brief")
def test_a_step_that_is_quick_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        in_step(patch, 3, "forward")
        patch.setattr(stopping, "GRACE", 100.0)
        patch.setattr(signals, "GRACE", 100.0)
        with pytest.raises(Preempted, match="at step 4 of 10, checkpoint saved"):
            tiny("simclr", tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints").step == 4


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_the_first_step_has_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        in_step(patch, 0, "backward")
        with pytest.raises(Preempted, match="during step 1 of 10, which is lost; nothing was saved yet"):
            tiny("simclr", tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    tiny("simclr", tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    ("method", "where"), [("simclr", (online_evaluation, "knn")), ("pcl", (PCL, "survey"))], ids=str
)
def test_interrupted_evaluation_or_survey_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, where: tuple[Any, str]
) -> None:
    def ask(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    calls: list[int] = []
    options: dict[str, Any] = {"evaluate_every": 1, "checkpoint_every": 2}
    tiny(method, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        real = getattr(*where)
        patch.setattr(*where, ask)
        with pytest.raises(Preempted, match="at step 5 of 10, checkpoint saved"):
            tiny(method, tmp_path / "run", **options)
    tiny(method, tmp_path / "run", resume=True, **options)
    assert_same_state(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_signal_at_the_last_step_is_answered_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(Preempted, match="at step 10 of 10, checkpoint saved"):
            tiny("simclr", tmp_path)
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10


def test_between_two_layers_of_the_backward_pass_a_signal_that_waits_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)
    built = api.prepare("digits-canvas", subset=100, batch_size=20, settings={"method.out_dim": 8})
    reached: list[str] = []
    layers = [m for m in built.network.encoder.modules() if isinstance(m, nn.Conv2d)]
    with stop_on_signals() as stop:
        handles = stopping.check_between_layers(built, stop)

        def ask(gradient: torch.Tensor) -> None:
            signal.raise_signal(signal.SIGTERM)  # of a short step, which then takes longer
            time.sleep(0.3)

        layers[-1].register_forward_hook(lambda m, x, y: y.register_hook(ask) and None)
        layers[0].register_forward_hook(lambda m, x, y: y.register_hook(lambda g: reached.append("first")) and None)
        stop.release()
        stop.quick = True
        batch = next(built.loader.epoch(0))
        with pytest.raises(StopRequested, match="SIGTERM"):
            built.step(batch, 0)
        for handle in handles:
            handle.remove()
    assert not reached, "the whole backward pass was waited for"


def test_the_watchdog_reports_a_lost_rank_that_was_found_before_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun terminates the others as soon as one has died, before they have named it."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(signals.watchdog, "answer", signals.without_result)
    built: Any = SimpleNamespace(step=SimpleNamespace())
    report: Any = SimpleNamespace(
        progress=SimpleNamespace(step=3, state_dict=dict, curve=[]), path=tmp_path / "run.json"
    )
    with (
        stop_on_signals() as stop,
        pytest.raises(RankError),
        stopping.Stopping(built, {}, report, stop).answering(),
    ):
        raise RankError("lost rank 0", reports_for_all=True)
    program = import_module("inbatch.apps.cli.app")
    monkeypatch.setattr(program, "first", lambda: False)  # rank 1 reports the loss of rank 0
    program._report_error(signals.watchdog.answer(signal.SIGTERM))
    assert "lost rank 0" in capsys.readouterr().err


def test_work_that_must_be_finished_is() -> None:
    with stop_on_signals() as stop:
        stop.hold()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        stop.check()
        with pytest.raises(StopRequested):
            stop.release()
        signal.raise_signal(signal.SIGTERM)  # already handled: it does not interrupt the saving of a checkpoint


def test_an_ignored_hangup_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, old)


# Real processes.

IN_STEP = """
import hashlib, sys
from inbatch import api
from inbatch.apps.cli import main

def stuck(gradient):
    "One call of a library, of many minutes."
    print("stuck", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def build(*args, **options):
    built = real(*args, **options)
    now, make = [-1], type(built.step).__call__
    def hook(module, inputs, output):
        if output.requires_grad and now[0] == 3:
            output.register_hook(stuck)
    def call(self, batch, step):
        now[0] = step
        return make(self, batch, step)
    type(built.step).__call__ = call
    list(built.network.encoder.modules())[-1].register_forward_hook(hook)
    return built

real, api.build = api.build, build
main()
"""


def stopped_in(script: str, words: list[str], number: int, until: str) -> tuple[int, str, str, float]:
    """Send a signal when a process prints a word; return its exit code, stdout, stderr, and the seconds to its end."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    before = ""
    for line in child.stderr:
        before += line
        if until in line:
            break
    child.send_signal(number)
    began = time.monotonic()
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, out, before + err, time.monotonic() - began


CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
SMALL = ["--data", "digits-canvas", "--encoder", "tiny", "--batch", "40", "--epochs", "2", "--quiet"]
SMALL += ["--set", "subset=200", "--set", "method.out_dim=8", "--set", "evaluate_every=2"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_the_watchdog_answers_in_one_long_call(tmp_path: Path, number: signal.Signals) -> None:
    words = ["pretrain", "--out", str(tmp_path / "run"), "--json", *SMALL]
    code, out, err, seconds = stopped_in(IN_STEP, words, number, "stuck")
    assert code == CODES[number], err
    assert f"stopped by {number.name} during step 4 of 10, which is lost" in err and "Traceback" not in err
    assert json.loads(out)["exit_code"] == code
    assert seconds < 30
    loaded = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert loaded.step == 3 and loaded.note is None
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == ("interrupted" if number == signal.SIGINT else "preempted") and status["last_step"] == 3


AGAIN_AND_AGAIN = """
import importlib, sys
from inbatch.apps.cli import main

def endless(*args, **options):
    print("busy", file=sys.stderr, flush=True)
    while True:
        real(*args, **options)

place, name = sys.argv.pop(1).split(":")
place = importlib.import_module(place)
real = getattr(place, name)
setattr(place, name, endless)
main()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    tiny("simclr", out, epochs=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    ("words", "phase"),
    [
        (["pretrain", *SMALL], "inbatch.training.plan:resolve_recipe"),
        (["pretrain", *SMALL], "inbatch.data.loader:hold"),
        (["pretrain", "--context", "auto", *SMALL], "inbatch.training.memory_bench:dry_step"),
        (["pretrain", *SMALL], "inbatch.training.pretraining:step_seconds"),
        (["pretrain", *SMALL], "inbatch.training.evaluation_plan:choose_online_subsets"),
        (["pretrain", *SMALL], "inbatch.training.monitors.online_evaluation:knn"),
        (["pretrain", *SMALL], "inbatch.training.run_result:evaluation"),
        (["evaluate", "RUN"], "inbatch.training.run_evaluation:evaluate"),
        (
            ["embed", "RUN", "digits-canvas", "-o", "features.npz"],
            "inbatch.evaluation.embedding_parts:write_embeddings",
        ),
        (["data", "digits-canvas"], "inbatch.apps.reports.dataset:chunks"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_every_long_phase_is_ended_by_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, words: list[str], phase: str,
    number: signal.Signals,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [str(finished) if word == "RUN" else word for word in words]
    code, _, err, seconds = stopped_in(AGAIN_AND_AGAIN, [phase, *words], number, "busy")
    assert code == CODES[number], err
    assert f"error: stopped by {number.name} " in err and "Traceback" not in err
    assert seconds < 30
    for status in tmp_path.glob("runs/*/run.json"):
        assert json.loads(status.read_text())["status"] in ("interrupted", "preempted")


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_decoding_in_threads_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    """Also if every thread is inside one image, and a pool waits for its threads."""
    images = write_folder(open_data("digits-canvas-colour", subset=400), tmp_path / "images")
    slow = """
import sys, time
from inbatch.apps.cli import main
from inbatch.data import resident
def decode(*args):
    print("busy", file=sys.stderr, flush=True)
    time.sleep(60)
resident._decode = decode
main()
"""
    words = ["pretrain", *SMALL[2:], "--data", str(images), "--out", str(tmp_path / "run")]
    code, _, err, seconds = stopped_in(slow, words, number, "busy")
    assert code == CODES[number] and "before there was a result" in err, err
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_table_waits_for_its_runs(tmp_path: Path, number: signal.Signals) -> None:
    words = ["table", "ba-ssl-3", "--scale", "smoke", "--on", "digits", "--seed", "0", "--jobs", "1"]
    words += ["--work", str(tmp_path / "work")]
    script = """
import sys
from inbatch.apps.cli import main
from inbatch.apps.papers import runner as run
real = run.subprocess.Popen
def started(*args, **options):
    child = real(*args, **options)
    print("busy", child.pid, file=sys.stderr, flush=True)
    return child
run.subprocess.Popen = started
main()
"""
    code, _, err, seconds = stopped_in(script, words, number, "busy")
    assert code == CODES[number] and f"stopped by {number.name} with 0 of" in err, err
    assert seconds < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(err.split("busy ")[1].split()[0]), 0)
