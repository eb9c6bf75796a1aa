"""More than 8 bits a channel, and other than 1 or 3 channels: files, arrays, and the settings stored with a run."""

import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import inbatch
from inbatch import api
from inbatch.batch import Batch
from inbatch.data import open_data
from inbatch.data.decoded_cache import place
from inbatch.data.decoding.image_file import ImageFile
from inbatch.data.pixels import to_bytes
from inbatch.data.views import View, Views
from inbatch.errors import ConfigError, DataError
from inbatch.models import create_encoder, load_encoder, save_encoder

tifffile = pytest.importorskip("tifffile")

SCAN = np.array([[0, 1000, 2048], [4095, 4096, 65_535]], np.uint16)  # 12 bits, and two larger values
BYTES = [[0, 62, 128], [255, 255, 255]]
LEVELS = (0.0, 4095.0)


def noise(*shape, high=4096, dtype=np.uint16):
    return np.random.default_rng(7).integers(0, high, shape).astype(dtype)


def tiff(values, **how) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file.getvalue()


def bands(values, planar="contig", **how) -> bytes:
    """Encode (h, w, k) as a TIFF of k channels."""
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    return tiff(stored, photometric="minisblack", planarconfig=planar, **how)


def opened(data, channels=3, levels=None):
    return ImageFile(data, lambda: "the file", channels, levels)


def by_hand(values, low, high):
    """Map one value at a time."""
    return [round(min(max((v - low) / (high - low), 0.0), 1.0) * 255) for v in np.asarray(values, np.float64).ravel()]


