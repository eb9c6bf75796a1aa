"""Stopped, killed or damaged runs resume and give the result of an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import assert_same_state, saved, stop_after, tiny

import inbatch
from inbatch.data import open_data, write_folder
from inbatch.errors import ConfigError, DataError, Interrupted, Preempted
from inbatch.methods import METHODS
from inbatch.training import checkpoint
from inbatch.training.resume import run_to_resume

WITH_STATE = ("moco",)
"""Methods of the fast suite: with a target network and a memory bank. -m slow also resumes clusters."""


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in WITH_STATE else pytest.mark.slow)
        for name, method in METHODS.items()
        if not method.teacher  # test_teacher.py resumes such a run
    ],
)
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((3,), id="in an epoch"),
        pytest.param((5,), id="at its end", marks=pytest.mark.slow),
        pytest.param((2, 7), id="twice", marks=pytest.mark.slow),
    ],
)
def test_resuming_is_bit_exact(
    method: str, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(method, tmp_path / "whole")
    for i, step in enumerate(stops):
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, step)
            tiny(method, tmp_path / "cut", resume=i > 0)
        status = json.loads((tmp_path / "cut" / "run.json").read_text())
        assert (status["status"], status["last_step"]) == ("preempted", step)
    # the images stay where they were, also on a machine whose memory would not be chosen for them
    monkeypatch.setattr("inbatch.data.loader.free_bytes", lambda *_: 0)
    result = tiny(method, tmp_path / "cut", resume=True, cache_on_device=None).result
    assert result["recipe"]["cache_on_device"] and not result["earlier_environments"]
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "the log goes back"


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_what_epochs_and_sizes_decide_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prototypes that do not learn yet, and a survey of the data set while the images grow."""
    growing = {"method.warmup_epochs": 1, "grow_from": 0.5, "grow_until": 0.8}
    for method, stop, settings in (("swav", 3, {"method.freeze_prototypes_epochs": 1}), ("pcl", 5, growing)):
        tiny(method, tmp_path / method / "whole", settings=settings)
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, stop)
            tiny(method, tmp_path / method / "cut", settings=settings)
        tiny(method, tmp_path / method / "cut", settings=settings, resume=True)
        assert_same_state(saved(tmp_path / method / "cut"), saved(tmp_path / method / "whole"))


@pytest.mark.slow
def test_resuming_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("simclr", tmp_path / "whole", cache_on_device=False, workers=2)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        tiny("simclr", tmp_path / "cut", cache_on_device=False, workers=0)
    tiny("simclr", tmp_path / "cut", resume=True, cache_on_device=False, workers=1)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_ctrl_c_has_its_own_exit_code_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        stop_after(patch, 4, signal.SIGINT)
        tiny("simclr", tmp_path)
    assert caught.value.exit_code == 130 and "--resume" in str(caught.value)
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10


