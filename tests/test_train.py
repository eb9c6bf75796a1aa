"""Whole runs on the embedded data: resuming, learning, being stopped, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pool import on_ranks
from small import SMALL

import inbatch
from inbatch import checkpoint
from inbatch.build import held_out, plan
from inbatch.errors import ConfigError, DataError, Interrupted, Preempted, TrainingError
from inbatch.log import Log
from inbatch.methods import METHODS
from inbatch.train import survey

TINY = {"subset": 200, "batch": 40, "epochs": 2, "context": 20, "quiet": True, "evaluate_every": 2}  # 5 steps an epoch


def tiny(method: str, out: Path, **fields: Any) -> inbatch.Run:
    options = {f"method.{k}": v for k, v in SMALL.get(method, {}).items() if k != "classes"}
    settings = options | fields.pop("settings", {})
    return inbatch.pretrain("digits-canvas", method, out=out, settings=settings, **(TINY | fields))


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while it makes a step."""
    real = Log.step

    def log(self: Log, at: int, *rest: Any) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        real(self, at, *rest)

    monkeypatch.setattr(Log, "step", log)


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, down to every tensor."""
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
        assert a == b, where


def saved(out: Path) -> dict[str, Any]:
    state = checkpoint.load(out / "checkpoints").state
    del state["progress"]["seconds"], state["progress"]["before"]
    return state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stops", [(3,), (5,), (2, 7)], ids=["in an epoch", "at its end", "twice"])
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
    tiny(method, tmp_path / "cut", resume=True)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "the log goes back"


def surveyed(images: int) -> dict[str, Any]:
    """What PCL learns of the whole data set before its first epoch, as numbers that travel between processes."""
    options = {f"method.{k}": v for k, v in SMALL["pcl"].items()}
    built = inbatch.api.prepare(
        "digits-canvas", "pcl", subset=images, batch=40, settings=options, device="cpu", workers=0
    )
    built.encoder.train()
    found = survey(built, 0)
    assert built.encoder.training
    state = {name: x.numpy() for name, x in built.method.clusterings.state_dict().items()}
    return state | {"found": found}


@pytest.mark.parametrize("images", [120, 121], ids=["even", "odd"])
def test_a_survey_is_shared_by_the_ranks(images: int) -> None:
    """Two ranks, each with half of the images and of the clusterings, end where one process ends."""
    alone, (first, second) = surveyed(images), on_ranks(2, surveyed, images)
    assert alone["found"].keys() == {"nmi_4", "nmi_6"}
    for name in alone.keys() - {"found"}:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert first["found"] == second["found"] == pytest.approx(alone["found"])


def test_a_survey_is_of_clean_images_through_the_target_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {f"method.{k}": v for k, v in SMALL["pcl"].items()}
    built = inbatch.api.prepare("digits-canvas", "pcl", subset=60, batch=20, settings=settings, device="cpu")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(built.method, "survey", lambda *given: seen.update(zip("rlew", given, strict=True)) or {})
    with torch.no_grad():
        for p in built.tower.parameters():
            p.zero_()  # whatever is seen is not seen by the tower that learns
    survey(built, 3)
    source, target = built.loader.source, built.target.eval()
    images = built.encoder.prepare(source.image(i) for i in range(60))
    with torch.no_grad():
        expected = target([images])["projection"][0]
    torch.testing.assert_close(seen["r"]["projection"], expected)
    assert torch.equal(seen["l"], source.labels) and seen["e"] == 3 and expected.std() > 0


def test_clusters_are_in_the_checkpoint_and_their_agreement_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InfoNCE alone for an epoch, then a survey before each: also of a run that was cut where two epochs meet."""
    fields = {"epochs": 3, "settings": {"method.warmup": 1}}
    tiny("pcl", tmp_path / "whole", **fields)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 5)
        tiny("pcl", tmp_path / "cut", **fields)
    assert saved(tmp_path / "cut")["method"]["clusterings.every.0.made"] == 0
    tiny("pcl", tmp_path / "cut", resume=True, **fields)
    for part in ("method", "tower", "target"):
        assert_same_state(saved(tmp_path / "cut")[part], saved(tmp_path / "whole")[part], part)
    assert saved(tmp_path / "cut")["method"]["clusterings.every.0.made"] == 1
    for name in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "nmi_4" in line] == [5, 10]
        parts = {line["step"]: line["prototypes"] for line in lines if "prototypes" in line}
        assert parts[1] == 0 and parts[15] > 0


