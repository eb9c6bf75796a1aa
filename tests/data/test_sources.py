"""Sources: every kind of data on files made here, and the faults of each kind."""

import hashlib
import io
import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import bomb
from PIL import Image

from inbatch.data import open_data, splits, write_folder
from inbatch.data.decoding import jpeg
from inbatch.data.decoding.geometry import resized
from inbatch.data.decoding.image_file import ImageFile, decoders
from inbatch.data.sources.folder import scan
from inbatch.errors import ConfigError, DataError

RAMP = np.indices((20, 30)).sum(0).astype(np.uint8) * 5  # brighter towards the bottom right


def picture(value=128, size=(12, 8), mode="RGB"):
    return Image.new(mode, size, value if mode != "RGB" else (value, value // 2, 10))


def fill(root, *paths):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number * 7).save(root / path)
    return root


class TestFolder:
    def test_a_mixed_folder_keeps_every_image(self, tmp_path):
        """torchvision's ImageFolder and LightlyDataset keep 1 of these 6 without a message."""
        fill(tmp_path, *(f"{i}.png" for i in range(5)), "sub/5.png")
        source = open_data(tmp_path)
        assert [source.identity(i) for i in range(6)] == [*(f"{i}.png" for i in range(5)), "sub/5.png"]
        assert source.labels.tolist() == [-1] * 6 and source.classes == ()
        assert "6 images" in source.report() and "unlabelled" in source.report()

    def test_first_level_folders_are_classes_at_any_depth(self, tmp_path):
        fill(tmp_path, "dog/x/1.png", "cat/2.PNG", "dog/3.jpg", "cat/deep/er/4.TIFF")
        source = open_data(tmp_path)
        assert source.classes == ("cat", "dog")
        assert [source.identity(i) for i in range(4)] == ["cat/2.PNG", "cat/deep/er/4.TIFF", "dog/3.jpg", "dog/x/1.png"]
        assert source.labels.tolist() == [0, 0, 1, 1]

    def test_single_folder_of_images_has_no_classes(self, tmp_path):
        assert open_data(fill(tmp_path, "holiday/1.png", "holiday/2.png")).classes == ()

    def test_skipped_files_are_counted_without_hidden_ones(self, tmp_path):
        fill(tmp_path, "1.png")
        for name in ("a.txt", "b.TXT", "c.mov", "README", ".hidden.png", ".cache/2.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"?")
        result = scan(tmp_path)
        assert result.paths.tolist() == [b"1.png"]
        assert result.skipped == {".txt": 2, ".mov": 1, "no extension": 1}
        assert "4 other files skipped (2 .txt, 1 .mov" in open_data(tmp_path).report()

    def test_links_are_followed_once(self, tmp_path):
        fill(tmp_path, "a/1.png", "b/2.png")
        (tmp_path / "a" / "back").symlink_to(tmp_path)
        (tmp_path / "again").symlink_to(tmp_path / "b")
        assert len(scan(tmp_path).paths) == 2

    def test_unreadable_folders_are_reported(self, tmp_path, monkeypatch):
        fill(tmp_path, "1.png", "locked/2.png")
        scandir = os.scandir

        def refuse(path):
            if os.fsencode(path).endswith(b"locked"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)  # chmod does not stop root
        source = open_data(tmp_path)
        assert len(source) == 1 and "1 unreadable folder (locked/: Permission denied)" in source.report()

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
    def test_a_name_that_is_not_text(self, tmp_path):
        name = os.path.join(os.fsencode(tmp_path), b"sp ace\n\xff.png")
        Path(os.fsdecode(name)).write_bytes(encoded(picture(), "PNG"))
        source = open_data(tmp_path)
        assert source.identity(0) == "sp ace\n\\xff.png" and source.image(0).shape == (3, 8, 12)

    def test_splits(self, tmp_path):
        fill(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/b/5.png")
        assert splits(tmp_path) == ("train", "val")
        test = open_data(tmp_path, "test")
        assert test.classes == ("a", "b", "c") and test.labels.tolist() == [1, 2]  # numbered as in train
        fill(tmp_path, "val/d/6.png")
        with pytest.raises(DataError, match="classes that the train split lacks: d; rename or remove their folders"):
            open_data(tmp_path, "test")

    def test_class_called_train_is_not_taken_as_a_split(self, tmp_path):
        fill(tmp_path, "train/1.png", "plane/2.png")
        assert splits(tmp_path) == ("train",) and open_data(tmp_path).classes == ("plane", "train")
        with pytest.raises(DataError, match="no split 'test', only train"):
            open_data(tmp_path, "test")

    def test_folder_without_images_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="No image under"):
            open_data(tmp_path)
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(DataError, match=r"1 other file skipped \(1 .txt\)"):
            open_data(tmp_path)
        with pytest.raises(DataError, match="does not exist; data can be"):
            open_data(tmp_path / "nowhere")
        with pytest.raises(DataError, match="cannot be opened"):
            open_data(tmp_path / "notes.txt")
        with pytest.raises(DataError, match="A int cannot be opened"):
            open_data(3)

    def test_write_folder_round_trip(self, tmp_path):
        images = torch.arange(6 * 9 * 7).view(6, 1, 9, 7).byte()
        source = open_data((images, [1, 0, 1, 1, 0, 1]))
        back = open_data(write_folder(source, tmp_path / "out"), channels=1)
        assert [back.identity(i) for i in range(2)] == ["0/000001.png", "0/000004.png"]
        order = [int(back.identity(i)[2:8]) for i in range(6)]
        assert torch.equal(torch.stack([back.image(i) for i in range(6)]), images[order])
        assert torch.equal(back.labels, source.labels[order])
        with pytest.raises(DataError, match="not empty"):
            write_folder(source, tmp_path / "out")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data, channels=3):
    return ImageFile(data, lambda: "the file", channels)


class TestDecode:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
    def test_formats(self, kind):
        image = picture(200)
        pixels = opened(encoded(image, kind, **{"lossless": True} if kind == "WEBP" else {})).tensor()
        assert pixels.shape == (3, 8, 12) and pixels.dtype == torch.uint8
        expected = torch.tensor([200, 100, 10])[:, None, None]
        assert (pixels.int() - expected).abs().max() <= (6 if kind == "JPEG" else 0)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_turns_the_image_and_its_size(self, kind, orientation):
        upright = Image.fromarray(RAMP)
        undo = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = opened(encoded(stored.convert("RGB"), kind, exif=exif), channels=1)
        assert image.size == (20, 30)
        assert np.abs(image.tensor()[0].numpy().astype(int) - RAMP).max() < 12

    @pytest.mark.parametrize(
        ("mode", "kind", "expected"),
        [
            ("L", "PNG", (90, 90, 90)),
            ("LA", "PNG", (90, 90, 90)),
            ("RGBA", "PNG", (90, 60, 30)),
            ("P", "PNG", (90, 60, 30)),
            ("CMYK", "JPEG", (90, 60, 30)),
            ("CMYK", "TIFF", (90, 60, 30)),
            ("1", "PNG", (0, 0, 0)),
        ],
    )
    def test_modes_become_rgb(self, mode, kind, expected):
        start = Image.new("L", (8, 8), 90) if mode in ("L", "LA", "1") else Image.new("RGB", (8, 8), (90, 60, 30))
        image = start.convert(mode, dither=Image.Dither.NONE)
        pixels = opened(encoded(image, kind)).tensor()
        tolerance = 40 if mode == "P" else 6  # the web palette has steps of 51
        assert (pixels.int() - torch.tensor(expected)[:, None, None]).abs().max() <= tolerance

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_are_scaled_not_clipped(self, kind):
        image = Image.fromarray(np.array([[0, 40_000, 65_535]], np.uint16))
        assert opened(encoded(image, kind)).tensor()[1].tolist() == [[0, 40_000 // 256, 255]]

    def test_a_transparent_palette(self):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 9, 8, 7])
        pixels = opened(encoded(image, "PNG", transparency=b"\x00\x80")).tensor()
        assert pixels[:, 0, 0].tolist() == [round(c * 128 / 255 + 255 * 127 / 255) for c in (9, 8, 7)]  # on white

    def test_grey_on_request(self):
        pixels = opened(encoded(picture(200), "PNG"), channels=1).tensor()
        assert pixels.shape == (1, 8, 12) and pixels[0, 0, 0] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 10)
        with pytest.raises(DataError, match=r"no alpha: 3 channels, 2 were requested"):
            opened(encoded(picture(200), "PNG"), channels=2)
        with pytest.raises(DataError, match="not 0"):
            open_data(".", channels=0)

    def test_scaled_down_while_decoding(self):
        photo = Image.effect_mandelbrot((1000, 400), (-2, -1, 1, 1), 30).convert("RGB")
        small = opened(encoded(photo, "JPEG", quality=95)).tensor(longest=100)
        reference = np.asarray(photo.resize((100, 40), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert small.shape == (3, 40, 100)
        assert np.abs(small.numpy().astype(int) - reference).mean() < 2
        assert opened(encoded(picture(), "PNG")).tensor(longest=100).shape == (3, 8, 12)  # never enlarged

    @pytest.mark.parametrize("how", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("turn", [1, 6])
    def test_crops_equal_cutting_then_resizing(self, how, turn):
        """Also if the JPEG was decoded at a fraction of its size, and rotated: boxes are in upright pixels."""
        photo = Image.effect_mandelbrot((1200, 800), (-2, -1, 1, 1), 30).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(photo, "JPEG", quality=95, exif=exif)
        whole = Image.fromarray(opened(data).tensor().permute(1, 2, 0).numpy())
        boxes = torch.tensor([[10, 40, 700, 600], [100, 200, 450, 500]])
        for boxes_used, side in ((boxes, 64), (boxes, 300), (boxes // 4, 64)):
            crops = opened(data).crops(boxes_used, [(side, how)] * 2)
            for crop, (top, left, h, w) in zip(crops, boxes_used.tolist(), strict=True):
                cut = whole.crop((left, top, left + w, top + h))
                expected = cut.resize((side, side), Image.Resampling[how.upper()])
                error = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
                assert error.mean() < 1.5

    def test_damaged_files_are_named(self, monkeypatch):
        good = encoded(Image.fromarray(RAMP), "JPEG")
        for data in (b"", b"no image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
            with pytest.raises(
                DataError, match=r"'the file' cannot be read: (it is empty|(a PostScript file, )?not one of JPEG)"
            ):
                opened(data)
        with pytest.raises(DataError, match=r"'the file' cannot be read.*[Tt]runcated"):
            opened(good[: len(good) // 2]).tensor()
        with pytest.raises(DataError, match="'the file' cannot be read: float32 values have no known range"):
            opened(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")).tensor()
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 599)
        with pytest.raises(DataError, match=r"'the file' cannot be read: 30x20 pixels are over the limit"):
            opened(good)

    def test_a_jpeg_over_the_limit_is_not_decoded(self, monkeypatch):
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 599)
        monkeypatch.setattr("inbatch.data.decoding.jpeg.decode", None)
        with pytest.raises(DataError, match="30x20 pixels are over the limit"):
            opened(encoded(Image.fromarray(RAMP), "JPEG"))

    def test_bombs_are_refused_by_their_header(self):
        for side in (9_000, 10_000, 20_000):  # over inbatch's limit, over Pillow's warning, over Pillow's limit
            with pytest.raises(DataError, match="'the file' cannot be read"):
                opened(bomb(side))


SHAPE = np.asarray(Image.effect_mandelbrot((301, 203), (-2, -1, 1, 1), 30))[..., None] // np.array([1, 2, 4], np.uint8)
PHOTO = Image.fromarray(SHAPE // 2 + np.random.default_rng(0).integers(100, size=SHAPE.shape, dtype=np.uint8))


class TestFastJpeg:
    """simplejpeg and Pillow decode to the same pixels."""

    kinds = {
        "baseline": {},
        "progressive": {"progressive": True},
        "4:4:4": {"subsampling": "4:4:4"},
        "4:2:2": {"subsampling": "4:2:2"},
        "RGB": {"keep_rgb": True},
        "restarts": {"restart_marker_blocks": 3},
    }

    def both(self, data, monkeypatch, what, channels=3):
        fast = what(opened(data, channels))
        with monkeypatch.context() as without:
            without.setattr("inbatch.data.decoding.image_file.fast_jpeg", lambda: False)
            slow = what(opened(data, channels))
        return fast, slow

    @pytest.fixture
    def decoded(self, monkeypatch):
        """Record for each image whether simplejpeg decoded it."""
        flags = []
        real = jpeg.decode

        def count(*arguments):
            pixels = real(*arguments)
            flags.append(pixels is not None)
            return pixels

        monkeypatch.setattr("inbatch.data.decoding.jpeg.decode", count)
        return flags

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    @pytest.mark.parametrize("kind", kinds)
    def test_the_same_pixels(self, kind, mode, channels, decoded, monkeypatch):
        if kind == "RGB" and mode == "L":
            return
        data = encoded(PHOTO.convert(mode), "JPEG", quality=90, **self.kinds[kind])
        box = torch.tensor([[5, 9, 180, 170]])
        for what in (ImageFile.tensor, lambda p: p.tensor(70), lambda p: p.crops(box, [(40, "bilinear")])[0]):
            fast, slow = self.both(data, monkeypatch, what, channels)
            assert fast.shape[0] == channels and torch.equal(fast, slow)
        assert decoded == [True] * 3

    @pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
    def test_truncated(self, cut):
        data = encoded(PHOTO, "JPEG")
        with pytest.raises(DataError, match=r"'the file' cannot be read.*truncated"):
            opened(data[: int(len(data) * cut)]).tensor()

    def test_files_that_simplejpeg_rejects_are_decoded_by_pillow(self, decoded, monkeypatch):
        """Damaged bytes in the middle: Pillow decodes the file, as without simplejpeg."""
        data = bytearray(encoded(PHOTO, "JPEG"))
        data[4000:4200] = bytes(200)
        fast, slow = self.both(bytes(data), monkeypatch, ImageFile.tensor)
        assert decoded == [False] and torch.equal(fast, slow)

    @pytest.mark.parametrize(("place", "value"), [(1, 0xC9), (1, 0xC3), (4, 12), (5, 0), (9, 2)])
    def test_unusual_frames_are_not_its_business(self, place, value):
        """Arithmetic, lossless, 12 bits, a height given later, two components."""
        data = bytearray(encoded(Image.fromarray(RAMP).convert("RGB"), "JPEG"))
        at = data.index(b"\xff\xc0")
        assert jpeg.header(bytes(data)) == (20, 30, 3, False)
        data[at + place : at + place + 1 + (place == 5)] = bytes([value] * (1 + (place == 5)))
        assert jpeg.header(bytes(data)) is None
        for end in range(0, at + 8):  # and no shorter prefix passes as a header
            assert jpeg.header(bytes(data[:end])) is None

    def test_similar_headers_are_distinguished(self):
        files = [encoded(Image.new("RGB", size), "JPEG") for size in ((8, 9), (9, 8), (8, 9))]
        assert [jpeg.header(data)[:2] for data in files] == [(9, 8), (8, 9), (9, 8)]

    def test_an_orientation_in_xmp(self):
        data = encoded(PHOTO, "JPEG", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>')
        picture = opened(data)
        assert picture.size == (301, 203)
        assert torch.equal(picture.tensor(), opened(encoded(PHOTO, "JPEG")).tensor().flip(1).transpose(1, 2))

    def test_pillow_decodes_if_simplejpeg_is_missing(self, monkeypatch):
        assert jpeg.fast_jpeg() and "simplejpeg" in decoders()
        expected = opened(encoded(PHOTO, "JPEG")).tensor()
        jpeg._simplejpeg.cache_clear()
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
        try:
            assert not jpeg.fast_jpeg() and decoders().startswith("pillow")
            assert torch.equal(opened(encoded(PHOTO, "JPEG")).tensor(), expected)
        finally:
            jpeg._simplejpeg.cache_clear()

    def test_long_file_is_read_when_it_is_decoded(self, tmp_path, decoded, monkeypatch):
        PHOTO.save(tmp_path / "1.jpg")
        PHOTO.save(tmp_path / "2.png")
        expected = [open_data(tmp_path).image(i) for i in (0, 1)]
        monkeypatch.setattr("inbatch.data.decoding.image_file._HEAD", 1000)
        source = open_data(tmp_path)
        assert all(torch.equal(source.image(i), expected[i]) for i in (0, 1)) and decoded == [True, True]
        with source.open(0) as picture:
            (tmp_path / "1.jpg").unlink()
            with pytest.raises(DataError, match=r"1\.jpg' cannot be read: No such file"):
                picture.tensor()
        with pytest.raises(DataError, match=r"1\.jpg' cannot be read: No such file"):
            source.open(0)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("how", ["bilinear", "bicubic"])
    def test_torch_and_pillow_resize_equally(self, how, channels, monkeypatch):
        data = encoded(PHOTO, "PNG")
        boxes, wanted = torch.tensor([[3, 5, 150, 201], [40, 50, 30, 41], [0, 0, 203, 301]]), [(64, how)] * 3
        crops = []
        for vectors in (True, False):
            monkeypatch.setattr("inbatch.data.decoding.geometry._vectors", lambda vectors=vectors: vectors)
            crops.append(torch.stack(opened(data, channels).crops(boxes, wanted)).int())
        assert (crops[0] - crops[1]).abs().max() <= 1

    def test_bicubic_passes_have_one_order(self, monkeypatch):
        """Pillow 13 begins with the columns if that is less work, which gives pixels that differ by up to 20."""
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        crops = []
        for vectors in (True, False):
            monkeypatch.setattr("inbatch.data.decoding.geometry._vectors", lambda vectors=vectors: vectors)
            crops.append([resized(noise, (0, 0, 64, width), (32, 32), "bicubic").int() for width in range(30, 60)])
        assert max((x - y).abs().max() for x, y in zip(*crops, strict=True)) <= 2


def write_parquet(file, images, labels=None, names=None, group=4, paths=None):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = paths or [f"x/{i}.png" for i in range(len(images))]
    rows = [{"bytes": b, "path": p} for b, p in zip(images, paths, strict=True)]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(rows, kind), **({} if labels is None else {"label": labels})})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file, row_group_size=group)


class TestParquet:
    images = [encoded(picture(i * 20), "PNG") for i in range(10)]

    def test_rows_labels_and_names(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", self.images, [0, 1] * 5, ["cat", "dog"])
        write_parquet(tmp_path / "val.parquet", self.images[:3], [1, None, -1], ["cat", "dog"])
        assert splits(tmp_path) == ("train", "val")
        source = open_data(tmp_path)
        assert len(source) == 10 and source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1] * 5
        for i in (9, 0, 4, 3):  # across row groups of 4, in any order
            assert source.image(i)[0, 0, 0] == i * 20 and source.identity(i) == f"x/{i}.png"
        assert open_data(tmp_path, "test").labels.tolist() == [1, -1, -1]
        assert len(open_data(tmp_path / "val.parquet")) == 3

    def test_shards_follow_each_other(self, tmp_path):
        write_parquet(tmp_path / "train-00000-of-00002.parquet", self.images[:5], [0] * 5)
        write_parquet(tmp_path / "train-00001-of-00002.parquet", self.images[5:], [1] * 5)
        source = open_data(tmp_path)
        assert [int(source.image(i)[0, 0, 0]) for i in range(10)] == [i * 20 for i in range(10)]
        assert source.labels.tolist() == [0] * 5 + [1] * 5 and source.classes == ("0", "1")

    def test_only_a_few_row_groups_are_held(self, tmp_path, monkeypatch):
        write_parquet(tmp_path / "train.parquet", self.images, group=1)
        monkeypatch.setattr("inbatch.data.sources.parquet.CACHE_BYTES", 3 * len(self.images[0]))
        source = open_data(tmp_path)
        for i in range(10):
            source.image(i)
        assert 1 <= len(source._cache) <= 3 and source.labels.tolist() == [-1] * 10

    @pytest.mark.parametrize("kind", ["binary", "large_binary"])
    def test_rows_that_hold_nothing(self, kind, tmp_path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        struct = arrow.struct([("path", arrow.string()), ("bytes", getattr(arrow, kind)())])
        rows = [None, {"bytes": b"", "path": "empty"}, {"bytes": self.images[3], "path": None}]
        table = arrow.table({"image": arrow.array([*rows, *rows], struct)})
        parquet.write_table(table, tmp_path / "train.parquet", row_group_size=4)
        source = open_data(tmp_path)
        assert [int(source.image(i)[0, 0, 0]) for i in (2, 5)] == [60, 60] and source.identity(5) == "row 5"
        for i in (0, 3):
            with pytest.raises(DataError, match=f"'row {i}' has no bytes"):
                source.image(i)
        with pytest.raises(DataError, match="'empty' cannot be read: it is empty"):
            source.image(4)

    def test_threads_read_the_same_rows(self, tmp_path, monkeypatch):
        write_parquet(tmp_path / "train.parquet", self.images, group=2)
        monkeypatch.setattr("inbatch.data.sources.parquet.CACHE_BYTES", 1)
        source = open_data(tmp_path)
        order = [i % 10 for i in range(0, 1200, 7)]
        with ThreadPoolExecutor(4) as pool:
            assert [int(x[0, 0, 0]) for x in pool.map(source.image, order)] == [20 * i for i in order]

    def test_pickles_without_open_files(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", self.images)
        source = open_data(tmp_path)
        first = source.image(7)
        copy = pickle.loads(pickle.dumps(source))
        assert not copy._opened and torch.equal(copy.image(7), first)

    def test_errors(self, tmp_path, monkeypatch):
        file = tmp_path / "train.parquet"
        write_parquet(file, self.images, [0, 7] * 5, ["cat", "dog"])
        with pytest.raises(DataError, match="hold the label 7, but 2 classes are named"):
            open_data(file)
        write_parquet(file, self.images, [-5] * 10)
        with pytest.raises(DataError, match="go down to -5"):
            open_data(file)
        write_parquet(file, [])
        with pytest.raises(DataError, match="no rows"):
            open_data(file)
        write_parquet(file, [None, b"junk"])
        with pytest.raises(DataError, match=r"'x/0\.png' has no bytes"):
            open_data(file).image(0)
        with pytest.raises(DataError, match=r"'x/1\.png' cannot be read"):
            open_data(file).image(1)
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"img": [1]}), file)
        with pytest.raises(DataError, match=r"has the columns img \(int64\): a column of encoded images is needed"):
            open_data(file)
        file.write_bytes(b"PAR1 not really")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            open_data(file)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ConfigError, match=r'pip install "inbatch\[parquet\]"'):
            open_data(file)

    def test_real_photographs(self, cifar):
        source = open_data(cifar, "test", subset=500)
        assert len(source) == 500 and source.channels == 3 and source.classes[:2] == ("airplane", "automobile")
        for i in (0, 250, 499):
            assert source.image(i).shape == (3, 32, 32)
            assert source.identity(i).split("/")[0] == source.classes[source.labels[i]]


class TestArrays:
    def test_shapes(self):
        colour = torch.randint(256, (4, 3, 8, 6), dtype=torch.uint8)
        for images in (colour, colour.numpy(), colour.permute(0, 2, 3, 1), colour.permute(0, 2, 3, 1).numpy()):
            source = open_data(images)
            assert source.channels == 3 and len(source) == 4
            assert all(torch.equal(source.image(i), colour[i]) for i in range(4))
        assert open_data(colour[:, 0]).image(2).shape == (1, 8, 6)
        assert open_data(torch.zeros(2, 5, 9, 9, dtype=torch.uint8)).channels == 5

    def test_views_of_arrays(self):
        images = np.random.default_rng(0).integers(256, size=(4, 8, 6, 3), dtype=np.uint8)
        for view in (images[..., ::-1], images[:, ::-1], images[::-1, ..., 0], images[::2, 1:]):
            given = open_data(np.ascontiguousarray(view))
            assert all(torch.equal(open_data(view).image(i), given.image(i)) for i in range(len(given)))

    def test_labels(self):
        images = np.zeros((4, 8, 6), np.uint8)
        source = open_data((images, np.array([2, -1, 0, 2], np.int32)))
        assert source.labels.tolist() == [1, -1, 0, 1] and source.classes == ("0", "2") and source.ids == (0, 2)
        assert source.identity(3) == "3" and splits(images) == ("train",)
        assert open_data(images).labels.tolist() == [-1] * 4

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.zeros((4, 8, 6)), "give uint8"),
            (np.zeros((4, 8), np.uint8), "is none of"),
            (np.zeros((4, 8, 8, 8), np.uint8), "is none of"),
            (np.zeros((0, 8, 6), np.uint8), "no image"),
            ((np.zeros((4, 8, 6), np.uint8), [0, 1, 2]), "one label each"),
            ((np.zeros((2, 8, 6), np.uint8), [0, -2]), "go down to -2"),
        ],
    )
    def test_errors(self, data, message):
        with pytest.raises(DataError, match=message):
            open_data(data)

    def test_different_number_of_channels_is_refused(self):
        with pytest.raises(DataError, match=r"have 1 channels, 3 were requested \(a run with --set channels=1"):
            open_data(np.zeros((4, 8, 6), np.uint8), channels=3)

    def test_subset_is_fixed_and_nested(self):
        images = torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 4, 4)
        subset = open_data((images, torch.arange(100)), subset=30)
        fewer = open_data((images, torch.arange(100)), subset=10)
        assert subset.labels.tolist() == sorted(set(subset.labels.tolist())) and len(subset) == 30
        assert set(fewer.labels.tolist()) < set(subset.labels.tolist())
        assert [int(subset.image(i)[0, 0, 0]) for i in range(30)] == subset.labels.tolist()
        assert [subset.identity(i) for i in range(30)] == [str(i) for i in subset.labels.tolist()]
        assert len(set(subset.labels.tolist()) & set(range(30))) < 30  # not the first ones
        assert "30 of 100 used" in subset.report()
        for wrong in (0, 101):
            with pytest.raises(DataError, match="has 100 images; choose 1 to 100"):
                open_data(images, subset=wrong)


