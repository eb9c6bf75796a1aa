"""Fault 9: a value that is not finite stops the run before the weights change, and the step can be replayed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from rank_pool import on_ranks
from small_methods import small_settings
from small_runs import TINY, tiny
from typer.testing import CliRunner

import inbatch
from inbatch.api import prepare, replay_run
from inbatch.apps.cli import app
from inbatch.data import open_data, write_folder
from inbatch.errors import ConfigError, DataError, TrainingError
from inbatch.training import replay as module
from inbatch.training.build import RunComponents
from inbatch.training.replay import FOLDER, capture
from inbatch.training.step import NonFiniteError, Step


def break_a_weight(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Set a weight of the encoder to infinity before step `at`."""
    real = Step.__call__

    def call(self: Step, batch: Any, step: int) -> Any:
        if step == at:
            with torch.no_grad():
                dict(self.network.encoder.named_parameters())["backbone.3.weight"][0, 0, 0, 0] = float("inf")
        return real(self, batch, step)

    monkeypatch.setattr(Step, "__call__", call)


def built(data: Any = "digits-canvas", method: str = "simclr", **fields: Any) -> RunComponents:
    options = small_settings(method)
    settings = options | {"precision": "float32"} | fields.pop("settings", {})
    arguments = {key: value for key, value in TINY.items() if key != "quiet"} | fields
    return prepare(data, method, settings=settings, **arguments)


