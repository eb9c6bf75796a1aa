"""The estimator for scikit-learn: images of every form, pipelines, pickling, and scikit-learn's own checks."""

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import inbatch
from inbatch.errors import ConfigError, DataError, Interrupted, Preempted
from inbatch.models import create_encoder
from inbatch.sklearn import BatchEncoder

DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (24, 12, 10, 3), np.uint8)
FAST: dict[str, Any] = {"encoder": "tiny", "epochs": 1, "image_size": 12}


def fake_run(data: Any, method: str, **fields: Any) -> SimpleNamespace:
    """Return what stands for a run: an encoder whose weights depend on the first image, so that fits differ."""
    pixels = data[0] if isinstance(data, tuple) else data
    torch.manual_seed(int(pixels[0].sum()) if isinstance(pixels, torch.Tensor) else 0)
    options = {"size": fields.get("image_size", 12), "channels": fields["channels"]}
    return SimpleNamespace(encoder=create_encoder("tiny", **options).eval(), called=(data, method, fields))


@pytest.fixture
def untrained(monkeypatch):
    """Replace the training by a random encoder; return the calls."""
    calls: list[Any] = []

    def pretrain(data: Any, method: str, **fields: Any) -> SimpleNamespace:
        calls.append((data, method, fields))
        if isinstance(data, str):
            calls[-1] = (Path(data).read_text(), method, fields)
        return fake_run(data, method, **fields)

    monkeypatch.setattr("inbatch.sklearn.pretrain", pretrain)
    return calls


def test_a_fit_trains_and_survives_pickle(brief, tmp_path):
    state = torch.get_rng_state()
    encoder = BatchEncoder(run_dir=tmp_path / "run", **FAST).fit(RGB)
    assert encoder.channels_ == 3 and encoder.encoder_.size == 12
    features = encoder.transform(RGB)
    assert features.shape == (24, encoder.encoder_.width) and features.dtype == np.float32
    assert list(encoder.get_feature_names_out()[:2]) == ["batchencoder0", "batchencoder1"]
    assert np.array_equal(inbatch.load(tmp_path / "run").embed(RGB), features)
    again = pickle.loads(pickle.dumps(encoder))
    assert np.array_equal(again.transform(RGB), features) and again.get_params() == encoder.get_params()
    assert torch.equal(torch.get_rng_state(), state), "the random generator of the caller"
    assert b"torch" not in pickle.dumps(encoder)


def test_forms_of_the_same_images_have_the_same_features(untrained, tmp_path):
    encoder = BatchEncoder(**FAST).fit(RGB)
    features = encoder.transform(RGB)
    files = [tmp_path / f"{i}.png" for i in range(24)]
    for file, image in zip(files, RGB, strict=True):
        Image.fromarray(image).save(file)
    for images in (RGB.transpose(0, 3, 1, 2), torch.from_numpy(RGB), RGB.tolist(), files, list(map(str, files))):
        assert np.array_equal(encoder.transform(images), features)
    flat = RGB.reshape(24, -1)
    with pytest.raises(ValueError, match="does not fit images of 360 features"):
        encoder.set_params(image_shape=(12, 10)).transform(flat)
    copy = clone(encoder.set_params(image_shape=(12, 10, 3))).fit(flat)
    assert np.array_equal(copy.transform(flat), features) and copy.n_features_in_ == 360
    BatchEncoder("supcon", **FAST).fit(files, ["a", "b"] * 12)
    data, method, fields = untrained[-1]
    assert method == "supcon" and data.splitlines()[:3] == ["path,label", f"{files[0]},a", f"{files[1]},b"]
    assert fields["epochs"] == 1 and fields["batch_size"] == 24 and not fields["out"].exists()
    BatchEncoder(budget="5m", init="runs/1", settings={"optimizer.lr": 0.1}, image_size=12).fit(files)
    data, _, fields = untrained[-1]
    assert fields["settings"] == {"optimizer.lr": 0.1, "encoder.init": "runs/1"} and data.splitlines()[0] == "path"
    assert fields["budget"] == "5m" and not {"epochs", "encoder"} & fields.keys()