def test_resuming_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("simclr", tmp_path / "whole", resident=False, workers=2)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        tiny("simclr", tmp_path / "cut", resident=False, workers=0)
    tiny("simclr", tmp_path / "cut", resume=True, resident=False, workers=1)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


def test_ctrl_c_is_told_apart_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        stop_after(patch, 4, signal.SIGINT)
        tiny("simclr", tmp_path)
    assert caught.value.exit_code == 130 and "--resume" in str(caught.value)
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10


def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Fault 1: SIGKILL at any moment, saving included (it saves after every 5 steps of some milliseconds)."""
    fields = {"epochs": 40, "evaluate_every": 40, "settings": {"method.out": 8}}
    out, words = tmp_path / "killed", ["pretrain", "--data", "digits-canvas", "--batch", "40", "--context", "20"]
    for key, value in {"subset": 200, "epochs": 40, "evaluate_every": 40, "method.out": 8}.items():
        words += ["--set", f"{key}={value}"]
    for wait in (0.05, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-m", "inbatch", *words, "--quiet", "--out", str(out), "--resume", "auto"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        began, end = time.time(), time.monotonic() + 60
        while not any(file.stat().st_mtime > began for file in out.glob("checkpoints/previous.pt")):
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.communicate(timeout=30)
    step = checkpoint.load(out / "checkpoints").step
    assert 0 < step < 200, "killed too late to show anything"
    tiny("simclr", out, resume=True, **fields)
    tiny("simclr", tmp_path / "whole", **fields)
    assert_same_state(saved(out), saved(tmp_path / "whole"))
    assert not list(out.glob("checkpoints/.*.tmp")), "half-written files are left"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fault 3: the run goes on from `previous`, says so, and ends as if nothing had happened."""
    tiny("simclr", tmp_path / "whole", epochs=3)
    tiny("simclr", tmp_path / "hurt", epochs=3)
    last = tmp_path / "hurt" / "checkpoints" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes({"flip": bytes(content), "truncate": bytes(content[:1000]), "empty": b""}[damage])
    tiny("simclr", tmp_path / "hurt", epochs=3, resume=True, quiet=False)
    assert "last.pt is " in capfd.readouterr().err
    assert_same_state(saved(tmp_path / "hurt"), saved(tmp_path / "whole"))


@pytest.mark.parametrize("key", ["tower", "target", "method", "optimizer", "progress"])
def test_a_checkpoint_without_a_part_is_refused(key: str, tmp_path: Path) -> None:
    tiny("moco", tmp_path, epochs=1)
    found = checkpoint.load(tmp_path / "checkpoints")
    del found.state[key]
    checkpoint.save(tmp_path / "checkpoints", found.state, step=found.step)
    with pytest.raises(inbatch.errors.InbatchError, match=key):
        tiny("moco", tmp_path, epochs=1, resume=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, tmp_path: Path) -> None:
    """Real handwriting: k-NN at least 15 points above the same encoder untrained, after a few seconds."""
    run = inbatch.pretrain(
        "digits-canvas", method, out=tmp_path, epochs=10, evaluate_every=10, seed=1, quiet=True, precision="float32"
    )
    untrained, trained = (run.result["curve"][i]["knn"] for i in (0, -1))
    assert trained > untrained + 0.15, (untrained, trained)
    assert run.result["evaluation"]["knn"]["top1"] == pytest.approx(trained, abs=0.01)


def test_a_run_leaves_everything_that_repeats_it(tmp_path: Path) -> None:
    run = tiny("simclr", tmp_path / "run", settings={"method.temperature": 0.3})
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "run.json", "result.json", "metrics.jsonl", "curves.png", "checkpoints", "encoder"} <= left
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    again = inbatch.pretrain(config=tmp_path / "run" / "recipe.json", out=tmp_path / "again", quiet=True)
    assert again.recipe == run.recipe and again.recipe.method.options["temperature"] == 0.3
    assert_same_state(saved(tmp_path / "again"), saved(tmp_path / "run"))
    images = torch.randint(0, 255, (5, 1, 20, 20), dtype=torch.uint8)
    assert inbatch.load(tmp_path / "run").embed(images).shape == (5, run.encoder.width)


