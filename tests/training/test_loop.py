"""Whole runs on the embedded data: resume, training, stops, and the files of a run."""

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
from rank_pool import on_ranks
from small_methods import SMALL
from small_runs import assert_same_state, leave_out_evaluation, saved, stop_after, tiny

import inbatch
from inbatch.errors import ConfigError, DataError, Preempted, TrainingError
from inbatch.methods import METHODS
from inbatch.training import checkpoint
from inbatch.training.holdout import evaluation_split
from inbatch.training.resolve import resolve_recipe
from inbatch.training.survey import survey


def surveyed(images: int) -> dict[str, Any]:
    """Return the state of PCL's survey of the data set before its first epoch, as numbers to pass between processes."""
    options = {f"method.{k}": v for k, v in SMALL["pcl"].items()}
    built = inbatch.api.prepare(
        "digits-canvas", "pcl", subset=images, batch_size=40, settings=options, device="cpu", workers=0
    )
    built.encoder.train()
    figures = survey(built, 0)
    assert built.encoder.training
    state = {name: x.numpy() for name, x in built.method.clusterings.state_dict().items()}
    return state | {"found": figures}


@pytest.mark.slow
@pytest.mark.parametrize("images", [120, 121], ids=["even", "odd"])
def test_a_survey_is_shared_by_the_ranks(images: int) -> None:
    """Two ranks, each with half of the images and of the clusterings, give the result of one process."""
    alone, (first, second) = surveyed(images), on_ranks(2, surveyed, images)
    assert alone["found"].keys() == {"nmi_4", "nmi_6"}
    for name in alone.keys() - {"found"}:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert first["found"] == second["found"] == pytest.approx(alone["found"])


def test_a_survey_is_of_clean_images_through_the_target_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {f"method.{k}": v for k, v in SMALL["pcl"].items()}
    built = inbatch.api.prepare("digits-canvas", "pcl", subset=60, batch_size=20, settings=settings, device="cpu")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(built.method, "survey", lambda *args: seen.update(zip("rlew", args, strict=True)) or {})
    with torch.no_grad():
        for p in built.network.parameters():
            p.zero_()  # the survey must not use the online network
    survey(built, 3)
    source, target = built.loader.source, built.target.eval()
    images = built.encoder.prepare(source.image(i) for i in range(60))
    with torch.no_grad():
        expected = target([images])["projection"][0]
    torch.testing.assert_close(seen["r"]["projection"], expected)
    assert torch.equal(seen["l"], source.labels) and seen["e"] == 3 and expected.std() > 0


