"""TIFF by its own tags: the grid of types, bands, planar configuration and photometric interpretation, and pages."""

import io
import itertools
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from inbatch import survey_data
from inbatch.apps.reports.dataset_text import notes, report_rows
from inbatch.data import open_data
from inbatch.data.decoding.image_file import ImageFile
from inbatch.errors import DataError

tifffile = pytest.importorskip("tifffile")

TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
EXTRA = {"unspecified": 0, "assocalpha": 1, "unassalpha": 2}
LUMA = np.array([0.299, 0.587, 0.114])


def tiff(values, **how) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file.getvalue()


def bands(values, planar="contig", photometric="minisblack", extra=None) -> bytes:
    """Encode (h, w, k) as a TIFF; `extra` is the meaning of each sample that is not a colour."""
    k, colours = values.shape[2], 3 if photometric == "rgb" else 1
    stored = values[..., 0] if k == 1 else values if planar == "contig" else np.moveaxis(values, -1, 0)
    more = [extra or "unspecified", *["unspecified"] * (k - colours - 1)][: k - colours]
    return tiff(stored, photometric=photometric, planarconfig=planar if k > 1 else None, extrasamples=more)


def random_values(dtype, k, seed=0):
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind == "f":
        return rng.random((3, 5, k)).astype(dtype), (0.0, 1.0)
    ends = np.iinfo(dtype)
    return rng.integers(ends.min, ends.max, (3, 5, k), dtype, endpoint=True), (float(ends.min), float(ends.max))


def scaled(values, low, high):
    return (values.astype(float) - low) / (high - low) * 255


def read(data, channels, levels=None):
    with ImageFile(data, lambda: "the file", channels, levels) as picture:
        return picture.tensor().permute(1, 2, 0).numpy().astype(float)


def expected(values, range_, photometric, extra, channels):
    """Return the pixels by the tags, from 0 to 255; None if the file does not have so many channels."""
    k, colours = values.shape[2], 3 if photometric == "rgb" else 1
    pixels = values.astype(float) if values.dtype == np.uint8 else scaled(values, *range_)
    if photometric == "miniswhite":
        pixels[..., :colours] = 255 - pixels[..., :colours]
    if channels == k:
        return pixels
    if channels not in (1, 3) or k - colours > 1 or (k > colours and not EXTRA[extra]):
        return None
    if k > colours:
        # alpha covers its whole type, whatever the levels: a signed one from 0
        top = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        alpha = np.clip(scaled(values[..., -1:], 0, top), 0, 255)
        veil, pixels = 255 - alpha, pixels[..., :colours]
        pixels = np.minimum(pixels, alpha) + veil if EXTRA[extra] == 1 else pixels * alpha / 255 + veil
    if channels == colours:
        return pixels
    return np.repeat(pixels, 3, 2) if channels == 3 else (pixels @ LUMA)[..., None]


def check(cases):
    """Read each case as its own number of channels, as RGB and as grey, and compare it with NumPy."""
    read_count = refused = 0
    for dtype, k, planar, photometric, extra in cases:
        values, range_ = random_values(dtype, k)
        data = bands(values, planar, photometric, extra)
        for channels in {k, 3, 1}:
            right = expected(values, range_, photometric, extra, channels)
            what = (dtype, k, planar, photometric, extra, channels)
            if right is None:
                with pytest.raises(DataError, match=f"has {k} channels, {channels} were"):
                    read(data, channels, range_)
                refused += 1
                continue
            far = np.abs(read(data, channels, range_) - right).max()
            assert far <= 2.01, what  # of 255: one for the levels, one for the alpha
            read_count += 1
            if values.dtype.kind == "u" and values.dtype.itemsize <= 2:  # the range is known without levels
                assert np.abs(read(data, channels) - right).max() <= 3, what
            elif channels == k:
                with pytest.raises(DataError, match="no known range"):
                    read(data, channels)
    return read_count, refused


def grid(types):
    for dtype, k, planar, photometric in itertools.product(
        types, range(1, 6), ("contig", "separate"), ("minisblack", "miniswhite", "rgb")
    ):
        colours = 3 if photometric == "rgb" else 1
        if k >= colours and (k > 1 or planar == "contig"):
            for extra in EXTRA if k > colours else (None,):
                yield dtype, k, planar, photometric, extra


