"""Faults 2, 5, 6, 10 and 14 in whole runs: a full disk, signals, collapse, a data worker that is killed."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_runs import TINY, assert_same_state, saved, tiny

import inbatch
from inbatch.data import open_data, write_folder
from inbatch.errors import InbatchError, Interrupted, Preempted, TrainingError
from inbatch.training import checkpoint, run_result
from inbatch.training.metric_logger import Log


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Call a function during a step of a run."""
    real = Log.step

    def log(self: Log, at: int, *rest: Any) -> None:
        if at == step:
            act()
        real(self, at, *rest)

    monkeypatch.setattr(Log, "step", log)


# Fault 2: the disk is full, for every file that is written.


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 10], ids=["in an epoch", "at the end"])
@pytest.mark.parametrize("size", [0, 2_000, 100_000])
def test_a_disk_that_fills_up_ends_a_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, step: int
) -> None:
    tiny("simclr", tmp_path / "whole")
    with monkeypatch.context() as patch:
        limit = file_size_limit(size)
        at_step(patch, step, limit.__enter__)
        try:
            with pytest.raises(InbatchError, match=r"Cannot write .* are free there") as caught:
                tiny("simclr", tmp_path / "run")
        finally:
            limit.__exit__(None, None, None)
    assert caught.value.exit_code == 1
    assert not list((tmp_path / "run").rglob(".*.tmp")), "something half-written is left"
    if step == 10:  # one epoch is saved; with free space the run resumes
        assert checkpoint.load(tmp_path / "run" / "checkpoints").step == 5
        tiny("simclr", tmp_path / "run", resume=True)
        assert_same_state(saved(tmp_path / "run"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o555)
    words = [sys.executable, "-m", "inbatch", "pretrain", "--data", "digits-canvas", "--epochs", "1"]
    if os.getuid() == 0:  # root can write everywhere unless it drops the capability
        if shutil.which("setpriv") is None:
            pytest.skip("root writes everywhere, and there is no setpriv to give that up")
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *words]
    out = str(tmp_path / "shut" / "run")
    done = subprocess.run([*words, "--out", out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Cannot write" in done.stderr and "Permission denied" in done.stderr


# Faults 5 and 6: signals during a save and during the evaluation.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_while_saving_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = checkpoint.torch.save

    def save(state: Any, file: Any) -> None:
        os.kill(os.getpid(), number)
        real(state, file)
        os.kill(os.getpid(), signal.SIGTERM)

    tiny("moco", tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: (os.kill(os.getpid(), number), patch.setattr(checkpoint.torch, "save", save)))
        with pytest.raises(Interrupted if number == signal.SIGINT else Preempted, match="at step 3"):
            tiny("moco", tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoints").note is None
    tiny("moco", tmp_path / "run", resume=True)
    assert_same_state(saved(tmp_path / "run"), saved(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_during_the_last_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_result, "plot_curves", lambda *_: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted if number == signal.SIGINT else Preempted, match="step 10 of 10") as caught:
            tiny("simclr", tmp_path)
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert status(tmp_path)["status"] == ("interrupted" if number == signal.SIGINT else "preempted")
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10
    assert status(tmp_path)["status"] == "finished"


# Fault 10: collapse.


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_stop_on_collapse_saves_and_ends_with_4(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = TINY | {"epochs": 40, "context": None, "quiet": False, "evaluate_every": 40}
    # Without stop-gradient and predictor nothing keeps two views apart, and the learning rate causes large changes.
    settings = {"method.stop_gradient": False, "method.predictor": False, "optimizer.name": "sgd", "optimizer.lr": 1.0,
                "schedule.warmup_epochs": 0}  # fmt: skip
    with pytest.raises(TrainingError, match="did not recover by the next evaluation; a checkpoint is saved") as caught:
        inbatch.pretrain("digits-canvas", "simsiam", out=tmp_path, stop_on_collapse=True, settings=settings, **fields)
    assert caught.value.exit_code == 4
    assert "collapse: their" in capfd.readouterr().err, "no warning came before the end"
    ended = status(tmp_path)
    assert ended["status"] == "failed" and 0 < ended["last_step"] < 200
    assert checkpoint.load(tmp_path / "checkpoints").step == ended["last_step"]
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("features_std" in record for record in curve) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_stop_on_collapse_has_no_effect_without_collapse(tmp_path: Path) -> None:
    tiny("simclr", tmp_path / "plain")
    tiny("simclr", tmp_path / "watched", stop_on_collapse=True)
    assert_same_state(saved(tmp_path / "plain"), saved(tmp_path / "watched"))


# Fault 14: the processes that decode.


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_folder(open_data("digits-canvas-colour", subset=100), tmp_path / "images")


STREAMED: dict[str, Any] = {
    "encoder": "tiny", "image_size": 32, "batch_size": 20, "epochs": 3, "quiet": True, "cache_on_device": False,
    "workers": 2,
    "settings": {"method.out_dim": 8, "schedule.warmup_epochs": 0},
}  # fmt: skip


@pytest.mark.slow
def test_a_killed_worker_is_a_sentence(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid or 0, signal.SIGKILL)
        time.sleep(0.5)

    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(InbatchError, match=r"process that decodes images was lost .*--workers 0") as caught:
            inbatch.pretrain(images, out=tmp_path / "run", **STREAMED)
    assert caught.value.exit_code == 1 and status(tmp_path / "run")["status"] == "failed"
    inbatch.pretrain(images, out=tmp_path / "whole", **STREAMED)
    inbatch.pretrain(images, out=tmp_path / "run", resume="auto", **STREAMED | {"workers": 0})
    assert_same_state(saved(tmp_path / "run"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_no_shared_memory_is_a_sentence(images: Path, tmp_path: Path) -> None:
    words = ["pretrain", "--data", str(images), "--out", str(tmp_path / "run"), "--encoder", "tiny", "--epochs", "1"]
    words += ["--batch", "20", "--workers", "1", "--set", "cache_on_device=false", "--set", "image_size=224"]
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-m", "inbatch", *words],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file systems of one's own here: {done.stderr.strip()}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "shared memory, /dev/shm, has 0.1 MB free" in done.stderr and "--workers 0" in done.stderr


@pytest.mark.slow
def test_a_script_that_fails_in_the_middle_of_an_epoch_ends(images: Path) -> None:
    """Its traceback keeps the loader alive, and its workers ignore multiprocessing's SIGTERM."""
    script = f"""
from inbatch.api import prepare
built = prepare({str(images)!r}, "simclr", encoder="tiny", image_size=32, batch_size=20, cache_on_device=False,
                workers=2, settings={{"method.out_dim": 8}})
epoch = built.loader.epoch(0)
next(epoch)
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
