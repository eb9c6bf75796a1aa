"""Evaluation of a run on images of other data sets: other classes, sizes and channels."""

import json
import shutil

import numpy as np
import pytest
import torch
from bars_data import bars_file, command
from feature_sets import pictures
from PIL import Image
from small_runs import leave_out_evaluation

import inbatch
from inbatch.errors import DataError
from inbatch.evaluation import Finetune


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train on colour images of 20 pixels with two classes, with a test set and a list of its classes."""
    folder = tmp_path_factory.mktemp("runs")
    for split in ("train", "test"):
        for kind in ("lie", "other", "stand"):
            (folder / "own" / split / kind).mkdir(parents=True)
            for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)):
                Image.fromarray(image).save(folder / "own" / split / kind / f"{i}.png")
    (folder / "classes.txt").write_text("stand\nlie\n")
    settings = {"test": str(folder / "own"), "classes": str(folder / "classes.txt"), "image_size": 20, "channels": 3}
    settings |= {"encoder": "tiny", "views": "simclr_cifar", "batch_size": 8, "epochs": 1, "quiet": True}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        inbatch.pretrain(str(folder / "own"), "simclr", out=folder / "run", **settings)
    return folder / "run"


@pytest.mark.slow
def test_evaluation_on_the_data_of_the_run_is_unchanged(run):
    own = inbatch.evaluate_run(run, protocols=["knn"])
    moved = inbatch.evaluate_run(run, run.parent / "own", protocols=["knn"])
    assert own["knn"]["classes"] == 2 and own["train"]["images"] == 16
    assert moved["knn"] == own["knn"] and moved["train"] == own["train"]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_on_other_classes_sizes_and_grey_images(run, channels):
    other = pictures(60, sizes=((33, 41),), channels=channels)
    data = torch.stack(other.images), other.labels + 2
    protocols = ["knn", "linear", "few", "finetune"]
    evaluation = inbatch.evaluate_run(run, data, protocols=protocols, draws=1, tuning=Finetune(epochs=1, steps=0))
    assert (evaluation["train"]["images"], evaluation["test"]["images"]) == (54, 6)
    assert "tenth" in evaluation["held_out"]
    classes = evaluation["knn"]["classes"], evaluation["finetune"]["classes"]
    assert classes == (3, 3), "labels that no image has are no classes"
    if channels == 1:
        colour = data[0].expand(-1, 3, -1, -1).contiguous(), data[1]
        assert inbatch.evaluate_run(run, colour, protocols=["knn"])["knn"] == evaluation["knn"]


def test_evaluation_on_its_test_split_and_on_other_test_data(run, tmp_path):
    file = bars_file(tmp_path / "bars.npz", size=28)
    evaluation = inbatch.evaluate_run(run, file, protocols=["knn"])
    assert evaluation["held_out"].startswith("test split") and evaluation["test"]["images"] == 20


def test_test_images_of_some_of_the_classes(run, tmp_path):
    """Test data may lack classes; they are matched by name, and a list of classes leaves out others."""
    shutil.copytree(run.parent / "own" / "test" / "lie", tmp_path / "test" / "lie")
    shutil.copytree(run.parent / "own" / "test" / "other", tmp_path / "test" / "other")
    line = f"evaluate {run} --test {tmp_path / 'test'} --protocol knn -o {tmp_path / 'e'}"
    result = command(line)  # the run's list of classes: stand, lie
    written = json.loads((tmp_path / "e").read_text())
    assert result.exit_code == 0 and written["knn"]["classes"] == 2 and written["test"]["per_class"] == {"lie": 8}
    share = f"{written['knn']['top1']:.1%}"
    assert written["knn"]["per_class"] == {"lie": written["knn"]["top1"]}
    assert any(row.split() == ["lie", "8", share] for row in result.stdout.splitlines())
    assert f"Balanced:   k-NN {share} (mean over the classes: 1)" in result.stdout
    assert command(f"{line} --temperature nan").exit_code == 2
    (tmp_path / "test" / "lie").rename(tmp_path / "test" / "sit")
    refused = command(line)
    assert refused.exit_code == 3 and "no image of the 2 classes" in refused.stderr


def test_channels_that_cannot_be_read_are_an_error(run):
    with pytest.raises(DataError, match="4 channels"):
        inbatch.evaluate_run(run, (torch.zeros(9, 4, 20, 20, dtype=torch.uint8), torch.arange(9) % 3))
