"""The data of a run are found again from another directory, after a move, and at a place that is passed."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import leave_out_evaluation, stop_after, use_few_images

import inbatch
from inbatch.data import open_data, write_folder
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.runtime.files import write_json
from inbatch.training.checkpoint import save
from inbatch.training.data_places import located, save_places
from inbatch.training.recipe import make
from inbatch.training.resume import finished_run, resumed_plan

pytestmark = pytest.mark.usefixtures("narrow")

RECIPE = make({"data": "photos", "test": "held.csv", "method.name": "simclr", "image_size": 32})


def test_a_path_is_kept_as_absolute_and_relative_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, run = tmp_path / "project", tmp_path / "project" / "runs" / "one"
    for folder in (project / "photos", run, tmp_path / "elsewhere" / "photos"):
        folder.mkdir(parents=True)
    (project / "held.csv").write_text("")
    monkeypatch.chdir(project)
    assert located(run, RECIPE) == RECIPE, "a run of an earlier version has no data.json"
    save_places(Path("runs/one"), RECIPE, RECIPE)
    kept = json.loads((run / "data.json").read_text())
    assert kept["data"] == {"given": "photos", "absolute": str(project / "photos"), "from_run": "../../photos"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    here = located(run, RECIPE)
    assert (here.data, here.test) == (str(project / "photos"), str(project / "held.csv"))
    assert located(run, replace(RECIPE, data="other")).data == "other", "an edited recipe has its own path"

    moved = shutil.move(project, tmp_path / "moved")
    here = located(Path(moved, "runs", "one"), RECIPE)
    assert (here.data, here.test) == (str(tmp_path / "moved" / "photos"), str(tmp_path / "moved" / "held.csv"))
    (tmp_path / "moved" / "photos").rmdir()
    assert located(Path(moved, "runs", "one"), RECIPE).data == "photos"


def test_missing_images_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    write_json(run / "recipe.json", RECIPE.nested())
    save(run / "checkpoints", {}, step=1)
    for place in ("photos", str(tmp_path / "photos")):  # without data.json, of an earlier version, and with it
        for use in (lambda: inbatch.pretrain(resume=run), lambda: resumed_plan(run, None, {}, download=False)):
            with pytest.raises(DataError, match=rf"^Cannot read .* run: {place} does not exist\. Pass .* \(--data\)$"):
                use()
        Path("photos").mkdir(exist_ok=True)
        save_places(run, RECIPE, RECIPE)
        Path("photos").rmdir()


def test_only_paths_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("digits-canvas", "shards"):
        Path(folder).mkdir()
    for data, kept in (
        ("digits-canvas", False), ("torchvision/STL10", False), ("hf/mnist", False), ("no such", False),
        ("shards", True), ("shards/{000..003}.tar", True), ("nowhere/{000..003}.tar", False),
        ("shards:digits-canvas/*.jpg", True), ("shards:nowhere", False),
    ):  # fmt: skip
        recipe = replace(RECIPE, data=data)
        save_places(tmp_path, recipe, recipe)
        assert ("data" in json.loads((tmp_path / "data.json").read_text())) == kept, data
        absolute = ":".join(os.path.abspath(path) for path in data.split(":"))
        assert located(tmp_path, recipe).data == (absolute if kept else data)


FIELDS = {"encoder": "tiny", "batch_size": 20, "epochs": 2, "quiet": True, "settings": {"method.out_dim": 8}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with photos and a run on them, with relative paths, stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("project")
    write_folder(open_data("digits-canvas", subset=40), folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        leave_out_evaluation(patch)
        patch.setenv("INBATCH_CACHE", "off")
        patch.chdir(folder)
        with pytest.raises(Preempted):
            stop_after(patch, 2)
            inbatch.pretrain("photos", "simclr", out="run", **FIELDS)
    yield folder


@pytest.mark.usefixtures("brief")
def test_moved_data_are_accepted_if_they_are_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = (Path(shutil.copytree(project / name, tmp_path / name)) for name in ("run", "photos"))
    elsewhere = elsewhere.rename(tmp_path / "new place")
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(elsewhere, tmp_path / "other"))
    next(other.rglob("*.png")).unlink()
    report, places = (run / "run.json").read_bytes(), (run / "data.json").read_bytes()
    with pytest.raises(DataError, match="the images have changed since the run began"):
        inbatch.pretrain(other, resume=run, quiet=True)
    with pytest.raises(ConfigError, match="seed = 3"):
        inbatch.pretrain(elsewhere, resume=run, seed=3, quiet=True)
    assert (run / "run.json").read_bytes() == report and (run / "data.json").read_bytes() == places
    finished = inbatch.pretrain("new place", resume=run, quiet=True)
    assert finished.result["steps"] == 4 and finished.recipe.data == "photos"
    kept = json.loads((run / "data.json").read_text())["data"]
    assert kept == {"given": "photos", "absolute": str(elsewhere), "from_run": "../new place"}


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_finds_its_images_from_another_directory(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Path(shutil.copytree(project, tmp_path / "copied"))
    monkeypatch.chdir(tmp_path)
    for data in (None, "photos"):
        run = Path(shutil.copytree(both / "run", both / f"run {data}"))
        assert inbatch.pretrain(data, resume=run, quiet=True).result["steps"] == 4
    assert inbatch.evaluate_run(both / "run None", protocols=["knn"], k=3)["knn"]["top1"] > 0
    assert inbatch.inspect_run(both / "run None", count=2)["step"] == 4


@pytest.mark.usefixtures("brief")
def test_a_finished_run_with_a_budget_is_returned_for_the_same_images_only(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    planned = {"budget": "1h", "steps": 2, "epochs": 1}
    settings = FIELDS["settings"] | planned
    inbatch.pretrain("photos", "simclr", out=tmp_path / "run", **FIELDS | {"settings": settings, "epochs": 1})
    other = Path(shutil.copytree("photos", tmp_path / "photos"))
    monkeypatch.chdir(tmp_path)

    def again(data: object, **requested: object) -> inbatch.Run | None:
        return finished_run(tmp_path / "run", data, requested, False, lambda sentence: None)

    for data in (None, "photos", other):
        run = again(data)
        assert run is not None and run.result["steps"] == 2
    with pytest.raises(ConfigError, match="seed = 9"):
        again(None, seed=9)
    result = (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").write_text(result.replace('"unreadable": 0', '"unreadable": 1'))
    shutil.copy(first := next(other.rglob("*.png")), first.with_name("broken.png"))
    assert again(other) is not None, "the signature of the run is that of its readable images"
    first.with_name("broken.png").unlink()
    first.unlink()
    with pytest.raises(DataError, match="the images have changed"):
        again(other)
    (tmp_path / "run" / "result.json").write_text('{"steps": 2')
    assert again(None) is None, "without its result a run is not finished"


@pytest.mark.usefixtures("brief")
def test_test_data_passed_as_a_path_are_those_of_a_resumed_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 2)
        inbatch.pretrain("photos", "simclr", test=Path("photos"), out=tmp_path / "run", **FIELDS)
    monkeypatch.chdir(tmp_path)
    run = inbatch.pretrain(resume=tmp_path / "run", quiet=True)
    assert run.recipe.test == "photos" and run.result["held_out"].startswith("train split of ")
