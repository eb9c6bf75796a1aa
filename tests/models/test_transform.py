"""The preparation of single images, for data sets and loaders of PyTorch."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from inbatch.errors import DataError
from inbatch.models import create_encoder


def photos(folder: Path, channels: int = 3) -> Path:
    draw = np.random.default_rng(0)
    for i, size in enumerate(((20, 20), (31, 47), (90, 25), (13, 16))):
        (folder / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        shape = size if channels == 1 else (*size, channels)
        Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(folder / f"class_{i % 2}" / f"{i}.png")
    return folder


def test_every_kind_of_image_has_the_values_of_preprocess(tmp_path):
    for channels, size in ((3, 20), (1, 20), (3, 130), (4, 20)):
        net = create_encoder("tiny", size=size, channels=channels)
        transform = pickle.loads(pickle.dumps(net.transform))
        for file in sorted(photos(tmp_path / f"{channels}-{size}", channels).rglob("*.png")):
            image = Image.open(file)
            array = np.asarray(image)
            tensor = torch.from_numpy(array.copy()).view(*array.shape[:2], -1).permute(2, 0, 1)
            expected = net.preprocess([image])
            for one in (image, array, tensor):
                assert torch.equal(transform(one)[None], expected)
                assert torch.equal(net.preprocess([one]), expected)
            assert expected.shape == (1, channels, size, size)
    net = create_encoder("tiny", size=20)
    net.levels = (0.0, 1.0)
    grey = np.random.default_rng(0).random((25, 22, 3), np.float32)
    assert torch.equal(net.transform(grey)[None], net.preprocess([grey]))
    assert torch.equal(net.transform(Image.new("L", (9, 9), 3))[None], net.preprocess([Image.new("L", (9, 9), 3)]))


def test_values_that_are_not_images_are_refused():
    transform = create_encoder("tiny", size=20).transform
    for value, words in (
        ("a.png", "not str"),
        (torch.zeros(1, 5, 5, dtype=torch.uint8), "3 channels"),
        (torch.zeros(5, 5), r"shape \(5, 5\), not \(C, h, w\)"),
        (torch.zeros(1, 3, 5, 5, dtype=torch.uint8), r"shape \(1, 3, 5, 5\), not \(C, h, w\)"),
        (np.zeros(()), r"shape \(\), not \(h, w"),
    ):
        with pytest.raises(DataError, match=words):
            transform(value)


def test_an_image_folder_gives_batches_of_features(tmp_path):
    net = create_encoder("tiny", size=20).eval()
    data = ImageFolder(str(photos(tmp_path)), transform=net.transform)
    images, labels = next(iter(DataLoader(data, batch_size=4)))
    assert labels.tolist() == [0, 0, 1, 1]
    expected = net.preprocess([Image.open(file) for file, _ in data.samples])
    assert torch.equal(images, expected)


@pytest.mark.slow
def test_workers_that_are_spawned_receive_it(tmp_path):
    net = create_encoder("tiny", size=20)
    data = ImageFolder(str(photos(tmp_path)), transform=net.transform)
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack([data[i][0] for i in range(4)]))