def test_the_same_features_alone_and_among_others(tmp_path: Path) -> None:
    encoder = tiny("simclr", tmp_path).encoder
    images = torch.randint(0, 255, (8, 1, 20, 20), dtype=torch.uint8)
    alone = [encoder.embed(images[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(torch.tensor(encoder.embed(images)), torch.cat([torch.tensor(a) for a in alone]))


def test_an_overwrite_is_asked_for(tmp_path: Path) -> None:
    tiny("simclr", tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="--overwrite"):
        tiny("simclr", tmp_path, epochs=1)
    tiny("moco", tmp_path, epochs=1, overwrite=True)
    with pytest.raises(ConfigError, match="keeps its recipe"):
        tiny("moco", tmp_path, epochs=3, resume=True)


def test_divergence_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = METHODS["simclr"].loss

    def broken(self: Any, *args: Any) -> dict[str, torch.Tensor]:
        found = real(self, *args)
        return {"loss": found["loss"] * float("nan")}

    monkeypatch.setattr(METHODS["simclr"], "loss", broken)
    with pytest.raises(TrainingError, match="no weight was changed") as caught:
        tiny("simclr", tmp_path)
    assert caught.value.exit_code == 4
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_arrays_in_memory(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8).numpy()
    run = inbatch.pretrain(
        images, "simclr", out=tmp_path / "a", encoder="tiny", batch=20, epochs=1, quiet=True,
        settings={"schedule.warmup": 0},
    )  # fmt: skip
    assert run.result["evaluation"] is None and run.result["curve"][-1]["rankme"] > 1
    labelled = inbatch.pretrain(
        (images, [i % 3 for i in range(60)]), "supervised", out=tmp_path / "b", encoder="tiny", batch=20, epochs=1,
        quiet=True, settings={"schedule.warmup": 0},
    )  # fmt: skip
    assert "tenth" in labelled.result["held_out"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"batch": 4096, "context": 64}, DataError, "fewer than one batch"),
        ({"context": 7}, ConfigError, "divisor"),
        ({"context": 80}, ConfigError, "does not divide"),
        ({"settings": {"views.views": 1}}, ConfigError, "learns from"),
        ({"subset": 9999}, DataError, "has 1,297"),
        ({"settings": {"schedule.warmup": 100}}, ConfigError, "warm-up"),
        ({"encoder": "resnet1818"}, ConfigError, "resnet18"),
        ({"settings": {"encoder.init": "nowhere.pt"}}, DataError, "nowhere.pt"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    fields: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        tiny("simclr", tmp_path / "run", **fields)
    assert not (tmp_path / "run" / "recipe.json").exists(), "a run that never began left a recipe"


def test_labels_are_needed_where_a_method_learns_from_them(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8).numpy()
    with pytest.raises(DataError, match="none"):
        inbatch.pretrain(images, "supervised", out=tmp_path, encoder="tiny", batch=20)


def test_a_signal_to_the_whole_group_saves_before_the_workers_end(tmp_path: Path) -> None:
    """What a terminal or a scheduler does: every process gets the signal, the one that decodes too."""
    words = ["pretrain", "simclr", "--data", "digits-canvas", "--batch", "40", "--epochs", "400", "--workers", "2"]
    words += ["--quiet", "--out", str(tmp_path)]
    sets = ["--set", "subset=200", "--set", "resident=false", "--set", "evaluate_every=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "inbatch", *words, *sets], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)  # returns when the last process that holds stderr has ended
    assert process.returncode == 75, stderr
    assert "SIGTERM" in stderr and "Traceback" not in stderr
    assert checkpoint.load(tmp_path / "checkpoints").step > 0


def test_what_features_are_judged_by(tmp_path: Path) -> None:
    """A test split, else a tenth held out; unlabelled images are judged by labelled test data alone."""
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    settings = {"size": 16, "batch": 20, "encoder.name": "tiny"}

    def judged(data: Any, test: Any = None) -> Any:
        recipe, source = plan(data, settings)
        return held_out(recipe, source, data, test)

    bank, queries, how = judged("digits-canvas")
    assert (len(bank), len(queries)) == (1297, 500) and how.startswith("test split")
    bank, queries, how = judged((images, labels))
    assert (len(bank), len(queries)) == (54, 6) and "a tenth" in how
    assert not set(bank.indices.tolist()) & set(queries.indices.tolist())
    bank, queries, _ = judged((images, labels), (images[:9], labels[:9]))
    assert (len(bank), len(queries)) == (60, 9)
    assert judged(images) is None
    bank, queries, how = judged(images, (images[:30], labels[:30]))
    assert (len(bank), len(queries)) == (27, 3) and "a tenth" in how
    with pytest.raises(DataError, match="no labels"):
        judged(images, images[:9])
    with pytest.raises(DataError, match="other classes"):
        judged((images, labels), (images[:9], labels[:9] + 3))


def test_a_run_that_cannot_be_judged_at_its_end_says_so_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise DataError("an image is gone")

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr("inbatch.train.evaluate", broken)
        tiny("simclr", tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "crashed"
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10