@pytest.mark.slow
def test_run_killed_many_times_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """Fault 1: SIGKILL at any moment, saving included (a checkpoint after every 5 steps of some milliseconds)."""
    out, words = tmp_path / "killed", ["pretrain", "--data", "digits-canvas", "--batch", "40", "--context", "20"]
    for key, value in {"subset": 200, "epochs": 40, "evaluate_every": 40, "method.out_dim": 8}.items():
        words += ["--set", f"{key}={value}"]

    def started(out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "inbatch", *words, "--quiet", "--out", str(out), "--resume", "auto"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    for wait in (0.05, 0.3):
        process = started(out)
        began, end = time.time(), time.monotonic() + 60
        while not any(file.stat().st_mtime > began for file in out.glob("checkpoints/previous.pt")):
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.communicate(timeout=30)
    step = checkpoint.load(out / "checkpoints").step
    assert 0 < step < 200, "killed too late to show anything"
    for folder in (out, tmp_path / "whole"):
        process = started(folder)
        assert (process.wait(120), process.communicate()[1]) == (0, "")
    assert_same_state(saved(out), saved(tmp_path / "whole"))
    assert not list(out.glob("checkpoints/.*.tmp")), "half-written files are left"


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_starts_from_step_0(tmp_path: Path) -> None:
    """Faults 1 and 23: a launcher's restart with `--resume auto` is not refused because of incomplete files."""
    tiny("simclr", tmp_path, epochs=1)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="already holds a run"):  # its encoder must not be lost
        tiny("simclr", tmp_path, epochs=1, resume=True)
    shutil.rmtree(tmp_path / "encoder")
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        tiny("simclr", tmp_path, epochs=1)
    tiny("simclr", tmp_path, epochs=1, resume=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "the log was not started again"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fault 3: the run resumes from `previous`, reports it, and gives the result of an uninterrupted run."""
    tiny("simclr", tmp_path / "whole", epochs=3)
    tiny("simclr", tmp_path / "hurt", epochs=3)
    last = tmp_path / "hurt" / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"flip": bytes(content), "truncate": bytes(content[:1000]), "empty": b""}[damage])
    tiny("simclr", tmp_path / "hurt", epochs=3, resume=True, quiet=False)
    assert "last.pt is " in capfd.readouterr().err
    assert_same_state(saved(tmp_path / "hurt"), saved(tmp_path / "whole"))


@pytest.mark.usefixtures("brief")
@pytest.mark.slow
@pytest.mark.parametrize("key", ["network", "target", "method", "optimizer", "progress"])
def test_a_checkpoint_without_a_part_is_refused(key: str, tmp_path: Path) -> None:
    tiny("moco", tmp_path, epochs=1)
    loaded = checkpoint.load(tmp_path / "checkpoints")
    del loaded.state[key]
    checkpoint.save(tmp_path / "checkpoints", loaded.state, step=loaded.step)
    with pytest.raises(inbatch.errors.InbatchError, match=key):
        tiny("moco", tmp_path, epochs=1, resume=True)


@pytest.mark.slow
def test_images_that_have_changed_since_are_refused(tmp_path: Path) -> None:
    """One more image, one less or another label gives another permutation; the run in the folder stays unchanged."""
    images = write_folder(open_data("digits-canvas", subset=60), tmp_path / "images")
    fields = {"batch_size": 20, "epochs": 1, "quiet": True}
    inbatch.pretrain(images, out=tmp_path / "run", **fields)
    report = (tmp_path / "run" / "run.json").read_bytes()
    one = next(images.rglob("*.png"))
    added = one.with_name("zzz.png")
    for change, back in [
        (lambda: added.write_bytes(one.read_bytes()), added.unlink),
        (lambda: one.rename(tmp_path / "away"), lambda: (tmp_path / "away").rename(one)),
        (lambda: one.rename(images / "9" / "moved.png"), lambda: (images / "9" / "moved.png").rename(one)),
    ]:
        change()
        with pytest.raises(DataError, match="images have changed since the run began"):
            inbatch.pretrain(images, out=tmp_path / "run", resume=True, **fields)
        back()
        assert (tmp_path / "run" / "run.json").read_bytes() == report
    assert inbatch.pretrain(images, out=tmp_path / "run", resume=True, **fields).result["steps"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_auto_starts_from_step_0_without_a_checkpoint(tmp_path: Path) -> None:
    """A launcher that restarts a run killed before its first checkpoint must not be refused."""
    tiny("simclr", tmp_path, epochs=1)
    shutil.rmtree(tmp_path / "checkpoints")
    for again in (False, "auto"):  # its evaluation exists: the run has finished and must not be lost
        with pytest.raises(ConfigError, match="already holds a run"):
            tiny("simclr", tmp_path, epochs=1, resume=again)
    shutil.rmtree(tmp_path / "encoder")
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        tiny("simclr", tmp_path, epochs=1)
    assert tiny("simclr", tmp_path, epochs=1, resume="auto").result["steps"] == 5


def test_another_output_directory_than_that_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in ("recipe.json", "checkpoints/last.pt"):
        (tmp_path / "run" / file).touch()
    (tmp_path / "link").symlink_to("run")
    for out in (None, tmp_path / "run", tmp_path / "link"):
        assert run_to_resume(out, tmp_path / "run") == tmp_path / "run"
    with pytest.raises(ConfigError, match=r"--output-dir .*new is another: leave out --output-dir"):
        run_to_resume(tmp_path / "new", tmp_path / "run")
