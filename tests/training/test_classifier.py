"""Classifiers: training on the features of a run, figures on held-out images, the folder, and predictions."""

import csv
import json

import numpy as np
import pytest
import torch
from bars_data import bars, bars_file, bars_run
from command_line import one_object, run
from PIL import Image

import inbatch
from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.evaluation import Finetune, Lbfgs, embed, linear_probe
from inbatch.models import Classifier, create_encoder, load_classifier, save_classifier
from inbatch.training.classifier import check_replaceable


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run on bars, the folder of a classifier, and its figures."""
    folder = tmp_path_factory.mktemp("bars")
    run_dir = bars_run(folder)
    figures = inbatch.train_classifier(run_dir, out=folder / "classifier", probe=Lbfgs(iterations=20))
    return run_dir, folder / "classifier", figures


def test_a_probe_has_the_figures_of_the_evaluation_and_survives_its_folder(trained):
    run_dir, folder, figures = trained
    net, train, test = inbatch.load(run_dir), bars(40), bars(20, seed=1)
    expected = linear_probe(embed(net, train), embed(net, test), Lbfgs(iterations=20))
    assert figures["test"]["top1"] == expected["top1"] and figures["test"]["held_out"].startswith("test split of")
    assert figures["classes"] == ["0", "1"] and figures["train"]["images"] == 40 and figures["test"]["images"] == 20
    assert {name: one["images"] for name, one in figures["test"]["per_class"].items()} == {"0": 10, "1": 10}
    wrong = sum(one["images"] for one in figures["test"]["confusions"])
    assert wrong == round(20 * (1 - figures["test"]["top1"]))
    classifier, images = load_classifier(folder), torch.stack(test.images)
    likely = classifier.predict_proba(images)
    assert likely.shape == (20, 2) and likely.dtype == np.float32 and np.allclose(likely.sum(1), 1)
    assert (classifier.predict(images) == test.labels.numpy().astype(str)).mean() == expected["top1"]
    assert classifier.figures["test"] == json.loads(json.dumps(figures["test"]))
    assert classifier.temperature == figures["calibration"]["temperature"] != 1
    assert not classifier.training and classifier.predict_proba(images[:0]).shape == (0, 2)
    with torch.no_grad():
        logits = classifier(classifier.encoder.preprocess(images))
    assert np.allclose(logits.softmax(1), likely, atol=1e-6)


def test_encoder_of_a_classifier_loads_alone_and_as_init(trained):
    run_dir, folder, _ = trained
    images = torch.stack(bars(5).images)
    assert np.array_equal(inbatch.load(folder).embed(images), inbatch.load(run_dir).embed(images))
    copy = create_encoder("tiny", size=20, channels=1, init=folder, mean=[0.5], std=[0.25])
    assert torch.equal(next(copy.parameters()), next(inbatch.load(run_dir).parameters()))


def test_predictions_of_every_kind_of_file_agree(trained, tmp_path):
    _, folder, _ = trained
    data = bars_file(tmp_path / "other.npz")
    report = inbatch.predict(folder, data, tmp_path / "a.csv", top=2)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    columns = ["path", "split", "class", "probability", "margin", "class_2", "probability_2", "true_class"]
    assert list(rows[0]) == columns and len(rows) == report["images"] == 60
    assert report["trained_on"] == ["train"]
    assert report["splits"] == {"train": 40, "test": 20} and sum(report["predicted"].values()) == 60
    right = sum(row["class"] == row["true_class"] for row in rows)
    assert report["figures"]["top1"] == pytest.approx(right / 60) and report["unknown_classes"] == {}
    first = rows[0]
    assert float(first["margin"]) == pytest.approx(
        float(first["probability"]) - float(first["probability_2"]), abs=2e-6
    )
    inbatch.predict(folder, data, tmp_path / "a.jsonl", top=2)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: str(v) for k, v in line.items()} for line in lines] == rows
    pq = pytest.importorskip("pyarrow.parquet")
    inbatch.predict(folder, data, tmp_path / "a.parquet", top=2)
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == lines


def test_unreadable_images_are_listed_and_other_classes_left_out(trained, tmp_path):
    _, folder, _ = trained
    photos, draw = tmp_path / "photos", np.random.default_rng(0)
    for name in ("0/a", "0/b", "1/c", "cat/d"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 20), np.uint8)).save(photos / f"{name}.png")
    (photos / "0/b.png").write_bytes(b"\x89PNG broken")
    report = one_object(run(f"predict {folder} {photos} -o {tmp_path}/p.csv --json --top-k 9").stdout)
    assert report["trained_on"] == []
    assert report["images"] == 3 and len(report["unreadable"]) == 1 and "b.png" in report["unreadable"][0]
    assert report["figures"]["images"] == 2 and report["unknown_classes"] == {"cat": 1}
    text = run(f"predict {folder} {photos} -o {tmp_path}/p.csv")
    assert text.exit_code == 0 and "3 images classified" in text.stdout and "cat" in text.stdout
    assert "1 image cannot be read" in text.stderr
    (photos / "0/a.png").write_bytes(b"")
    for name in ("1/c", "cat/d"):
        (photos / f"{name}.png").unlink()
    assert run(f"predict {folder} {photos} -o {tmp_path}/none.csv").exit_code == 3
    assert not (tmp_path / "none.csv").exists()


def test_the_strength_of_the_probe_is_chosen_on_held_out_training_images(trained, tmp_path):
    run_dir, _, _ = trained
    few = inbatch.train_classifier(run_dir, out=tmp_path / "few", label_fraction=0.01)  # one image of each class
    assert few["train"]["images"] == 2 and few["train"]["c"] == 1
    noise = torch.randint(0, 256, (60, 1, 20, 20), dtype=torch.uint8).numpy()
    figures = inbatch.train_classifier(run_dir, (noise, np.arange(60) % 2), out=tmp_path / "noise")
    assert figures["train"]["c"] == 0.001 and figures["train"]["images"] == 54


def test_fine_tuning_and_few_labels(trained, tmp_path):
    run_dir, _, _ = trained
    short = Finetune(epochs=1, batch=8, steps=0)
    options = {"mode": "finetune", "tuning": short, "label_fraction": 0.5}
    figures = inbatch.train_classifier(run_dir, out=tmp_path / "tuned", **options)
    assert figures["train"]["images"] == 20 and figures["mode"] == "finetune"
    tuned = load_classifier(tmp_path / "tuned")
    test = bars(20, seed=1)
    hits = (tuned.predict(torch.stack(test.images)) == test.labels.numpy().astype(str)).mean()
    assert hits == figures["test"]["top1"]
    assert not torch.equal(next(tuned.encoder.parameters()), next(inbatch.load(run_dir).parameters()))


def test_the_command_line(trained, tmp_path):
    run_dir, _, _ = trained
    inbatch.export_run(run_dir, tmp_path / "encoder")
    data = bars_file(tmp_path / "more.npz")
    text = run(f"train-classifier {tmp_path}/encoder {data} -o {tmp_path}/new --label-fraction 0.2 --seed 3")
    assert text.exit_code == 0 and "Calibrated: temperature" in text.stdout and "8 images" in text.stdout
    figures = one_object(run(f"train-classifier {run_dir} {data} -o {tmp_path}/new --json").stdout)
    assert figures["classifier"] == f"{tmp_path}/new" and figures["train"]["images"] == 40
    (tmp_path / "new" / "features").mkdir()
    (tmp_path / "new" / "features" / f"{'0' * 24}.npz").write_text("")  # kept by another command
    check_replaceable(tmp_path / "new")
    for line, code, word in (
        (f"train-classifier {run_dir} -o {run_dir}", 2, "holds no classifier"),
        (f"train-classifier {run_dir} -o {data}", 2, "is no folder"),
        (f"train-classifier {run_dir} -o {tmp_path}/x --mode knn", 2, "probe or finetune"),
        (f"train-classifier {run_dir} -o {tmp_path}/x --probe knn", 2, "choose one of auto, lbfgs"),
        (f"train-classifier {run_dir} -o {tmp_path}/x --tuning small", 2, "--mode finetune"),
        (f"train-classifier {run_dir} -o {tmp_path}/x --mode finetune --probe lbfgs", 2, "--mode probe"),
        (f"train-classifier {run_dir} -o {tmp_path}/x --label-fraction 0", 2, "share"),
        (f"train-classifier {tmp_path}/encoder -o {tmp_path}/x", 2, "pass labelled images"),
        (f"predict {run_dir} {data} -o {tmp_path}/x.csv", 2, "not the folder of a classifier"),
        (f"predict {tmp_path}/encoder {data} -o {tmp_path}/x.csv", 2, "without a classifier"),
        (f"predict {tmp_path}/new {data} -o {tmp_path}/x.txt", 2, "ends in .csv"),
        (f"predict {tmp_path}/new {tmp_path}/nothing -o {tmp_path}/x.csv", 3, "does not exist"),
    ):
        result = run(line)
        assert (result.exit_code, word in result.stderr) == (code, True), (line, result.stderr)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.csv").exists()


def test_images_that_cannot_train_a_classifier(trained, tmp_path):
    run_dir, folder, _ = trained
    grey = torch.stack(bars(20).images).numpy()
    for labels, error, words in (
        (None, DataError, "no labels"),
        (np.zeros(20, int), DataError, "one class only"),
        (np.zeros((20, 2), int), DataError, "labels"),
    ):
        data = grey if labels is None else (grey, labels)
        with pytest.raises(error, match=words):
            inbatch.train_classifier(run_dir, data, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InbatchError):
        inbatch.train_classifier(run_dir, out=tmp_path / "file" / "below")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(weights)
    (tmp_path / "damaged" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(DataError, match="damaged"):
        load_classifier(tmp_path / "damaged")
    with pytest.raises(ConfigError, match="not the folder"):
        load_classifier(tmp_path / "absent")


def test_identical_images_give_a_classifier_at_chance(trained, tmp_path):
    run_dir, _, _ = trained
    same = np.full((40, 1, 20, 20), 7, np.uint8)
    figures = inbatch.train_classifier(run_dir, (same, np.arange(40) % 2), out=tmp_path / "same")
    assert figures["calibration"]["after"] is None and figures["calibration"]["temperature"] == 1
    assert load_classifier(tmp_path / "same").predict_proba(same[:1]).tolist()[0] == pytest.approx([0.5, 0.5], abs=0.06)


@pytest.mark.slow
def test_timm_loads_a_classifier_of_one_of_its_architectures(tmp_path):
    timm = pytest.importorskip("timm")
    for name, options in (("resnet18", {"stem": "imagenet"}), ("vit_tiny_patch16_224", {}), ("convnext_atto", {})):
        encoder = create_encoder(name, size=64, channels=3, **options).eval()
        head = torch.nn.Linear(encoder.width, 3)
        classifier = Classifier(encoder, head, ["a", "b", "c"])
        save_classifier(classifier, tmp_path / name)
        images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        model = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        prepared = encoder.preprocess(images)
        with torch.no_grad():
            expected = classifier.eval()(prepared)
            assert torch.allclose(model(prepared), expected, atol=1e-5), name
            assert torch.equal(load_classifier(tmp_path / name)(prepared), expected), name
        assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_a_whitened_encoder_and_one_with_attention_survive_the_folder(tmp_path):
    images = torch.stack(bars(6).images)
    for options in ({"whiten": True}, {"attend": "se"}):
        encoder = create_encoder("tiny", size=20, channels=1, **options).eval()
        if encoder.readout is not None:
            encoder.readout.fit(torch.randn(50, encoder.readout.width))
        encoder.levels = (0.0, 9.0)
        classifier = Classifier(encoder, torch.nn.Linear(encoder.feature_width, 2), ["a", "b"], temperature=2.0).eval()
        save_classifier(classifier, tmp_path / "made")
        assert {file.name for file in (tmp_path / "made").iterdir()} == {"model.safetensors", "config.json"}
        again = load_classifier(tmp_path / "made")
        assert np.array_equal(again.predict_proba(images), classifier.predict_proba(images)) and again.temperature == 2
        assert again.levels == (0.0, 9.0)
        assert np.array_equal(inbatch.load(tmp_path / "made").embed(images), encoder.embed(images))
    with pytest.raises(ConfigError, match="does not fit"):
        Classifier(encoder, torch.nn.Linear(3, 2), ["a", "b"])
