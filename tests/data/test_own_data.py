"""Images of Python objects: data sets of PyTorch, lists of images, iterables with a length; and own transforms."""

import contextlib
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from inbatch.batch import Batch
from inbatch.data import Loader, Source, open_data
from inbatch.data.views import TransformedViews
from inbatch.errors import ConfigError, DataError

PIXELS = [np.random.default_rng(i).integers(0, 255, (10 + i % 3, 12, 3), np.uint8) for i in range(12)]


class Items:
    """A map-style data set."""

    def __init__(self, make: Any, **attributes: Any) -> None:
        self.make, self.reads = make, 0
        self.__dict__ |= attributes

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return self.make(i)


def tensor(i: int) -> Tensor:
    return torch.from_numpy(PIXELS[i].transpose(2, 0, 1).copy())


FORMS: dict[str, Any] = {
    "arrays": list(PIXELS),
    "Pillow images": [Image.fromarray(x) for x in PIXELS],
    "tensors": [tensor(i) for i in range(12)],
    "labelled pairs": [(x, i % 2) for i, x in enumerate(PIXELS)],
    "images and labels": (list(PIXELS), [i % 2 for i in range(12)]),
    "images and an array of labels": (list(PIXELS), np.arange(12) % 2),
    "data set": Items(lambda i: Image.fromarray(PIXELS[i])),
    "data set with labels": Items(lambda i: (tensor(i), torch.tensor(i % 2), "more")),
    "data set with targets": Items(
        lambda i: (PIXELS[i], i % 2), targets=[i % 2 for i in range(12)], classes=["a", "b"]
    ),
    "dicts": Items(lambda i: {"image": PIXELS[i], "label": i % 2, "name": str(i)}),
    "iterable": dict.fromkeys(range(12)).keys(),
}


@pytest.mark.parametrize("form", FORMS)
def test_objects_give_their_images_and_labels(form: str) -> None:
    data = FORMS[form] if form != "iterable" else Once()
    source = open_data(data)
    assert len(source) == 12 and source.channels == 3
    assert all(torch.equal(source.image(i), tensor(i)) for i in range(12))
    labelled = "label" in form or form in ("dicts", "data set with targets")
    assert source.labels.tolist() == [i % 2 if labelled else -1 for i in range(12)]
    assert source.classes == (("a", "b") if "targets" in form else ("0", "1") if labelled else ())
    assert source.signature() == open_data(data).signature()
    if form == "data set with targets":
        assert FORMS[form].reads < 2 * 12 + 80  # labels are not read from the items
    if form == "dicts":
        assert not open_data(data, label_column="none").classes


def test_labels_are_those_of_the_items() -> None:
    """A column that is named, or a transform of the labels, comes before the attribute `targets`."""
    targets = [i % 2 for i in range(12)]
    names = {"targets": targets, "classes": ["a", "b"]}
    dicts = Items(lambda i: {"image": PIXELS[i], "label": i % 2, "kind": i % 3}, **names)
    for column in (None, "label"):
        assert open_data(dicts, label_column=column).labels.tolist() == targets
        assert open_data(dicts, label_column=column).classes == ("a", "b")
    other = open_data(dicts, label_column="kind")
    assert other.labels.tolist() == [i % 3 for i in range(12)] and other.classes == ("0", "1", "2")
    turned = open_data(Items(lambda i: (PIXELS[i], 1 - i % 2), target_transform=lambda label: 1 - label, **names))
    assert turned.labels.tolist() == [1 - i % 2 for i in range(12)] and turned.classes == ("0", "1")


def test_keys_of_items_need_not_be_texts() -> None:
    items = Items(lambda i: {0: PIXELS[i], 1: i % 2, 2: i % 3})
    source = open_data(items, label_column="1", group_column="2")
    assert torch.equal(source.image(3), tensor(3)) and source.labels.tolist() == [i % 2 for i in range(12)]
    assert source.groups is not None and source.groups.tolist() == [i % 3 for i in range(12)]


