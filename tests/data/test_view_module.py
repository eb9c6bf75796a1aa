"""Views as a module: any images in, the views of a preset out, reproducible by key."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import inbatch
from inbatch.batch import Batch
from inbatch.data.views import View, Views, make_views
from inbatch.errors import ConfigError, DataError

IMAGES = torch.randint(256, (4, 3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_views_are_those_of_a_run_and_depend_on_the_key_alone() -> None:
    transform = inbatch.views("simclr_cifar", size=16, num_views=3)
    views = transform(IMAGES, key=5)
    crops = make_views("simclr_cifar", {"size": 16, "num_views": 3}, 3)
    plain = Views(crops, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = plain(Batch(torch.arange(4), torch.full((4,), -1), seed=5, images=IMAGES)).images
    assert len(transform) == len(views) == 3 and all(map(torch.equal, views, expected))
    assert all(map(torch.equal, pickle.loads(pickle.dumps(transform))(IMAGES, key=5), views)), "in data workers"
    assert not torch.equal(transform(IMAGES, key=6)[0], views[0])
    moved = transform(IMAGES[[2, 0]], key=5, index=torch.tensor([2, 0]))
    torch.testing.assert_close(moved[1], views[1][[2, 0]])
    torch.manual_seed(1)
    first, second = transform(IMAGES)[0], transform(IMAGES)[0]
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(transform(IMAGES)[0], first)


def test_images_of_every_kind() -> None:
    transform = inbatch.views([View(8, scale=None, flip=0.0)], mean=(0, 0, 0), std=(1, 1, 1))
    picture = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy())
    (one,) = transform(picture)
    assert one.shape == (3, 8, 8) and torch.equal(one, transform(IMAGES[0])[0]) and 0 <= one.min() <= one.max() <= 1
    grey = Image.fromarray(np.full((30, 10), 200, np.uint8))
    (several,) = transform([picture, grey, IMAGES[1]])
    torch.testing.assert_close(several[0], one)
    torch.testing.assert_close(several[1], torch.full((3, 8, 8), 200 / 255))
    assert inbatch.views("digits", size=8, channels=1)(grey)[0].shape == (1, 8, 8)


def test_numbers_may_be_arrays_or_lists() -> None:
    usual = inbatch.views("simclr_cifar", size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    array = inbatch.views("simclr_cifar", size=8, mean=np.full(3, 0.5), std=torch.full((3,), 0.25))  # type: ignore[arg-type]
    assert all(map(torch.equal, usual(IMAGES, key=1), array(IMAGES, key=1, index=[0, 1, 2, 3])))  # type: ignore[arg-type]


def test_mistakes_are_explained() -> None:
    for make, message in (
        (lambda: inbatch.views("simcrl"), "did you mean 'simclr'"),
        (lambda: inbatch.views("simclr", sise=3), "no option 'sise'; there are size"),
        (lambda: inbatch.views(channels=2, mean=(1.0,)), "a number per channel, 2"),
        (lambda: inbatch.views(mean=0.5), "a number per channel, not 0.5"),  # type: ignore[arg-type]
        (lambda: inbatch.views(mean=[math.nan] * 3), "a number per channel, 3"),
        (lambda: inbatch.views([3]), "View of each"),  # type: ignore[list-item]
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    transform = inbatch.views("simclr_cifar", size=8)
    for images, message in (
        (IMAGES.float(), "uint8 images of 3 channel"),
        (IMAGES[:, :1], "uint8 images of 3 channel"),
        ([], "an empty list"),
        ("a.jpg", "not str"),
        ([IMAGES[0].float()], "torch.float32"),
    ):
        with pytest.raises(DataError, match=message):
            transform(images)
    with pytest.raises(DataError, match="a whole number for each of 4 images"):
        transform(IMAGES, index=torch.arange(3))