def kept(out: Path, built: RunComponents, step: int = 0) -> Any:
    """Capture a step as if it had failed; return its batch."""
    if built.step.curator is not None:
        built.step.curator.starts = 0
    batch = next(iter(built.loader.epoch(step // built.loader.steps, step % built.loader.steps)))
    if built.step.curator is not None:
        batch, figures = built.step.curator(batch)
        assert figures["curate_redrawn"] > 0, "nothing was redrawn: the test has lost its point"
    if built.step.similar is not None:
        batch, figures = built.step.similar(batch, lambda x, dim: x, 0)
        assert figures["dropped_pairs"] > 0, "nothing was left out"
    capture(out, built, NonFiniteError(step, batch, {"loss": torch.tensor(0.0)}, torch.tensor(0.0)))
    built.step.curator = built.step.similar = None
    return batch


@pytest.mark.usefixtures("brief")
def test_run_stops_before_its_weights_change_and_states_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_a_weight(patch, 7)
        with pytest.raises(TrainingError, match=r"step 7: .*no weight was changed.*inbatch replay") as caught:
            tiny("simclr", tmp_path, precision="float32")
    assert caught.value.exit_code == 4
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    record = json.loads((tmp_path / FOLDER / "capture.json").read_text())
    assert record["step"] == 7 and record["epoch"] == 1 and len(record["images"]) == TINY["batch_size"]

    report = replay_run(tmp_path)
    assert report["reproduced"] and report["places"][0] == "the weight encoder.backbone.3.weight"
    assert report["places"][1] == "the output of encoder.backbone.3 (Conv2d)"
    assert any(place.startswith("the gradient of") for place in report["places"]) and "float32" not in report
    shown = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert shown.exit_code == 0 and "first the weight encoder.backbone.3.weight" in shown.output


@pytest.mark.slow
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("curate", [None, "redraw"])
@pytest.mark.parametrize("method", ["simclr", "moco", "swav"])
def test_the_step_is_the_same_bit_for_bit(tmp_path: Path, method: str, resident: bool, curate: str | None) -> None:
    images = write_folder(open_data("digits-canvas-colour", subset=80), tmp_path / "images")
    fields: dict[str, Any] = {
        "cache_on_device": resident,
        "curate": curate,
        "encoder": "tiny",
        "image_size": 32,
        "subset": None,
    }
    here = built(images, method, **fields, settings={"curate.rule": "strict"} if curate else {})
    batch = kept(tmp_path, here)
    losses = here.step(batch, 0)
    (tmp_path / "images").rename(tmp_path / "away")  # the capture needs no data
    report = replay_run(tmp_path)
    assert not report["reproduced"] and report["places"] == []
    assert (report["loss"], report["grad_norm"]) == (float(losses["loss"]), float(losses["grad_norm"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_near_duplicates_are_part_of_the_capture(tmp_path: Path, method: str) -> None:
    """Also those among the rows of a memory bank, and what it keeps of the samples."""
    here = built("digits-canvas", method, settings={"negatives.name": "drop-similar", "negatives.threshold": 0.5})
    here.step(next(iter(here.loader.epoch(0))), 0)
    batch = kept(tmp_path, here, 1)
    assert (batch.bank is not None) == (method == "moco")
    losses, report = here.step(batch, 1), replay_run(tmp_path)
    assert (report["loss"], report["grad_norm"]) == (float(losses["loss"]), float(losses["grad_norm"]))


def test_a_view_that_is_not_a_number_is_named_by_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, real = kept(tmp_path, built()), module._checked
    bad = int(batch.index[5])

    def spoiling(views: Any, places: list[str]) -> Any:
        def spoilt(chunk: Any) -> Any:
            drawn = [view.clone() for view in views(chunk)]
            drawn[1][chunk.index == bad] = float("nan")
            return drawn

        return real(spoilt, places)

    monkeypatch.setattr(module, "_checked", spoiling)
    report = replay_run(tmp_path)
    assert report["reproduced"] and report["places"][0] == f"view 1 of image {bad}"


def test_groups_over_all_ranks_are_put_together_again(tmp_path: Path) -> None:
    """With sync_norm a group has a part of every rank's samples."""
    for rank in range(2):
        index = torch.arange(8) + 10 * rank
        share = {"index": index, "label": -index, "size": index[:, None].repeat(1, 2)}
        (tmp_path / f"share-{rank}.safetensors").write_bytes(safetensors.torch.save(share))
    record = {"world": 2, "seed": 0, "epoch": 0, "context": 8}
    assert module._batch(tmp_path, record, False).index.tolist() == [*range(8), *range(10, 18)]
    batch = module._batch(tmp_path, record, True)
    assert batch.index.view(2, 8).tolist() == [[0, 1, 2, 3, 10, 11, 12, 13], [4, 5, 6, 7, 14, 15, 16, 17]]
    assert batch.size is not None and torch.equal(batch.size[:, 0], batch.index)


@pytest.mark.slow
def test_bf16_step_is_repeated_in_float32(tmp_path: Path) -> None:
    kept(tmp_path, built(settings={"precision": "bf16"}))
    report = replay_run(tmp_path)
    assert (report["precision"], report["float32"]["precision"]) == ("bfloat16", "float32")
    assert report["loss"] == pytest.approx(report["float32"]["loss"], rel=0.05)
    shown = CliRunner().invoke(app, ["replay", str(tmp_path), "--json"])
    assert shown.exit_code == TrainingError.exit_code  # the step did not fail
    assert json.loads(shown.output)["reproduced"] is False


def _diverge_on_a_rank(folder: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        break_a_weight(patch, 2)
        try:
            tiny("moco", Path(folder), context=10, precision="float32")
        except TrainingError as error:
            return str(error)
    return "nothing"


@pytest.mark.slow
def test_step_of_two_ranks_is_repeated_by_one_process(tmp_path: Path) -> None:
    for message in on_ranks(2, _diverge_on_a_rank, str(tmp_path)):
        assert "inbatch replay" in message
    assert {p.name for p in (tmp_path / FOLDER).iterdir()} == {
        "capture.json", "recipe.json", "last.pt", "share-0.safetensors", "share-1.safetensors",
    }  # fmt: skip
    report = replay_run(tmp_path)
    assert report["reproduced"] and report["places"][0] == "the weight encoder.backbone.3.weight"
    (tmp_path / FOLDER / "share-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"share-1\.safetensors cannot be read .*machine of rank 1"):
        replay_run(tmp_path)


def _capture_on_a_rank(folder: str) -> float:
    here = built(method="moco", context=10)
    return float(here.step(kept(Path(folder), here), 0)["loss"])


@pytest.mark.slow
def test_two_ranks_and_one_process_find_the_same_loss(tmp_path: Path) -> None:
    losses = on_ranks(2, _capture_on_a_rank, str(tmp_path))
    np.testing.assert_allclose(replay_run(tmp_path)["loss"], losses, rtol=1e-6)


def test_invalid_captures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no captured step"):
        replay_run(tmp_path)
    kept(tmp_path, built())
    share = tmp_path / FOLDER / "share-0.safetensors"
    share.write_bytes(share.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"share-0\.safetensors is damaged"):
        replay_run(tmp_path)
    (tmp_path / FOLDER / "capture.json").write_text("{")
    assert CliRunner().invoke(app, ["replay", str(tmp_path)]).exit_code == 3


@pytest.mark.slow
def test_a_new_run_removes_an_old_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_a_weight(patch, 0)
        with pytest.raises(TrainingError):
            tiny("simclr", tmp_path)
    assert (tmp_path / FOLDER).is_dir()
    inbatch.pretrain("digits-canvas", out=tmp_path, overwrite=True, **(TINY | {"epochs": 1}))
    assert not (tmp_path / FOLDER).exists()