def deep_png(values) -> bytes:
    """Encode a PNG of 16 bits, which Pillow cannot write: (h, w), or (h, w, c) of 3 or 4 channels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    h, w = values.shape[:2]
    colour = {1: 0, 3: 2, 4: 6}[values[0, 0].size]
    rows = values.astype(">u2").reshape(h, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


class TestToBytes:
    @pytest.mark.parametrize(
        "dtype", [np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float32, np.float64, ">u2", ">f4"]
    )
    def test_values_are_scaled_by_levels(self, dtype):
        values = noise(5, 7, high=3000).astype(dtype)
        assert to_bytes(values, (500, 2500)).ravel().tolist() == by_hand(values, 500, 2500)

    def test_values_without_levels_use_the_range_of_the_type(self):
        every = np.arange(65_536, dtype=np.uint16)
        assert (to_bytes(every, None) == every // 256).all()
        assert to_bytes(np.array([3, 200], np.uint8), (0, 10)).tolist() == [3, 200]  # 8 bits are pixels already
        for dtype in (np.float32, np.int32, np.int16, np.uint32):
            with pytest.raises(ValueError, match=r"no known range.*\(a run with --set levels=\[0,1\] reads them\)"):
                to_bytes(np.zeros(2, dtype), None)
        for dtype in (bool, complex, "U3"):
            with pytest.raises(ValueError, match="are not pixels"):
                to_bytes(np.zeros(2, dtype), LEVELS)

    def test_nan_and_infinity_are_clipped(self):
        assert to_bytes(np.array([np.nan, np.inf, -np.inf, 0.5]), (0, 1)).tolist() == [0, 255, 0, 128]

    def test_conversion_in_parts_equals_the_whole(self, monkeypatch):
        values = noise(9, 5)
        whole = to_bytes(values, LEVELS)
        monkeypatch.setattr("inbatch.data.pixels._CHUNK", 12)
        assert (to_bytes(values, LEVELS) == whole).all()

    def test_little_more_memory_than_the_result(self):
        values = np.zeros((64, 512, 512), np.float32)
        tracemalloc.start()
        to_bytes(values, (0, 1))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < values.size + 150e6  # the result, and parts of 4 million values


class TestFiles:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_of_grey(self, kind):
        file = io.BytesIO()
        Image.fromarray(SCAN).save(file, kind)
        assert opened(file.getvalue(), 1, LEVELS).tensor()[0].tolist() == BYTES
        assert opened(file.getvalue(), 3, LEVELS).tensor()[2].tolist() == BYTES
        assert opened(file.getvalue(), 1).tensor()[0].tolist() == (SCAN // 256).tolist()

    @pytest.mark.parametrize("write", [deep_png, lambda x: tiff(x, photometric="rgb")])
    def test_sixteen_bits_of_colour(self, write):
        values = noise(9, 7, 3)
        got = opened(write(values), 3, LEVELS).tensor().permute(1, 2, 0)
        assert got.flatten().tolist() == by_hand(values, *LEVELS)
        assert torch.equal(opened(write(values)).tensor().permute(1, 2, 0), torch.from_numpy(values // 256).byte())

    def test_sixteen_bits_of_colour_and_transparency(self):
        values = np.full((2, 2, 4), 2048, np.uint16)
        values[..., 3] = 65_535
        values[0, 0, 3] = 0
        pixels = opened(deep_png(values), 3, LEVELS).tensor()
        assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 1, 1].tolist() == [128] * 3

    @pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int16])
    def test_grey_of_other_types(self, dtype):
        values = noise(6, 5).astype(dtype)
        assert opened(tiff(values), 1, LEVELS).tensor().flatten().tolist() == by_hand(values, *LEVELS)
        with pytest.raises(DataError, match=rf"'the file' cannot be read: {values.dtype} values.*--set levels"):
            opened(tiff(values), 1).tensor()

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    @pytest.mark.parametrize("k", [2, 4, 8, 13])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_any_number_of_channels(self, k, planar, dtype):
        values = noise(9, 7, k, high=256 if dtype == np.uint8 else 4096, dtype=dtype)
        picture = opened(bands(values, planar), k, LEVELS)
        assert picture.size == (9, 7)
        expected = values if dtype == np.uint8 else to_bytes(values, LEVELS)
        assert torch.equal(picture.tensor(), torch.from_numpy(np.moveaxis(expected, -1, 0).copy()))

    @pytest.mark.parametrize(
        "how",
        [{"compression": "zlib"}, {"compression": "lzma"}, {"tile": (16, 16)}, {"bigtiff": True}, {"byteorder": ">"}],
    )
    def test_every_layout_of_a_file_gives_the_same_pixels(self, how):
        values = noise(33, 20, 5)
        got = opened(bands(values, **how), 5, LEVELS).tensor()
        assert got.permute(1, 2, 0).flatten().tolist() == by_hand(values, *LEVELS)

    def test_orientation_tag_is_applied(self):
        values = noise(9, 7, 5, dtype=np.uint8, high=256)
        picture = opened(bands(values, extratags=[(274, 3, 1, 6, True)]), 5)
        assert picture.size == (7, 9)
        assert torch.equal(picture.tensor(), torch.from_numpy(np.rot90(values, -1).copy()).permute(2, 0, 1))

    def test_only_the_first_page(self):
        values = noise(3, 9, 7, dtype=np.uint8, high=256)
        data = tiff(values, photometric="minisblack")
        assert opened(data, 1).tensor()[0].tolist() == values[0].tolist()

    @pytest.mark.parametrize("how", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("vectors", [True, False])
    def test_every_channel_is_cut_and_resized_as_a_grey_image_is(self, how, vectors, monkeypatch):
        """Pillow treats the fourth channel as transparency and would weight the others by it."""
        monkeypatch.setattr("inbatch.data.decoding.geometry._vectors", lambda: vectors)
        values = noise(40, 50, 4, dtype=np.uint8, high=256)
        boxes, wanted = torch.tensor([[3, 4, 30, 33], [0, 0, 40, 50]]), [(16, how), (24, how)]
        together = opened(bands(values), 4).crops(boxes, wanted)
        for c in range(4):
            alone = opened(tiff(values[..., c]), 1).crops(boxes, wanted)
            for crop, one in zip(together, alone, strict=True):
                assert (crop[c].int() - one[0].int()).abs().max() <= 1
        assert opened(bands(values), 4).tensor(longest=25).shape == (4, 20, 25)

    def test_different_number_of_channels_is_refused(self, tmp_path):
        data = bands(noise(9, 7, 5))
        for channels in (3, 4, 6):
            with pytest.raises(DataError, match=rf"has 5 channels, {channels} were.*--set channels=5"):
                opened(data, channels)
        (tmp_path / "a.tif").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.tif' cannot be read: it has 5 channels"):
            open_data(tmp_path).image(0)
        assert open_data(tmp_path, channels=5).image(0).shape == (5, 9, 7)
        Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
        with pytest.raises(DataError, match=r"b\.png' cannot be read: only TIFF files give 5 channels"):
            open_data(tmp_path, channels=5).image(1)

    def test_compression_that_needs_another_library(self):
        pytest.importorskip("tifffile")
        values = Image.fromarray(noise(9, 7, dtype=np.uint8, high=256))
        file = io.BytesIO()
        values.save(file, "TIFF", compression="tiff_lzw")
        assert opened(file.getvalue(), 1).tensor().shape == (1, 9, 7)  # Pillow does not need tifffile
        data = bytearray(bands(noise(9, 7, 5)))
        place = data.index((259).to_bytes(2, "little") + (3).to_bytes(2, "little"))
        data[place + 8 : place + 10] = (5).to_bytes(2, "little")  # declares LZW
        with pytest.raises(DataError, match="'the file' cannot be read"):
            opened(bytes(data), 5).tensor()

    def test_missing_tifffile_is_reported(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tifffile", None)
        with pytest.raises(DataError, match=r'need tifffile: python -m pip install "inbatch\[tiff\]"'):
            opened(bands(noise(9, 7, 5)), 5)
        assert opened(tiff(SCAN), 1, LEVELS).tensor()[0].tolist() == BYTES  # not needed for files that Pillow reads


class TestHostile:
    def test_over_the_limit_by_its_header(self, monkeypatch):
        data = bands(noise(30, 20, 5))  # 3,000 values, 6,000 bytes
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 1999)
        with pytest.raises(DataError, match="20x30 pixels of 0 MB are over the limit"):
            opened(data, 5)
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 2000)
        opened(data, 5)
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 599)
        with pytest.raises(DataError, match="over the limit"):
            opened(bands(noise(30, 20, 2, dtype=np.uint8)), 2)

    def test_small_file_with_a_large_size_in_its_header_is_refused(self):
        data = bytearray(bands(noise(9, 7, 5)))
        for tag in (256, 257):  # width and height
            place = data.index(tag.to_bytes(2, "little") + (4).to_bytes(2, "little"))
            data[place + 8 : place + 12] = (65_000).to_bytes(4, "little")
        with pytest.raises(DataError, match=r"65000x65000 pixels of .* MB are over the limit"):
            opened(bytes(data), 5)

    @pytest.mark.parametrize("kind", ["zlib", "lzma"])
    def test_a_strip_that_unpacks_to_more_than_it_should(self, kind):
        """Some kB that expand to 40 MB are refused before decompression."""
        module = __import__(kind)
        data, packed = bytearray(bands(noise(9, 7, 5), compression=kind)), module.compress(bytes(4 * 10**7))
        for tag, value in ((273, len(data)), (279, len(packed))):  # offset of the strip, and its bytes
            place = next(data.index(struct.pack("<HH", tag, t)) for t in (3, 4) if struct.pack("<HH", tag, t) in data)
            data[place : place + 12] = struct.pack("<HHII", tag, 4, 1, value)
        picture = opened(bytes(data) + packed, 5, LEVELS)
        tracemalloc.start()
        with pytest.raises(DataError, match="compressed pixels exceed the size in its header"):
            picture.tensor()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6

    def test_pages_in_a_circle(self):
        """The offset of the next page points to the first."""
        data = bytearray(bands(noise(9, 7, 5)))
        first = int.from_bytes(data[4:8], "little")
        end = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
        data[end : end + 4] = first.to_bytes(4, "little")
        assert opened(bytes(data), 5, LEVELS).tensor().shape == (5, 9, 7)

    def test_truncated_and_flipped_files_raise_a_data_error(self):
        data = bands(noise(9, 7, 5), compression="zlib")
        rng = np.random.default_rng(0)
        broken = [data[:n] for n in range(0, len(data), 37)]
        for _ in range(150):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
            broken.append(bytes(damaged))
        refused = 0
        for one in broken:
            try:
                assert opened(one, 5, LEVELS).tensor().shape[0] == 5
            except DataError as e:
                refused += 1
                assert str(e).startswith("'the file' cannot be read: ")
        assert refused > len(broken) // 3


class TestArrays:
    def test_sixteen_bits_and_floats(self):
        values = noise(4, 3, 8, 9)
        assert torch.equal(open_data(values).images, torch.from_numpy(values // 256).byte())
        expected = by_hand(values, *LEVELS)
        for data in (values, values.astype(np.float32), torch.from_numpy(values), torch.from_numpy(values).double()):
            assert open_data(data, levels=LEVELS).images.flatten().tolist() == expected
        unit = torch.rand(4, 3, 8, 9)
        assert torch.equal(open_data(unit, levels=(0, 1)).images, (unit.double() * 255).round().byte())
        assert open_data(unit.bfloat16(), levels=(0, 1)).images.dtype == torch.uint8

    def test_floats_need_levels(self):
        with pytest.raises(DataError, match=r"array cannot be used: float32 values have no known range"):
            open_data(torch.rand(4, 3, 8, 8))

    def test_a_file_that_is_mapped(self, tmp_path):
        np.save(tmp_path / "a.npy", noise(4, 8, 9, 5))
        mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
        assert open_data(mapped, levels=LEVELS).images.shape == (4, 5, 8, 9)


class TestRemembered:
    """A run's encoder converts new images as the training images were converted."""

    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(8):
            (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            file = tmp_path / "set" / "ab"[i % 2] / f"{i}.tif"
            file.write_bytes(bands(np.roll(noise(16, 16, 5), i, 0), "contig" if i < 4 else "separate"))
        return tmp_path / "set"

    @pytest.mark.slow
    @pytest.mark.usefixtures("unjudged")
    def test_a_run_from_training_to_embedding(self, folder, tmp_path):
        settings = {"encoder.name": "tiny", "levels": [0, 4095], "channels": 5}
        run = api.pretrain(
            folder, out=tmp_path / "run", batch_size=4, epochs=1, knn_k=2, device="cpu", quiet=True, settings=settings
        )
        assert run.recipe.levels == LEVELS and run.recipe.channels == 5
        encoder = api.load(tmp_path / "run")
        assert encoder.levels == LEVELS
        assert api.embed_run(tmp_path / "run", folder, tmp_path / "e.npz", device="cpu") == 8
        with np.load(tmp_path / "e.npz", allow_pickle=False) as kept:
            vectors, names = kept["vector"], kept["path"].tolist()
        images = [np.asarray(tifffile.imread(folder / name)) for name in names]
        images = [x if x.shape[2] == 5 else np.moveaxis(x, 0, -1) for x in images]
        assert np.allclose(encoder.embed(images), vectors, atol=1e-5)
        assert np.allclose(encoder.embed(np.stack(images)), vectors, atol=1e-5)
        assert np.allclose(encoder.embed(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)), vectors, atol=1e-5)
        plain = [to_bytes(x, None) for x in images]
        assert not np.allclose(encoder.embed(plain), vectors, atol=1e-2)  # levels have an effect, and were applied
        evaluation = api.evaluate_run(tmp_path / "run", protocols=("knn",), k=2, device="cpu")
        assert evaluation["run"] == str(tmp_path / "run")
        part = inbatch.draw_views(folder, tmp_path / "v.png", count=2, settings=settings)
        assert part.name.startswith("simclr") and Image.open(tmp_path / "v.png").size[0] > 100

    def test_saved_with_the_encoder(self, tmp_path):
        encoder = create_encoder("tiny", size=20, channels=1)
        save_encoder(encoder, tmp_path / "a")
        assert load_encoder(tmp_path / "a").levels is None
        encoder.levels = (-5.0, 2.5)
        save_encoder(encoder, tmp_path / "b")
        assert load_encoder(tmp_path / "b").levels == (-5.0, 2.5)

    def test_embedding_pillow_images_of_more_bits(self):
        encoder = create_encoder("tiny", size=20, channels=1).eval()
        encoder.levels = LEVELS
        values = noise(20, 20)
        expected = encoder.embed(to_bytes(values, LEVELS)[None])
        assert np.allclose(encoder.embed([Image.fromarray(values)]), expected, atol=1e-6)
        encoder.levels = None
        with pytest.raises(DataError, match="An image cannot be embedded: 32-bit"):
            encoder.embed([Image.fromarray(values.astype(np.float32))])

    def test_levels_are_part_of_the_cache_key(self, folder, monkeypatch, tmp_path):
        monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
        places = {place(open_data(folder, channels=5, levels=levels), 64) for levels in (None, LEVELS, (0.0, 1.0))}
        assert len(places) == 3
        subsets = {place(open_data(folder, channels=5, levels=levels, subset=4), 64) for levels in (None, LEVELS)}
        assert len(subsets) == 2


