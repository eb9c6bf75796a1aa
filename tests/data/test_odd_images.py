"""Unusual images: each is read correctly or refused by name, on every path that reads images."""

import os
import sys

import numpy as np
import odd_images as zoo
import pytest
import torch
from odd_images import animals

from inbatch import api
from inbatch.data import Loader, decode_all, open_data
from inbatch.data.decoding.image_file import ImageFile
from inbatch.data.views import View, Views
from inbatch.errors import DataError

ALL = animals()
GOOD = [animal for animal in ALL if animal.pixels is not None]
BAD = [animal for animal in ALL if animal.pixels is None]
EACH = pytest.mark.parametrize("animal", ALL, ids=lambda animal: animal.name.replace(" ", "-"))
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of these")


def off(pixels: torch.Tensor, expected: np.ndarray) -> int:
    got = pixels.permute(1, 2, 0).numpy().astype(int)
    assert got.shape == expected.shape
    return int(np.abs(got - expected).max())


class TestOneByOne:
    @pytest.mark.grid(37)
    @EACH
    def test_read_right_or_refused_by_name(self, animal, tmp_path):
        """From memory, as in Parquet and tar files, and from a file."""
        zoo.fill(tmp_path, [animal])
        source = open_data(tmp_path)
        for read in (
            (ImageFile(animal.file, lambda: animal.name, 3).tensor, lambda: source.image(0))
            if animal.pixels is not None
            else ()
        ):
            assert off(read(), animal.pixels) <= animal.near
        if animal.pixels is None:
            with pytest.raises(DataError, match=animal.why) as caught:
                source.image(0)
            assert repr(os.path.join(str(tmp_path), animal.name)) in str(caught.value) and "\n" not in str(caught.value)
            with pytest.raises(DataError, match=animal.why), ImageFile(animal.file, lambda: animal.name, 3) as picture:
                picture.tensor()

    @pytest.mark.grid(20)
    @EACH
    def test_grey_and_crops(self, animal):
        if animal.pixels is None:
            with pytest.raises(DataError), ImageFile(animal.file, lambda: "it", 1) as picture:
                picture.crops(torch.tensor([[0, 0, *picture.size]]), [(8, "bicubic")])
            return
        height, width = animal.pixels.shape[:2]
        with ImageFile(animal.file, lambda: "it", 3) as picture:
            assert picture.size == (height, width)
            boxes = torch.tensor([[0, 0, height, width], [height // 2, width // 2, 1 + height // 3, 1 + width // 3]])
            boxes[1, 2:] = boxes[1, 2:].minimum(torch.tensor([height, width]) - boxes[1, :2])
            crops = picture.crops(boxes, [(8, "bilinear"), (5, "bicubic")])
            assert [tuple(crop.shape) for crop in crops] == [(3, 8, 8), (3, 5, 5)]
            small = picture.tensor(longest=10)
            assert max(small.shape[1:]) <= 10 and min(small.shape[1:]) >= 1
        luma = animal.pixels @ np.array([0.299, 0.587, 0.114])
        assert np.abs(ImageFile(animal.file, lambda: "it", 1).tensor()[0].numpy() - luma).max() <= animal.near + 1

    def test_collection_has_many_distinct_images(self):
        assert len(GOOD) > 50 and len(BAD) >= 12 and len({animal.name for animal in ALL}) == len(ALL)


class TestTogether:
    def test_decoded_once_all_bad_ones_named(self, tmp_path):
        zoo.fill(tmp_path, ALL)
        source = open_data(tmp_path)
        assert len(source) == len(ALL)
        held = decode_all(source, canvas=64, max_bad=0.5)  # 1x5000 and 5000x1 would need a square
        assert len(held.dropped) == len(BAD) and len(held.source) == len(GOOD)
        assert all(any(repr(os.path.join(tmp_path, bad.name)) in message for message in held.dropped) for bad in BAD)
        expected = {animal.name: animal for animal in GOOD}
        for i in range(len(held.source)):
            animal = expected.pop(held.source.identity(i))
            height, width = held.size[i].tolist()
            if max(animal.pixels.shape) <= 64:
                assert off(held.images[i, :, :height, :width], animal.pixels) <= animal.near
        assert not expected
        with pytest.raises(DataError, match=f"{len(BAD)} of {len(ALL)} images of .* cannot be read"):
            decode_all(source, canvas=64)

    def test_streamed_by_workers(self, tmp_path):
        zoo.fill(tmp_path, GOOD)
        views = Views([View(size=8), View(size=5, interpolation="bicubic")], (0.5,) * 3, (0.2,) * 3)
        source, seen = open_data(tmp_path), {}
        for workers in (0, 2):
            loader = Loader(source, batch=len(GOOD), views=views, seed=1, resident=False, workers=workers)
            (batch,) = loader.epoch(0)
            seen[workers] = batch.crops
        assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True)) and seen[0][0].float().std() > 20

    @pytest.mark.slow
    @pytest.mark.usefixtures("unjudged")
    def test_a_run_and_its_features(self, tmp_path):
        """Some of each kind, from training to the written features."""
        animals = [*GOOD[:40], next(bad for bad in BAD if bad.name == "text.jpg")]
        (tmp_path / "zoo").mkdir()
        zoo.fill(tmp_path / "zoo", animals)
        strange = zoo.name_strangely(tmp_path / "zoo")
        settings = {"encoder.name": "tiny", "image_size": 16, "cache_on_device": True}
        with pytest.raises(DataError, match=r"1 of .* images"):
            api.prepare(tmp_path / "zoo", batch_size=8, device="cpu", settings=settings)
        (tmp_path / "zoo" / "text.jpg").unlink()
        run = api.pretrain(
            tmp_path / "zoo", out=tmp_path / "run", batch_size=16, epochs=1, device="cpu", quiet=True, settings=settings
        )
        assert run.result
        count = 40 + len(strange)
        assert api.embed_run(run.directory, tmp_path / "zoo", tmp_path / "e.npz", device="cpu") == count
        with np.load(tmp_path / "e.npz", allow_pickle=False) as kept:
            names, vectors = kept["path"].tolist(), kept["vector"]
        assert set(names) == {a.name for a in animals if a.name != "text.jpg"} | {
            name.decode("utf-8", "backslashreplace") for name in strange
        }
        assert vectors.shape == (count, 24) and np.isfinite(vectors).all()
        parquet = pytest.importorskip("pyarrow.parquet")
        api.embed_run(run.directory, tmp_path / "zoo", tmp_path / "e.parquet", device="cpu")
        assert parquet.read_table(tmp_path / "e.parquet")["path"].to_pylist() == names


class TestNames:
    def test_every_name_is_found_and_its_own_pixels(self, tmp_path):
        names = zoo.name_strangely(tmp_path)
        source = open_data(tmp_path)
        assert sorted(names) == [bytes(path) for path in source.scan.paths.tolist()]
        for i in range(len(source)):
            assert source.image(i)[0, 0, 0] == zoo.STRANGE.index(sorted(names)[i])
            source.identity(i).encode()  # can be encoded for output
        assert source.fingerprint()

    def test_a_strange_name_in_an_error_is_one_line(self, tmp_path):
        (tmp_path / "new\nline.png").write_bytes(b"?")
        with pytest.raises(DataError) as caught:
            open_data(tmp_path).image(0)
        assert "\n" not in str(caught.value) and r"new\nline.png" in str(caught.value)


@POSIX
class TestNoFiles:
    def test_entries_that_are_not_files_are_left_out_and_counted(self, tmp_path):
        zoo.fill(tmp_path, GOOD[:2])
        kinds = zoo.no_files(tmp_path)
        for make in kinds.values():
            make()
        source = open_data(tmp_path)
        assert len(source) == 2
        assert f"{len(kinds) - 1} other files skipped" in source.report()  # all but the folder
        assert "that are not files" in source.report()
        (tmp_path / "folder.jpg" / "inside.png").write_bytes(GOOD[0].file)
        assert len(open_data(tmp_path)) == 3

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("name", ["pipe.jpg", "socket.png", "loop.png", "dangling.png", "device.png", "folder.jpg"])
    def test_opening_one_by_name_is_an_error_at_once(self, tmp_path, name):
        zoo.no_files(tmp_path)[name]()
        with pytest.raises(DataError, match=f"{name}' cannot be read"):
            ImageFile(str(tmp_path / name), lambda: str(tmp_path / name), 3)

    def test_a_file_that_became_a_pipe(self, tmp_path):
        zoo.fill(tmp_path, GOOD[:1])
        source = open_data(tmp_path)
        (tmp_path / GOOD[0].name).unlink()
        os.mkfifo(tmp_path / GOOD[0].name)
        with pytest.raises(DataError, match="not a regular file"):
            source.image(0)

    @pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="nothing is unreadable for root")
    def test_file_without_permission_is_named(self, tmp_path):
        zoo.fill(tmp_path, GOOD[:1])
        (tmp_path / GOOD[0].name).chmod(0)
        with pytest.raises(DataError, match="Permission denied"):
            open_data(tmp_path).image(0)

    def test_skipped_gif_is_reported(self, tmp_path):
        zoo.fill(tmp_path, GOOD[:1])
        (tmp_path / "a.gif").write_bytes(b"GIF89a")
        assert "1 other file skipped (1 .gif)" in open_data(tmp_path).report()