def raw_knn(train, test, k):
    """Weighted cosine k-NN (temperature 0.1) on raw pixels, computed literally."""
    a, b = (torch.nn.functional.normalize(s.images.flatten(1).float(), dim=1) for s in (train, test))
    near, which = (b @ a.T).topk(k)
    votes = torch.zeros(len(b), 10).scatter_add_(1, train.labels[which], (near / 0.1).exp())
    return (votes.argmax(1) == test.labels).float().mean().item()


class TestDigits:
    @pytest.mark.parametrize(
        ("name", "shape", "checksum"),
        [
            ("digits-canvas", (1, 20, 20), "2c19e3971ef221f0"),
            ("digits-canvas-colour", (3, 32, 32), "ec30d21c3e665c31"),
        ],
    )
    def test_same_on_every_machine_and_hard_for_raw_pixels(self, name, shape, checksum):
        torch.manual_seed(5)
        train, test = open_data(name), open_data(name, "test")
        assert (len(train), len(test)) == (1297, 500) and train.images.shape[1:] == shape
        both = torch.cat([train.images, test.images])
        assert hashlib.sha256(both.numpy().tobytes()).hexdigest()[:16] == checksum
        assert train.labels.bincount().min() > 120 and test.labels.bincount().min() > 40
        assert torch.initial_seed() == 5 and splits(name) == ("train", "test")
        for k in (20, 200):
            assert raw_knn(train, test, k) < 0.65

    def test_colours_say_nothing_about_the_class(self):
        """A linear classifier on each image's mean and corner colours is not significantly better than chance."""
        from sklearn.linear_model import LogisticRegression

        train, test = open_data("digits-canvas-colour"), open_data("digits-canvas-colour", "test")
        x, y = (
            torch.cat([s.images[:, :, ::31, ::31].flatten(1).float(), s.images.float().amax((2, 3))], 1) / 255
            for s in (train, test)
        )
        assert LogisticRegression(max_iter=300).fit(x, train.labels).score(y, test.labels) < 0.18

    def test_channels_must_agree(self):
        with pytest.raises(DataError, match="has 1 channels, 3 were requested"):
            open_data("digits-canvas", channels=3)


