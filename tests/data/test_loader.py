"""Batches do not depend on the number of workers, the rank's share, or the step at which an epoch starts."""

import multiprocessing
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch import rng
from inbatch.data import Loader, decode_all, open_data
from inbatch.errors import ConfigError, DataError


@dataclass
class Corners:
    """Stand-in for `views.Views`: crops at places that depend on (seed, epoch, index, view) only."""

    views: tuple[SimpleNamespace, ...] = (
        SimpleNamespace(size=8, interpolation="bilinear"),
        SimpleNamespace(size=5, interpolation="bicubic"),
    )

    def boxes(self, index, size, seed, epoch, attempt=0):
        def one(view):
            u = rng.uniform(seed, epoch, index, view, 2, attempt)
            return torch.cat([(u * (size - 6)).long(), torch.full((len(index), 2), 6)], 1)

        return torch.stack([one(v) for v in range(len(self.views))])


VIEWS = Corners()


def numbered(n=40, side=16):
    """Return images where image i is a ramp that starts at i; its label is i modulo 5."""
    images = (torch.arange(n)[:, None] * 3 + torch.arange(side * side)[None] % 50).byte().view(n, 1, side, side)
    return open_data((images, torch.arange(n) % 5))


@pytest.fixture
def photos(tmp_path):
    """Write 30 images of several sizes, grey enough that bicubic weights never clip."""
    random = np.random.default_rng(0)
    for i in range(30):
        pixels = random.integers(80, 176, (24 + i % 2 * 30, 20 + i % 3 * 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def same(a, b):
    assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label) and a.epoch == b.epoch
    assert torch.equal(a.size, b.size)
    if a.images is not None:
        assert torch.equal(a.pictures(), b.pictures())
        return
    assert torch.equal(a.boxes, b.boxes)
    assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_is_the_permutation_without_its_tail(resident):
    loader = Loader(numbered(), batch=12, views=VIEWS, seed=3, resident=resident, workers=0)
    assert loader.steps == 3
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        index = torch.cat([b.index for b in batches])
        assert index.tolist() == rng.permutation(3, epoch, 40)[:36].tolist()
        assert len(set(index.tolist())) == 36
        assert all(torch.equal(b.label, b.index % 5) and b.seed == 3 and b.epoch == epoch for b in batches)
    assert not torch.equal(index, torch.cat([b.index for b in loader.epoch(0)]))


@pytest.mark.parametrize("resident", [True, False])
def test_an_epoch_begun_late_is_the_rest_of_it(resident):
    loader = Loader(numbered(), batch=8, views=VIEWS, seed=0, resident=resident, workers=0)
    whole = list(loader.epoch(4))
    for start in (0, 2, 5):
        rest = list(loader.epoch(4, start))
        assert len(rest) == 5 - start
        for a, b in zip(rest, whole[start:], strict=True):
            same(a, b)


@pytest.mark.parametrize("resident", [True, False])
def test_shares_of_two_ranks_make_the_batches_of_one(resident):
    settings = {"batch": 8, "views": VIEWS, "seed": 0, "resident": resident, "workers": 0}
    one = Loader(numbered(), **settings)
    two = [Loader(numbered(), **settings, rank=r, world=2) for r in (0, 1)]
    assert two[0].steps == one.steps == 5
    for whole, left, right in zip(one.epoch(1), two[0].epoch(1), two[1].epoch(1), strict=True):
        assert torch.equal(torch.cat([left.index, right.index]), whole.index)
        if resident:
            assert torch.equal(torch.cat([left.pictures(), right.pictures()]), whole.pictures())
            continue
        assert torch.equal(torch.cat([left.boxes, right.boxes], 1), whole.boxes)
        for x, y, z in zip(left.crops, right.crops, whole.crops, strict=True):
            assert torch.equal(torch.cat([x, y]), z)


def test_a_daemon_has_no_workers(photos, monkeypatch):
    """Python lets a worker of multiprocessing.Pool start no processes."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert Loader(open_data(photos), batch=7, views=VIEWS, seed=5, resident=False).workers == 0
    with pytest.raises(ConfigError, match="pass workers=0"):
        Loader(open_data(photos), batch=7, views=VIEWS, seed=5, resident=False, workers=2)


def test_a_number_of_workers_is_a_whole_number_from_0(photos):
    for workers, words in ((-1, "at least 0, not -1"), ("two", "a whole number, not 'two'")):
        with pytest.raises(ConfigError, match=f"workers must be {words}"):
            Loader(open_data(photos), batch=8, views=VIEWS, seed=0, resident=False, workers=workers)


def test_any_number_of_workers_gives_the_same_batches(photos):
    loaders = [Loader(open_data(photos), batch=7, views=VIEWS, seed=5, resident=False, workers=w) for w in (0, 1, 2)]
    for epoch in (0, 1):  # the workers persist between epochs
        runs = [list(loader.epoch(epoch)) for loader in loaders]
        assert [len(run) for run in runs] == [4, 4, 4]
        for batches in zip(*runs, strict=True):
            same(batches[0], batches[1])
            same(batches[0], batches[2])
    next(loaders[2].epoch(2))  # closed after one batch, as when a run ends early
    for a, b in zip(loaders[0].epoch(3, 1), loaders[2].epoch(3, 1), strict=True):
        same(a, b)


@pytest.mark.grid(1)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_large_batches_are_assembled_from_pieces(photos, whole, workers, monkeypatch):
    """Crops, and canvases of different sizes per piece: the result equals the batch made in one piece."""
    settings = {"batch": 12, "views": VIEWS, "seed": 4, "resident": False, "workers": workers, "whole": whole}
    source = open_data(photos)
    expected = list(Loader(source, **settings).epoch(2))
    monkeypatch.setattr("inbatch.data.loader.PIECE", 5)
    batches = list(Loader(source, **settings).epoch(2))
    assert len(batches) == len(expected) == 2
    for a, b in zip(batches, expected, strict=True):
        same(a, b)


def test_workers_that_are_not_forked(photos, monkeypatch):
    """On a GPU, workers come from a fork server, so their arguments must pickle."""
    monkeypatch.setattr("sys.platform", "darwin")
    away = Loader(open_data(photos), batch=7, views=VIEWS, seed=5, resident=False, workers=1)
    monkeypatch.undo()
    here = Loader(open_data(photos), batch=7, views=VIEWS, seed=5, resident=False, workers=0)
    for a, b in zip(here.epoch(0), away.epoch(0), strict=True):
        same(a, b)


def test_crops_are_cut_where_the_boxes_say(photos):
    source = open_data(photos)
    loader = Loader(source, batch=10, views=VIEWS, seed=1, resident=False, workers=0)
    batch = next(loader.epoch(2))
    assert [c.shape for c in batch.crops] == [(10, 3, 8, 8), (10, 3, 5, 5)] and batch.images is None
    assert torch.equal(batch.boxes, VIEWS.boxes(batch.index, batch.size, 1, 2))
    for b, i in enumerate(batch.index.tolist()):
        whole = source.image(i)
        assert batch.size[b].tolist() == list(whole.shape[1:])
        for view, (side, how) in enumerate([(8, "bilinear"), (5, "bicubic")]):
            top, left, h, w = batch.boxes[view, b].tolist()
            cut = whole[None, :, top : top + h, left : left + w].float()
            expected = torch.nn.functional.interpolate(cut, (side, side), mode=how, antialias=True)[0]
            assert (batch.crops[view][b] - expected.round()).abs().max() <= 1


def test_streamed_arrays_of_any_depth():
    images = torch.randint(256, (6, 5, 16, 16), dtype=torch.uint8)
    batch = next(Loader(open_data(images), batch=6, views=VIEWS, seed=0, resident=False, workers=0).epoch(0))
    top, left = batch.boxes[0, 2, :2].tolist()
    cut = images[batch.index[2], :, top : top + 6, left : left + 6].float()
    expected = torch.nn.functional.interpolate(cut[None], (8, 8), mode="bilinear", antialias=True)[0]
    assert torch.equal(batch.crops[0][2], expected.round().byte())


class TestResident:
    def test_sizes_that_differ_are_padded(self, photos):
        source = open_data(photos)
        held = decode_all(source)
        assert held.images.shape == (30, 3, 54, 40) and held.scaled == 0
        for i in range(30):
            h, w = held.size[i].tolist()
            assert torch.equal(held.images[i, :, :h, :w], source.image(i))
            assert held.images[i, :, h:].sum() == 0 and held.images[i, :, :, w:].sum() == 0

    def test_large_images_are_scaled_down_and_reported(self, photos):
        loader = Loader(open_data(photos), batch=10, views=VIEWS, seed=0, resident=True)
        assert loader.held.images.shape[2:] == (16, 16)  # twice the largest view
        assert loader.held.size[0].tolist() == [16, 13]  # from 24x20
        assert "30 images scaled down to a longer side of 16 pixels" in loader.report()
        kept = Loader(open_data(photos), batch=10, views=VIEWS, seed=0, resident=True, canvas=60)
        assert kept.held.scaled == 0 and "scaled down" not in kept.report()
        batch = next(kept.epoch(0))
        assert torch.equal(batch.pictures(), kept.held.images[batch.index])
        assert torch.equal(batch.size, kept.held.size[batch.index]) and batch.crops is None

    def test_the_cache_changes_no_batch_and_is_named(self, photos, tmp_path, monkeypatch):
        settings = {"batch": 10, "views": VIEWS, "seed": 0, "resident": True}
        plain = Loader(open_data(photos), **settings)
        monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("inbatch.data.decoded_cache.WORTH", 0)
        for phrase in ("cached in ", "from the cache, "):
            loader = Loader(open_data(photos), **settings)
            assert f"\n{phrase}{tmp_path / 'cache'}" in loader.report() and "the cache" not in plain.report()
            assert "30 images scaled down" in loader.report()
            for a, b in zip(loader.epoch(1), plain.epoch(1), strict=True):
                same(a, b)

    def test_images_larger_than_any_that_was_probed(self, photos, monkeypatch):
        expected = decode_all(open_data(photos))
        monkeypatch.setattr("inbatch.data.resident._CHUNK", 4)
        monkeypatch.setattr("inbatch.data.resident._largest", lambda *_: (30, 999))  # below the maximum
        held = decode_all(open_data(photos))
        assert torch.equal(held.images, expected.images) and torch.equal(held.size, expected.size)

    def test_any_number_of_threads_gives_the_same_pixels(self, photos, monkeypatch):
        monkeypatch.setattr("inbatch.data.resident._CHUNK", 4)
        held = [decode_all(open_data(photos), threads=n) for n in (1, 3)]
        monkeypatch.undo()
        held.append(decode_all(open_data(photos)))
        assert all(torch.equal(one.images, held[0].images) and torch.equal(one.size, held[0].size) for one in held)
        assert held[0].images.is_contiguous()

    def test_resident_is_chosen_by_free_memory_unless_set(self, monkeypatch):
        def held(free, **settings):
            monkeypatch.setattr("inbatch.data.loader.free_bytes", lambda device, world: free)
            loader = Loader(numbered(), batch=8, views=VIEWS, seed=0, workers=0, **settings)
            return loader.held is not None, loader.report()

        needed = 40 * 16 * 16
        assert held(4 * needed)[0] and "resident: 40 images of 1x16x16 on cpu" in held(4 * needed)[1]
        assert not held(4 * needed - 4)[0] and "streamed by 0 workers" in held(4 * needed - 4)[1]
        assert held(1, resident=True)[0] and "cache_on_device = true" in held(1, resident=True)[1]
        assert not held(10**9, resident=False)[0]
        reported: list[int] = []
        monkeypatch.setattr("inbatch.data.loader.distributed.all_reduce_max", lambda x: reported.append(x) or 1)
        assert not held(10**9, world=2)[0] and reported == [0], "another rank has too little memory"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("resident", [True, False])
    def test_gpu_gives_the_same_batches_as_the_cpu(self, photos, resident):
        settings = {"batch": 7, "views": VIEWS, "seed": 5, "resident": resident, "workers": 1}
        here = Loader(open_data(photos), **settings)
        there = Loader(open_data(photos), **settings, device="cuda")
        for a, b in zip(here.epoch(0), there.epoch(0), strict=True):
            assert b.index.is_cuda and b.label.is_cuda
            same(a, b.to("cpu"))


class TestFaults:
    def break_one(self, folder, name="07.png"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    def test_too_few_images(self):
        with pytest.raises(DataError, match="array has 1 image: the images of a batch learn from each other"):
            Loader(numbered(1), batch=2, views=VIEWS, seed=0)
        for n, batch in ((30, 32), (40, 41)):
            with pytest.raises(DataError, match=f"array has {n} images, fewer than one batch of {batch}") as error:
                Loader(numbered(n), batch=batch, views=VIEWS, seed=0)
            assert error.value.exit_code == 3
        assert Loader(numbered(1), batch=1, views=VIEWS, seed=0).steps == 1

    def test_a_batch_that_cannot_be_shared(self):
        for batch, world in ((9, 2), (0, 1)):
            with pytest.raises(DataError, match="cannot be shared"):
                Loader(numbered(), batch=batch, views=VIEWS, seed=0, world=world)

    def test_unreadable_images_are_left_out_and_named(self, photos):
        self.break_one(photos)
        source = open_data(photos)
        loader = Loader(source, batch=29, views=VIEWS, seed=0, resident=True, max_bad=0.04, canvas=60)
        names = [loader.source.identity(i) for i in range(len(loader.source))]
        assert names == [f"{i:02d}.png" for i in range(30) if i != 7]
        assert "left out: " in loader.report() and "07.png' cannot be read" in loader.report()
        batch = next(loader.epoch(0))  # the right pixels under the new indices
        for image, (h, w), i in zip(batch.pictures(), batch.size.tolist(), batch.index.tolist(), strict=True):
            assert torch.equal(image[:, :h, :w], loader.source.image(i))

    def test_too_many_unreadable_images(self, photos):
        self.break_one(photos)
        with pytest.raises(DataError, match=r"1 of 30 images .* cannot be read .*1%.*07\.png"):
            Loader(open_data(photos), batch=8, views=VIEWS, seed=0, resident=True)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_streamed_unreadable_image_stops_with_its_name(self, photos, workers):
        self.break_one(photos)
        loader = Loader(open_data(photos), batch=10, views=VIEWS, seed=0, resident=False, workers=workers)
        with pytest.raises(
            DataError, match=r"07\.png' cannot be .*\. --set max_unreadable=0\.034 or more allows them$"
        ):
            list(loader.epoch(0))


def test_identical_images_are_refused() -> None:
    same = torch.full((8, 3, 6, 6), 7, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"all 8 images of .* are identical"):
        Loader(open_data(same), batch=4, views=VIEWS, seed=0, resident=True)
