"""Runs on data whose images and labels are in named columns, and on data whose labels are not classes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from PIL import Image
from small_runs import leave_out_evaluation

import inbatch
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation.embeddings import matched_labels
from inbatch.training.build import build
from inbatch.training.holdout import evaluation_split
from inbatch.training.plan import plan_without_budget
from inbatch.training.resolve import resolve_recipe

SMALL: dict[str, Any] = {"encoder": "tiny", "epochs": 1, "batch_size": 10, "image_size": 16, "quiet": True}
COLUMNS = {"image_column": "photo", "label_column": "species"}
ID = {0: 1000, 1: 181_000}


def encoded(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 30 images with names, ids and several numbers as labels, in columns that must be named."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = np.random.default_rng(0).integers(256, size=(30, 16, 16, 3), dtype=np.uint8)
    columns = {"photo": [encoded(i) for i in images], "mask": [encoded(255 - i) for i in images]}
    columns |= {"species": ["cat", "dog"] * 15, "code": [ID[i % 2] for i in range(30)], "label": [[1.0, 2.0]] * 30}
    path = tmp_path_factory.mktemp("data") / "animals.parquet"
    parquet.write_table(arrow.table(columns), path)
    return path


@pytest.fixture(scope="module")
def learned(animals: Path, tmp_path_factory: pytest.TempPathFactory) -> inbatch.Run:
    """Return a finished run without labels: those of the default column are not classes."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        return inbatch.pretrain(animals, out=tmp_path_factory.mktemp("runs") / "a", image_column="photo", **SMALL)


def test_run_without_classes_states_why_it_has_no_accuracy(learned: inbatch.Run) -> None:
    assert learned.result["evaluation"] is None and learned.recipe.columns["image_column"] == "photo"
    assert "list<" in learned.result["label_note"] and "neither whole numbers nor names" in learned.result["label_note"]


def test_methods_with_labels_name_the_reason(animals: Path) -> None:
    settings = {"encoder.name": "tiny", "batch_size": 10, "image_size": 16, "image_column": "photo", "epochs": 1}
    plan = plan_without_budget(str(animals), settings | {"method.name": "supcon"})
    with pytest.raises(DataError, match=r"supcon learns from labels, but .* has none \(.*list<.*\): .*--label-column"):
        build(plan.recipe, plan.source, device="cpu", workers=0)
    plan = plan_without_budget(str(animals), settings | {"method.name": "supcon", "label_column": "code"})
    assert plan.source.classes == ("1000", "181000") and plan.recipe.columns["label_column"] == "code"


def test_embed_writes_the_ids_of_the_data(learned: inbatch.Run, animals: Path, tmp_path: Path) -> None:
    """The image column is that of the run; labels are those of the named column."""
    for label, labels in (("code", [1000, 181_000]), ("species", [0, 1]), (None, [-1, -1]), ("none", [-1, -1])):
        inbatch.embed_run(learned.directory, animals, tmp_path / "f.npz", label_column=label)
        with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
            assert file["label"].tolist() == labels * 15
            assert file["class"].any() == (label in ("code", "species"))
    with pytest.raises(DataError, match="has no column 'kind'"):
        inbatch.embed_run(learned.directory, animals, tmp_path / "f.npz", label_column="kind")


def test_a_run_below_the_home_directory_keeps_its_columns(
    learned: inbatch.Run, animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(learned.directory.parent))
    assert inbatch.embed_run(f"~/{learned.directory.name}", animals, tmp_path / "f.npz") == 30