def test_the_list_of_paths_replaces_no_other_file(untrained, monkeypatch, tmp_path):
    files, run, paths = [tmp_path / f"{i}.png" for i in range(4)], tmp_path / "run", tmp_path / "run.csv"
    encoder = BatchEncoder(run_dir=run, **FAST)
    paths.write_text("path,label\nmine/a.jpg,rose\n")
    with pytest.raises(ConfigError, match=r"run\.csv exists and is not the list of these images"):
        encoder.fit(files)
    assert paths.read_text() == "path,label\nmine/a.jpg,rose\n" and not untrained
    paths.unlink()
    encoder.fit(files)
    before = paths.read_text()
    with pytest.raises(ConfigError, match="choose another run_dir"):
        encoder.fit(files[:3])
    encoder.fit(files)
    assert paths.read_text() == before and len(untrained) == 2

    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("no")

    monkeypatch.setattr("inbatch.sklearn.pretrain", refuse)
    for kept in (True, False):
        with pytest.raises(DataError, match="no"):
            encoder.fit(files)
        assert paths.exists() == kept
        paths.unlink(missing_ok=True)


def test_levels_of_numbers(untrained):
    encoder = BatchEncoder(**FAST)
    features = encoder.fit(RGB).transform(RGB)
    for images in (RGB / 255, RGB.astype(int), RGB.astype(np.uint16)):
        assert np.array_equal(encoder.transform(images), features)
        encoder.fit(images)
    assert untrained[-1][0].dtype == torch.uint8 and np.array_equal(untrained[-1][0], RGB.transpose(0, 3, 1, 2))
    encoder.fit(RGB < 128)
    black_and_white = untrained[-1][0]
    assert black_and_white.unique().tolist() == [0, 255]
    BatchEncoder(**FAST, image_shape=(12, 10, 3)).fit((RGB < 128).reshape(24, -1))
    assert torch.equal(untrained[-1][0], black_and_white)
    for images, words in ((RGB * 2.0, "pass levels"), (RGB - 300.0, "pass levels"), (RGB.astype(str), "numbers")):
        with pytest.raises(ValueError, match=words):
            encoder.fit(images)
    for levels in ((5, 5), (255, 0), (0, math.nan), (0, 1, 2), "ab"):
        with pytest.raises(ConfigError, match="give two numbers, the lower one first"):
            BatchEncoder(**FAST, levels=levels).fit(RGB * 2.0)
    other = BatchEncoder(**FAST, levels=(-255, 255)).fit(RGB - 0.0)
    assert other.levels == (-255, 255) and untrained[-1][0].min() >= 127
    digits = RGB // 16
    dark = BatchEncoder(**FAST, levels=(0, 16)).fit(digits)
    assert untrained[-1][0].max() > 200
    assert np.array_equal(dark.transform(digits), dark.transform(digits / 1.0)), "of any type"
    assert np.array_equal(dark.transform(RGB < 128), dark.transform(16.0 * (RGB < 128))), "booleans"


@pytest.mark.parametrize("kind", [Preempted, Interrupted])
def test_a_stopped_fit_does_not_advise_to_resume_a_run_that_is_removed(kind, monkeypatch, tmp_path):
    def stop(*_: Any, out: Path, **__: Any) -> None:
        raise kind(f"stopped, checkpoint saved: inbatch pretrain --resume {out}")

    monkeypatch.setattr("inbatch.sklearn.pretrain", stop)
    with pytest.raises(kind, match="its temporary run directory removed: fit again"):
        BatchEncoder(**FAST).fit(RGB)
    with pytest.raises(kind, match=f"--resume {tmp_path / 'run'}"):
        BatchEncoder(run_dir=tmp_path / "run", **FAST).fit(RGB)