class TestGrid:
    def test_a_part_of_it(self):
        assert check(itertools.islice(grid(TYPES), 0, None, 23)) > (40, 30)

    @pytest.mark.slow
    def test_random_tiff_files_are_read_exactly(self):
        assert check(grid(TYPES)) > (1000, 500)

    def test_every_type_of_one_band(self):
        cases = [(t, 1, "contig", p, None) for t in TYPES for p in ("minisblack", "miniswhite")]
        assert check(cases) == (2 * 2 * len(TYPES), 0)

    def test_pairs_and_four_bands_of_every_layout(self):
        """The cases that Pillow reads, wrongly."""
        whole = [
            (t, k, planar, "minisblack" if k == 2 else "rgb", extra)
            for t, k, planar, extra in itertools.product(("u1", "u2"), (2, 4), ("contig", "separate"), EXTRA)
        ]
        check([*whole, ("u2", 3, "separate", "rgb", None)])

    def test_requested_channels_select_bands_without_colour(self):
        """A grey image converts to RGB, three bands of which two are extra do not convert to grey."""
        with pytest.raises(DataError, match=r"has 3 channels, 1 were requested \(a run with --set channels=3"):
            read(bands(random_values("u1", 3)[0]), 1)


class TestSamples:
    def test_unsigned_32_bits_of_any_size(self):
        values = np.array([[0, 2**31 - 1, 2**31, 2**32 - 1]], np.uint32)
        for order in "<>":
            assert read(tiff(values, byteorder=order), 1, (0, 2**32 - 1)).ravel().tolist() == [0, 127, 128, 255]

    def test_signed_bytes(self):
        values = np.array([[-128, -1, 0, 127]], np.int8)
        assert read(tiff(values), 1, (-128, 127)).ravel().tolist() == [0, 127, 128, 255]
        with pytest.raises(DataError, match=r"int8 values have no known range.*--set levels"):
            read(tiff(values), 1)

    def test_twelve_bits_keep_their_upper_eight(self):
        """Two values of 12 bits in three bytes, as scanners write them."""
        data = bytearray(tiff(np.zeros((1, 6), np.uint8)))
        for tag, value in ((256, 4), (258, 12), (279, 6)):  # width, bits, bytes
            place = next(data.index(struct.pack("<HH", tag, t)) for t in (3, 4) if struct.pack("<HH", tag, t) in data)
            data[place + 8 : place + 12] = struct.pack("<I", value)
        start = struct.unpack_from("<I", data, data.index(struct.pack("<HHI", 273, 4, 1)) + 8)[0]
        data[start : start + 6] = bytes.fromhex("0007ff800fff")
        with ImageFile(bytes(data), lambda: "the file", 1) as picture:
            assert (picture.bits, picture.white) == (12, 4095)
            assert picture.tensor().flatten().tolist() == [0, 0x7F, 0x80, 0xFF]
        assert read(bytes(data), 1, (0, 4095)).ravel().tolist() == [0, 127, 128, 255]

    def test_one_bit_of_several_planar_bands(self):
        values = np.random.default_rng(0).integers(0, 2, (2, 8, 9)).astype(bool)
        data = tiff(values, photometric="minisblack", planarconfig="separate")
        assert (read(data, 2) == 255 * np.moveaxis(values, 0, -1)).all()

    def test_no_levels_are_advised_for_inverted_files(self, tmp_path):
        """Their pixels do not show the range of the numbers in the file."""
        values = np.random.default_rng(0).integers(0, 4096, (3, 6, 7)).astype(np.uint16)
        for i, (value, name) in enumerate(zip(values, ("minisblack", "miniswhite", "miniswhite"), strict=True)):
            (tmp_path / f"{i}.tif").write_bytes(tiff(value, photometric=name))
        assert survey_data(tmp_path, settings={"channels": 1})["levels"] is None
        (tmp_path / "1.tif").unlink()
        (tmp_path / "2.tif").write_bytes(tiff(values[2], photometric="minisblack"))
        assert survey_data(tmp_path, settings={"channels": 1})["levels"] == [0, 4095]

    def test_colours_that_are_not_rgb_are_refused_by_name(self):
        for name, k, dtype in (("separated", 4, np.uint16), ("cielab", 3, np.uint16)):
            data = tiff(np.zeros((3, 4, k), dtype), photometric=name)
            with pytest.raises(DataError, match=r"channels, 3 were requested|colours are CIE L\*a\*b\* of 16 bits"):
                read(data, 3, (0, 4095))

    def test_files_that_pillow_supports_need_no_tifffile(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tifffile", None)
        for dtype in ("<u1", "<u2", "<i2", "<u4", "<i4", "<f4"):
            values, range_ = random_values(dtype, 1)
            data = io.BytesIO()
            with monkeypatch.context() as writing:
                writing.setitem(sys.modules, "tifffile", tifffile)
                tifffile.imwrite(data, values[..., 0])
            assert np.abs(read(data.getvalue(), 1, range_) - scaled(values, *range_)).max() <= 1
        for values in (np.zeros((3, 4), np.int8), np.zeros((3, 4, 2), np.uint8)):
            with pytest.raises(DataError, match=r'need tifffile: python -m pip install "inbatch\[tiff\]"'):
                read(tiff(values, photometric="minisblack", planarconfig="contig" if values.ndim > 2 else None), 1)


class TestPages:
    """Pages of one size are channels if their number is requested."""

    STACK = np.random.default_rng(1).integers(0, 256, (13, 5, 7), np.uint8)

    def test_pages_as_channels(self):
        for dtype, levels in ((np.uint8, None), (np.uint16, (0.0, 255.0)), (np.float32, (0.0, 255.0))):
            data = tiff(self.STACK.astype(dtype), photometric="minisblack")
            assert (read(data, 13, levels) == np.moveaxis(self.STACK, 0, -1)).all()
        pairs = tiff(np.moveaxis(self.STACK[:12].reshape(6, 2, 5, 7), 1, -1), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
        assert (read(pairs, 12) == np.moveaxis(self.STACK[:12], 0, -1)).all()
        white = tiff(self.STACK, photometric="miniswhite")
        assert (read(white, 13) == 255 - np.moveaxis(self.STACK, 0, -1)).all()

    def test_the_first_of_them_for_grey_and_rgb(self):
        data = tiff(self.STACK, photometric="minisblack")
        for channels in (1, 3):
            assert (read(data, channels) == self.STACK[0][..., None]).all()

    def test_wrong_number_of_channels_is_refused_with_the_right_one(self):
        data = tiff(self.STACK, photometric="minisblack")
        with pytest.raises(DataError, match=r"1 channels on each of 13 pages, 12 were.*--set channels=13 reads"):
            read(data, 12)

    def test_pages_of_different_sizes_are_not_channels(self):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for page in (self.STACK[0], self.STACK[1, :4], self.STACK[2].astype(np.uint16)):
                writer.write(page, photometric="minisblack")
        with pytest.raises(DataError, match="1 channels, 13 were requested, and its 3 pages differ in size or type"):
            read(file.getvalue(), 13)

    def test_reduced_copies_and_masks_are_not_pages(self, tmp_path):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            for page in self.STACK[:4]:
                writer.write(page, photometric="minisblack")
            writer.write(self.STACK[0, ::2, ::2], photometric="minisblack", subfiletype=1)
        data = (tmp_path / "a.tif").read_bytes()
        assert (read(data, 4) == np.moveaxis(self.STACK[:4], 0, -1)).all()
        for channels, pages in ((1, 4), (4, 1)):
            with ImageFile(data, lambda: "the file", channels) as picture:
                assert picture.pages() == pages and picture.tensor().shape[0] == channels

    def test_over_the_limit_together(self, monkeypatch):
        data = tiff(self.STACK, photometric="minisblack")  # 13 pages of 35 values
        monkeypatch.setattr("inbatch.data.decoding.image_file.MAX_PIXELS", 13 * 35 // 3)
        with pytest.raises(DataError, match="7x5 pixels of 0 MB are over the limit"):
            read(data, 13)
        assert read(data, 1).shape == (5, 7, 1)

    def test_a_damaged_later_page_does_not_matter_to_the_first(self):
        data = tiff(self.STACK, photometric="minisblack")
        for cut in range(len(data) // 2, len(data), 97):
            try:
                with ImageFile(data[:cut], lambda: "the file", 1) as picture:
                    assert 1 <= picture.pages() <= 13 and picture.tensor()[0].tolist() == self.STACK[0].tolist()
            except DataError as error:
                assert "cannot be read" in str(error)

    def test_reported(self, tmp_path):
        for i in range(3):
            tifffile.imwrite(tmp_path / f"{i}.tif", np.roll(self.STACK, i, 0), photometric="minisblack")
        frames = [Image.fromarray(page) for page in self.STACK[:4]]
        frames[0].save(tmp_path / "4.webp", save_all=True, append_images=frames[1:], lossless=True)
        report = survey_data(tmp_path)
        assert report["pages"] == {"4": 1, "13": 3}
        assert dict(report_rows(report))["pages"] == "1 file of 4 pages, 3 files of 13 pages: the first is read"
        assert any("--set channels=N" in note for note in notes(report))
        (tmp_path / "4.webp").unlink()
        report = survey_data(tmp_path, settings={"channels": 13})
        assert report["pages"] == {} and report["channels"] == 13 and not report["unreadable"]
        assert open_data(tmp_path, channels=13).image(0).shape == (13, 5, 7)