class TestViews:
    @pytest.mark.parametrize("k", [1, 2, 4, 8, 13])
    def test_kernel_and_torch_draw_the_same_views(self, k):
        pytest.importorskip("numba")
        images = torch.from_numpy(noise(6, k, 24, 24, dtype=np.uint8, high=256))
        view = View(16, jitter=1.0, brightness=0.4, contrast=0.4, blur=0.5, kernel=3, solarise=0.3)
        batch = Batch(torch.arange(6), torch.full((6,), -1), 3, 0, images=images)
        drawn = [Views([view] * 2, (0.5,) * k, (0.25,) * k, fused=fused)(batch) for fused in (None, False)]
        for one, other in zip(drawn[0].images, drawn[1].images, strict=True):
            assert one.shape == (6, k, 16, 16) and (one - other).abs().max() < 0.03

    def test_colour_is_left_out_of_a_presets_views(self):
        from inbatch.data.views import make_views

        for view in make_views("simclr", {"size": 32}, 13):
            assert not view.needs_colour and view.brightness and view.contrast and view.jitter
        assert all(view.needs_colour for view in make_views("simclr", {"size": 32}, 3))
        with pytest.raises(ConfigError, match="red, green and blue"):
            Views([View(8, grey=0.2)], (0.5,) * 13, (0.2,) * 13)
