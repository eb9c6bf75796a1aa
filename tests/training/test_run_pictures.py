import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from inbatch.data import open_data
from inbatch.errors import DataError
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.neighbour_grid import RIGHT, UNKNOWN, WRONG, save_neighbour_grid


def pixels(png, colour):
    """Count the pixels of a picture with exactly that colour: hundreds in a frame, some by chance in grey text."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    count = int((np.asarray(Image.open(png).convert("RGB")) == wanted).all(-1).sum())
    return count if count > 100 else 0


@pytest.fixture
def source():
    """Return 30 images of 3 classes; some unlabelled, one class with a name that is not a valid formula."""
    labels = torch.arange(30) % 3
    labels[:6] = -1
    images = torch.randint(0, 100, (30, 3, 12, 10), dtype=torch.uint8)
    source = open_data((images, labels))
    source.classes = ("cat", "a $\\bad name that is much too long to be shown", "dog")
    return source


def test_neighbours_are_those_of_scikit_learn(source, tmp_path, monkeypatch):
    vectors = torch.randn(30, 5)
    drawn, real = [], source.image
    monkeypatch.setattr(source, "image", lambda i: drawn.append(i) or real(i))
    save_neighbour_grid(source, vectors, tmp_path / "n.png", queries=4, neighbours=3)
    rows = np.array(drawn).reshape(4, 4)
    expected = NearestNeighbors(n_neighbors=4, metric="cosine").fit(vectors).kneighbors(vectors[rows[:, 0]])[1]
    np.testing.assert_array_equal(rows, expected)
    assert source.labels[rows[:, 0]].tolist() == [-1, 0, 1, 2]


def test_frames_say_right_and_wrong(source, tmp_path):
    png = tmp_path / "n.png"
    source.labels[:6] = torch.arange(6) % 3
    one_hot = torch.eye(4)[source.labels] + 0.01 * torch.randn(30, 4)
    save_neighbour_grid(source, one_hot, png, queries=3, neighbours=5)
    right = pixels(png, RIGHT)
    assert right > 0 and pixels(png, WRONG) == pixels(png, UNKNOWN) == 0

    save_neighbour_grid(source, torch.randn(30, 4), png, queries=3, neighbours=5)
    assert 0 < pixels(png, RIGHT) < right and pixels(png, WRONG) > 0

    source.labels[:] = -1
    save_neighbour_grid(source, one_hot, png, queries=3, neighbours=5)
    assert pixels(png, RIGHT) == pixels(png, WRONG) == 0 and pixels(png, UNKNOWN) > 0


def test_vectors_that_do_not_fit(source, tmp_path):
    with pytest.raises(DataError, match="29 vectors do not belong to the 30 images"):
        save_neighbour_grid(source, torch.randn(29, 4), tmp_path / "n.png")
    with pytest.raises(DataError, match="too few for 30 neighbours"):
        save_neighbour_grid(source, torch.randn(30, 4), tmp_path / "n.png", neighbours=30)


def test_curves_show_what_was_logged(tmp_path):
    log, png = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    records = [{"step": i, "epoch": 0, "loss": 1 / i if i != 5 else None, "lr": 0.1} for i in range(1, 10)]
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    plot_curves(log, png)
    two = Image.open(png).size
    log.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 9, "knn": 0.5}]))
    plot_curves(log, png)
    assert Image.open(png).size == (two[0], two[1] * 3 // 2), "a panel more"


def test_curves_of_nothing(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "epoch": 0}\n')
    with pytest.raises(DataError, match="nothing has been logged yet"):
        plot_curves(log, tmp_path / "curves.png")