def test_evaluation_without_classes_reports_the_skipped_protocols(
    learned: inbatch.Run, animals: Path, tmp_path: Path
) -> None:
    evaluation = inbatch.evaluate_run(learned.directory)
    assert "unlabelled" in evaluation and "k-NN and the linear probe are left out" in evaluation["note"]
    with pytest.raises(ConfigError, match=r"has no labels for the evaluation \(.*list<"):
        inbatch.evaluate_run(learned.directory, protocols=["knn"])
    assert inbatch.evaluate_run(learned.directory, label_column="species", protocols=["knn"])["knn"]["top1"] >= 0
    many = np.zeros((12, 14), np.uint8)
    np.savez(tmp_path / "chest.npz", images=np.zeros((12, 16, 16, 3), np.uint8), labels=many)
    evaluation = inbatch.evaluate_run(learned.directory, tmp_path / "chest.npz")  # without the columns of the run
    assert "shape (12, 14), several for each image" in evaluation["note"]


def test_test_data_have_columns_of_their_own_and_may_lack_classes(animals: Path, tmp_path: Path) -> None:
    settings = {"image_size": 16, "epochs": 1, **COLUMNS}
    recipe, source = resolve_recipe(str(animals), settings)
    for i in range(2):
        (tmp_path / "dog").mkdir(exist_ok=True)
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "dog" / f"{i}.png")
    (tmp_path / "l.csv").write_text("dog/0.png,dog\ndog/1.png,dog\n")
    split = evaluation_split(recipe, source, str(animals), str(tmp_path / "l.csv"))
    assert split is not None and matched_labels(split.bank, split.queries).tolist() == [1, 1]
    (tmp_path / "l.csv").write_text("dog/0.png,dog\ndog/1.png,eel\n")
    with pytest.raises(DataError, match="has other classes than"):
        evaluation_split(recipe, source, str(animals), str(tmp_path / "l.csv"))


def test_test_data_of_many_levels_are_read_by_the_columns_of_the_run(tmp_path: Path) -> None:
    """Values without a known range cannot be opened without the levels of the run."""
    kind = np.arange(12) % 2
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.random.rand(12, 16, 16, 3).astype(np.float32), kind=kind, y=kind * 0)
    settings = {"image_size": 16, "epochs": 1, "label_column": "kind", "levels": [0, 1]}
    recipe, source = resolve_recipe(str(tmp_path / "train.npz"), settings)
    split = evaluation_split(recipe, source, str(tmp_path / "train.npz"), str(tmp_path / "test.npz"))
    assert split is not None and split.queries.labels.tolist() == kind.tolist()


def test_recipes_keep_the_columns(animals: Path) -> None:
    recipe, _ = resolve_recipe(str(animals), {"image_size": 16, **COLUMNS})
    assert "--set image_column=photo --set label_column=species" in recipe.command()
    assert recipe.nested()["label_column"] == "species"


def test_options(animals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(f"data {animals} --image-column photo --label-column species --sample 2")
    assert result.exit_code == 0 and "2: cat 15, dog 15" in result.stdout
    result = run(f"data {animals} --image-column photo --sample 2")
    assert result.exit_code == 0 and "k-NN and the linear probe are left out" in result.stdout
    result = run(f"data {animals}")
    assert result.exit_code == 3 and "choose one of photo, mask with image_column (--image-column)" in result.stderr
    asked: dict[str, Any] = {}
    monkeypatch.setattr("inbatch.api.dry_run", lambda *_, **fields: asked.update(fields) or {})
    monkeypatch.setattr("inbatch.apps.cli.training.print_dry_run", lambda _: None)
    assert run(f"pretrain --data {animals} --image-column photo --label-column none --dry-run").exit_code == 0
    assert (asked["image_column"], asked["label_column"]) == ("photo", "none")
    for command in ("evaluate", "embed"):
        requested: dict[str, Any] = {}

        def fail(*_: Any, requested: dict[str, Any] = requested, **options: Any) -> None:
            requested.update(options)
            raise ConfigError("enough")

        monkeypatch.setattr(f"inbatch.api.{command}_run", fail)
        data = "" if command == "evaluate" else f"{animals} -o f.npz"
        assert run(f"{command} {tmp_path} {data} --image-column photo --label-column code").exit_code == 2
        assert (requested["image_column"], requested["label_column"]) == ("photo", "code")