class TestSignature:
    def test_signature_depends_on_names_number_and_labels_but_not_on_the_folder(self, tmp_path):
        names = ["a/1.png", "a/2.png", "b/1.png"]
        first = open_data(fill(tmp_path / "one", *names))
        assert open_data(fill(tmp_path / "two", *names)).signature() == first.signature()
        others = (
            [*names[:2], "b/2.png"],
            [*names, "b/2.png"],
            ["a/1.png", "b/1.png", "b/2.png"],
            ["a/1", "a/2", "c/1"],
        )
        signatures = {
            open_data(fill(tmp_path / f"x{i}", *(n.removesuffix(".png") + ".png" for n in other))).signature()
            for i, other in enumerate(others)
        }
        assert len(signatures | {first.signature()}) == 5

    def test_signature_covers_the_images_in_use(self, tmp_path):
        images, labels = np.zeros((6, 8, 8), np.uint8), np.array([0, 1, 0, 1, 0, 1])
        whole = open_data((images, labels))
        assert whole.signature() == open_data((images, labels)).signature()
        assert whole.signature() != open_data((images, labels[::-1].copy())).signature()
        assert len({open_data((images, labels), subset=n).signature() for n in (3, 4, 5)} | {whole.signature()}) == 4

    def test_signature_of_parquet_files_reads_their_footers(self, tmp_path):
        encoded = []
        for value in (1, 2, 3):
            picture(value).save(buffer := io.BytesIO(), "PNG")
            encoded.append(buffer.getvalue())
        signatures = []
        for name, count, labels in (("a", 3, [0, 1, 0]), ("b", 3, [0, 1, 0]), ("c", 2, [0, 1]), ("d", 3, [0, 1, 1])):
            write_parquet(tmp_path / f"{name}.parquet", encoded[:count], labels, ["cat", "dog"])
            signatures.append(open_data(tmp_path / f"{name}.parquet").signature())
        assert signatures[0] == signatures[1] and len(set(signatures)) == 3