@pytest.mark.slow
def test_clusters_are_in_the_checkpoint_and_their_agreement_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InfoNCE alone for an epoch, then a survey before each epoch, also in a run cut between two epochs."""
    fields = {"epochs": 3, "settings": {"method.warmup_epochs": 1}}
    tiny("pcl", tmp_path / "whole", **fields)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 5)
        tiny("pcl", tmp_path / "cut", **fields)
    assert saved(tmp_path / "cut")["method"]["clusterings.every.0.made"] == 0
    tiny("pcl", tmp_path / "cut", resume=True, **fields)
    for part in ("method", "network", "target"):
        assert_same_state(saved(tmp_path / "cut")[part], saved(tmp_path / "whole")[part], part)
    assert saved(tmp_path / "cut")["method"]["clusterings.every.0.made"] == 1
    for name in ("whole", "cut"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "nmi_4" in line] == [5, 10]
        parts = {line["step"]: line["prototypes"] for line in lines if "prototypes" in line}
        assert parts[1] == 0 and parts[15] > 0


@pytest.mark.usefixtures("few")
def test_a_run_leaves_everything_that_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny("simclr", tmp_path / "run", settings={"method.temperature": 0.3}, epochs=1)
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "run.json", "result.json", "metrics.jsonl", "curves.png", "checkpoints", "encoder"} <= left
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    leave_out_evaluation(monkeypatch)
    again = inbatch.pretrain(config=tmp_path / "run" / "recipe.json", out=tmp_path / "again", quiet=True)
    assert again.recipe == run.recipe and again.recipe.method.options["temperature"] == 0.3
    assert_same_state(saved(tmp_path / "again"), saved(tmp_path / "run"))
    images = torch.randint(0, 255, (5, 1, 20, 20), dtype=torch.uint8)
    assert inbatch.load(tmp_path / "run").embed(images).shape == (5, run.encoder.width)


@pytest.mark.slow
def test_the_same_features_alone_and_among_others(tmp_path: Path) -> None:
    encoder = tiny("simclr", tmp_path).encoder
    images = torch.randint(0, 255, (8, 1, 20, 20), dtype=torch.uint8)
    alone = [encoder.embed(images[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(torch.tensor(encoder.embed(images)), torch.cat([torch.tensor(a) for a in alone]))


@pytest.mark.slow
def test_existing_run_needs_overwrite(tmp_path: Path) -> None:
    tiny("simclr", tmp_path, epochs=1)
    with pytest.raises(ConfigError, match="--overwrite"):
        tiny("simclr", tmp_path, epochs=1)
    tiny("moco", tmp_path, epochs=1, overwrite=True)
    with pytest.raises(ConfigError, match="keeps its recipe"):
        tiny("moco", tmp_path, epochs=3, resume=True)


@pytest.mark.usefixtures("brief")
def test_divergence_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = METHODS["simclr"].loss

    def broken(self: Any, *args: Any) -> dict[str, torch.Tensor]:
        losses = real(self, *args)
        return {"loss": losses["loss"] * float("nan")}

    monkeypatch.setattr(METHODS["simclr"], "loss", broken)
    with pytest.raises(TrainingError, match="no weight was changed") as caught:
        tiny("simclr", tmp_path)
    assert caught.value.exit_code == 4
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("unjudged")
def test_arrays_in_memory(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8).numpy()
    run = inbatch.pretrain(
        images, "simclr", out=tmp_path / "a", encoder="tiny", batch_size=20, epochs=1, quiet=True,
        settings={"schedule.warmup_epochs": 0},
    )  # fmt: skip
    assert run.result["evaluation"] is None and run.result["curve"][-1]["rankme"] > 1
    labelled = inbatch.pretrain(
        (images, [i % 3 for i in range(60)]), "supervised", out=tmp_path / "b", encoder="tiny", batch_size=20, epochs=1,
        quiet=True, settings={"schedule.warmup_epochs": 0},
    )  # fmt: skip
    assert "tenth" in labelled.result["held_out"]


@pytest.mark.grid(3)
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"batch_size": 4096, "context": 64}, DataError, "fewer than one batch"),
        ({"context": 7}, ConfigError, "divisor"),
        ({"context": 80}, ConfigError, "does not divide"),
        ({"settings": {"views.num_views": 1}}, ConfigError, "learns from"),
        ({"subset": 9999}, DataError, "has 1,297"),
        ({"settings": {"schedule.warmup_epochs": 100}}, ConfigError, "warm-up"),
        ({"encoder": "resnet1818"}, ConfigError, "resnet18"),
        ({"settings": {"encoder.init": "nowhere.pt"}}, DataError, "nowhere.pt"),
    ],
)
def test_invalid_settings_are_refused_before_the_first_step(
    fields: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        tiny("simclr", tmp_path / "run", **fields)
    assert not (tmp_path / "run" / "recipe.json").exists(), "a run that never began left a recipe"


def test_labels_are_needed_where_a_method_learns_from_them(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8).numpy()
    with pytest.raises(DataError, match="none"):
        inbatch.pretrain(images, "supervised", out=tmp_path, encoder="tiny", batch_size=20)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_before_the_workers_end(tmp_path: Path) -> None:
    """As a terminal or a scheduler does: every process gets the signal, also the decoding ones."""
    words = ["pretrain", "simclr", "--data", "digits-canvas", "--batch", "40", "--epochs", "400", "--workers", "2"]
    words += ["--quiet", "--out", str(tmp_path)]
    sets = ["--set", "subset=200", "--set", "cache_on_device=false", "--set", "evaluate_every=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "inbatch", *words, *sets], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)  # returns after the last process that holds stderr has ended
    assert process.returncode == 75, stderr
    assert "SIGTERM" in stderr and "Traceback" not in stderr
    assert checkpoint.load(tmp_path / "checkpoints").step > 0


def test_images_of_the_evaluation(tmp_path: Path) -> None:
    """A test split, else a tenth held out; a run on unlabelled images is evaluated on labelled test data alone."""
    images = torch.randint(0, 255, (60, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(60) % 3
    settings = {"image_size": 16, "batch_size": 20, "encoder.name": "tiny"}

    def judged(data: Any, test: Any = None) -> Any:
        recipe, source = resolve_recipe(data, settings)
        split = evaluation_split(recipe, source, data, test)
        return split and (split.bank, split.queries, split.description)

    bank, queries, how = judged("digits-canvas")
    assert (len(bank), len(queries)) == (1297, 500) and how.startswith("test split")
    bank, queries, how = judged((images, labels))
    assert (len(bank), len(queries)) == (54, 6) and "a tenth" in how
    assert not set(bank.indices.tolist()) & set(queries.indices.tolist())
    bank, queries, _ = judged((images, labels), (images[:9], labels[:9]))
    assert (len(bank), len(queries)) == (60, 9)
    assert judged(images) is None and judged((images, labels.clamp(max=0))) is None
    bank, _, _ = judged((images, labels.clamp(max=0)), (images[:30], labels[:30]))
    assert len(bank) == 27
    bank, queries, how = judged(images, (images[:30], labels[:30]))
    assert (len(bank), len(queries)) == (27, 3) and "a tenth" in how
    with pytest.raises(DataError, match="no labels"):
        judged(images, images[:9])
    with pytest.raises(DataError, match="no labels"):
        judged((images, labels), images[:9])
    with pytest.raises(DataError, match="other classes"):
        judged((images, labels), (images[:9], labels[:9] + 3))
    _, queries, _ = judged((images, labels), (images[:9], labels[:9].clamp(max=1)))
    assert queries.labels.unique().tolist() == [0, 1]


@pytest.mark.slow
def test_run_whose_last_evaluation_fails_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise DataError("an image is gone")

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr("inbatch.training.monitors.online_evaluation.evaluate", broken)
        tiny("simclr", tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    assert tiny("simclr", tmp_path, resume=True).result["steps"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("resident", [True, False])
def test_online_evaluation_uses_some_streamed_images_and_the_last_one_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    from inbatch.training.monitors import online_evaluation

    sizes: list[int] = []
    real = online_evaluation.embed

    def counting(encoder: Any, source: Any, **options: Any) -> Any:
        sizes.append(len(source))
        return real(encoder, source, **options)

    monkeypatch.setattr(online_evaluation, "embed", counting)
    monkeypatch.setattr(online_evaluation, "BANK", 50)
    monkeypatch.setattr(online_evaluation, "QUERIES", 30)
    run = tiny(
        "simclr", tmp_path, epochs=1, cache_on_device=resident, workers=0, settings={"schedule.warmup_epochs": 0}
    )
    assert sizes == [200, 500, 200, 500] if resident else [50, 30, 50, 30]
    evaluated = run.result["evaluation"]
    assert (evaluated["train"]["images"], evaluated["test"]["images"]) == (200, 500)