def failing(i: int) -> Any:
    if i == 4:
        raise OSError("the disk is gone")
    return (PIXELS[i], i % 2)


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (failing, [0, 1, 0, 1, -1, 1]),
        (lambda i: None if i == 4 else (PIXELS[i], i % 2), [0, 1, 0, 1, -1, 1]),
        (lambda i: {"x": 1} if i == 4 else {"image": PIXELS[i], "label": i % 2}, [0, 1, 0, 1, -1, 1]),
        (lambda i: () if i == 4 else (PIXELS[i],), [-1] * 6),
    ],
)
def test_an_item_of_another_form_is_an_unreadable_image(make: Any, labels: list[int]) -> None:
    source = open_data(Items(make))
    assert source.labels.tolist()[:6] == labels and torch.equal(source.image(5), tensor(5))
    with pytest.raises(DataError, match=r"item 4 of the Items (cannot be read|is [a-zA-Z]+ without .*, unlike item 0)"):
        source.image(4)
    half = open_data(Items(lambda i: {"image": PIXELS[i]} | ({} if i % 2 else {"label": i % 3})))
    assert half.labels.tolist()[:4] == [0, -1, 2, -1]


class Once:
    """An iterable with a length."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __iter__(self) -> Any:
        return iter(PIXELS)


def test_signature_depends_on_pixels_and_labels() -> None:
    other = [*PIXELS[:-1], 255 - PIXELS[-1]]
    signatures = {open_data(data).signature() for data in (PIXELS, other, (PIXELS, [0, 1] * 6), PIXELS[:-1])}
    assert len(signatures) == 4


def test_workers_read_the_same_batches() -> None:
    views = TransformedViews([torch.nn.Identity()], [8], (0.5,) * 3, (0.25,) * 3, "x")
    batches = []
    for workers, resident in ((0, False), (2, False), (0, True)):
        loader = Loader(open_data(PIXELS), batch=4, views=views, seed=1, workers=workers, resident=resident, whole=True)
        for batch in loader.epoch(0, stop=1):
            pixels = batch.pictures()
            assert pixels is not None and batch.size is not None
            batches.append((batch.index, [x[:, :h, :w] for x, (h, w) in zip(pixels, batch.size.tolist(), strict=True)]))
        loader.close()
    for index, images in batches[1:]:
        assert torch.equal(index, batches[0][0])
        assert all(torch.equal(a, b) for a, b in zip(images, batches[0][1], strict=True))


def broken(i: int) -> Any:
    if i == 5:
        raise OSError("the disk is gone")
    return PIXELS[i]


def test_invalid_items_are_data_errors() -> None:
    noise = np.random.default_rng(0)
    for data, message in (
        (Items(lambda i: noise.integers(0, 255, (8, 8, 3), np.uint8)), "another image each time that item 0 is read"),
        (Items(lambda i: tensor(i) / 255), "torch|float32 values: return uint8, 0 to 255 .leave out ToTensor"),
        (Items(lambda i: "a.jpg"), "it is str: return a Pillow image"),
        (Items(lambda i: (i, PIXELS[i])), "item 0 of the Items is (int, numpy.ndarray)"),
        (Items(lambda i: {"a": 1}), "a column of encoded images is needed"),
        (Items(lambda i: np.zeros((2, 3, 4, 5), np.uint8)), "its shape is (2, 3, 4, 5)"),
        (Items(lambda i: 1 / 0), "item 0 of the Items cannot be read: ZeroDivisionError"),
        ((list(PIXELS), [1, 2]), "one label each"),
        ([], "the list of images is empty; data can be"),
    ):
        with pytest.raises(DataError, match=re.escape(message) if "|" not in message else message):
            open_data(data)
    source = open_data(Items(broken))
    with pytest.raises(DataError, match="item 5 of the Items cannot be read: OSError: the disk is gone"):
        source.image(5)
    mixed = open_data([PIXELS[0], PIXELS[1][..., :1], PIXELS[2][..., :2]])
    assert torch.equal(mixed.image(1)[0], mixed.image(1)[2])
    with pytest.raises(DataError, match="item 2 of the list of images is not an image: it has 2 channels, 3 are read"):
        mixed.image(2)
    assert isinstance(open_data(PIXELS, channels=None), Source)
    assert open_data([Image.fromarray(x) for x in PIXELS], channels=1).channels == 1


@pytest.mark.parametrize("resident", [True, False])
def test_workers_draw_transformed_views_with_the_same_bits(resident: bool) -> None:
    """One worker draws a batch in pieces, two take turns; a transform that fails is the error of the run."""
    shift = v2.Compose([v2.RandomCrop(6), v2.Lambda(lambda x: x // 2 + np.uint8(np.random.randint(3)))])
    source = open_data([(np.arange(9 * 11 * 3).reshape(9, 11, 3) * (i + 1) % 251).astype(np.uint8) for i in range(12)])
    views = TransformedViews([shift, shift], [6, 6], (0.5,) * 3, (0.25,) * 3, "own")
    drawn, owners = {}, []
    for workers in (0, 1, 2):
        loader = Loader(source, batch=5, views=views, seed=3, resident=resident, workers=workers, whole=True,
                        drawer=views)  # fmt: skip
        with contextlib.closing(loader):
            batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
        drawn[workers] = [views(batch).images for batch in batches]
        owners.append(batches[0].crops is not None)
        again = views(replace(batches[0], attempt=torch.zeros(5, dtype=torch.long))).images  # drawn here
        assert all(torch.equal(x, y) for x, y in zip(again, drawn[workers][0], strict=True))
    assert owners == [not resident, True, True] and len(drawn[0]) == 4
    for workers in (1, 2):
        for own, other in zip(drawn[0], drawn[workers], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(own, other, strict=True))
    grows = TransformedViews([lambda x: x[:, : 3 + int(x.sum()) % 3, :4]], [4], (0.5,) * 3, (0.25,) * 3, "own")
    loader = Loader(source, batch=5, views=grows, seed=3, resident=resident, workers=1, whole=True, drawer=grows)
    with contextlib.closing(loader), pytest.raises(ConfigError, match="a transform must return one size"):
        list(loader.epoch(0))


def test_transformed_views_are_keyed_by_sample() -> None:
    """A view depends on neither batch nor other views, and the caller's random numbers are left as they are."""
    shift = v2.Compose([v2.RandomCrop(6), v2.Lambda(lambda x: x // 2 + np.uint8(np.random.randint(3)))])
    views = TransformedViews([shift, shift], [6, 6], (0.5,), (0.25,), "own")
    images = torch.randint(0, 255, (5, 1, 9, 9), dtype=torch.uint8)
    size = torch.full((5, 2), 9)
    batch = Batch(torch.arange(5), torch.zeros(5).long(), 3, 1, images=images, size=size)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = views(batch).images
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert first.shape == (5, 1, 6, 6) and not torch.equal(first, second)
    order = torch.tensor([3, 1])
    again = views(batch.take(order)).images
    assert torch.equal(again[0], first[order]) and torch.equal(again[1], second[order])
    held = Batch(torch.tensor([3, 1]), torch.zeros(2).long(), 3, 1, images=images, at=order, size=size[:2])
    assert torch.equal(views(held).images[0], first[order])
    later = Batch(torch.arange(5), torch.zeros(5).long(), 3, 2, images=images, size=size)
    assert not torch.equal(views(later).images[0], first)
    redrawn = Batch(torch.arange(5), torch.zeros(5).long(), 3, 1, images=images, size=size,
                    attempt=torch.tensor([0, 1, 0, 0, 0]))  # fmt: skip
    differs = (views(redrawn).images[0] != first).flatten(1).any(1)
    assert differs.tolist() == [False, True, False, False, False]
    assert first.min() >= (0 - 0.5) / 0.25 and first.max() <= (1 - 0.5) / 0.25
    grows = TransformedViews([lambda x: x[:, : 3 + int(x.sum()) % 3, :4]], [4], (0.5,), (0.25,), "own")
    with pytest.raises(ConfigError, match="a transform must return one size"):
        grows(batch)


def test_drawing_views_in_a_worker_does_not_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker would hold a CUDA context of its own, and a forked one cannot make it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("CUDA was started"))
    views = TransformedViews([torch.nn.Identity()], [8], (0.5,) * 3, (0.25,) * 3, "own")
    assert views.draw([0], [torch.zeros(3, 8, 8, dtype=torch.uint8)], seed=0, epoch=0)[0].shape == (1, 3, 8, 8)