def test_wrong_numbers_and_labels_are_named(untrained):
    bad = RGB / 255
    bad[3, 0, 0, 0] = np.nan
    for images in (bad, bad.astype(np.float32), np.where(np.isnan(bad), np.inf, bad)):
        with pytest.raises(ValueError, match="X contains NaN or infinity"):
            BatchEncoder(**FAST).fit(images)
    for images in (RGB, ["a.png"] * 24):
        with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[24, 20\]"):
            BatchEncoder("supcon", **FAST).fit(images, list("ab") * 10)
    BatchEncoder(**FAST).fit(torch.from_numpy(RGB / 255).bfloat16())
    assert untrained[-1][0].shape == (24, 3, 12, 10)


def test_files_are_read_as_in_training(monkeypatch, tmp_path):
    def pretrain(data: str, method: str, settings: Any, **fields: Any) -> SimpleNamespace:
        run = fake_run(data, method, **fields | {"channels": settings["channels"]})
        run.encoder.levels = settings["levels"]
        return run

    monkeypatch.setattr("inbatch.sklearn.pretrain", pretrain)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, RGB, strict=False):
        Image.fromarray(image[..., 0].astype(np.uint16) * 16).save(file)
    fitted = BatchEncoder(settings={"channels": 1, "levels": (0, 4080)}, **FAST).fit(files)
    assert fitted.channels_ == 1
    assert np.array_equal(fitted.transform(files), fitted.encoder_.embed(RGB[:4, ..., :1]))


def test_works_in_a_pipeline_and_a_grid_search(untrained):
    grey, labels = RGB[..., 0].reshape(24, -1), np.arange(24) % 2
    model = make_pipeline(BatchEncoder(image_shape=(12, 10), **FAST), LogisticRegression())
    search = GridSearchCV(model, {"batchencoder__method": ["simclr", "supcon"]}, cv=2).fit(grey, labels)
    assert search.predict(grey).shape == (24,) and len(search.cv_results_["mean_test_score"]) == 2
    assert {method for _, method, _ in untrained} == {"simclr", "supcon"} and len(untrained) == 5
    frame = BatchEncoder(image_shape=(12, 10), **FAST).set_output(transform="pandas").fit_transform(grey)
    assert frame.shape == (24, 96) and frame.columns[0] == "batchencoder0"


@pytest.mark.slow
def test_a_search_trains(brief, tmp_path):
    grey, labels = RGB[..., 0], np.arange(24) % 2
    model = make_pipeline(BatchEncoder(**FAST), LogisticRegression())
    search = GridSearchCV(model, {"batchencoder__method": ["simclr", "supcon"]}, cv=2, n_jobs=2).fit(grey, labels)
    assert search.predict(grey).shape == (24,) and np.isfinite(search.cv_results_["mean_test_score"]).all()
    encoder = BatchEncoder("supcon", run_dir=tmp_path / "run", **FAST).fit(RGB, labels)
    assert encoder.__sklearn_tags__().target_tags.required
    started = BatchEncoder(init=tmp_path / "run", epochs=1, image_size=12, settings={"optimizer.lr": 0.0}).fit(RGB)
    assert torch.equal(next(started.encoder_.parameters()), next(encoder.encoder_.parameters()))


def test_invalid_input_is_refused(untrained):
    encoder = BatchEncoder(**FAST)
    with pytest.raises(NotFittedError):
        encoder.transform(RGB)
    for images, words in (
        (np.zeros((9, 10)), "cannot form a square image"),
        (RGB[:1], "minimum of 2"),
        ("photos", "not one path"),
        (np.full((9, 9), np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            encoder.fit(images)
    with pytest.raises(ValueError, match="requires y"):
        BatchEncoder("supcon").fit(RGB)
    with pytest.raises(DataError, match="3 channels"):
        encoder.fit(RGB[..., 0]).transform(RGB)
    with pytest.raises(DataError, match="no-such"):
        encoder.fit(RGB).transform(["no-such.png"])


class Rows(BatchEncoder):
    """Takes rows of any number of features as images of one row of pixels."""

    def _shape(self, features: int) -> tuple[int, ...]:
        return (1, features) if features > 1 else super()._shape(features)


@pytest.mark.slow
@parametrize_with_checks([Rows(encoder="tiny", epochs=1, image_size=8, levels=(-10, 110))])
def test_checks_of_scikit_learn(estimator, check, brief):
    check(estimator)
