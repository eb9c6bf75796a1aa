"""Alpha as a channel, Pillow's warnings, JPEG and PGM of more than 8 bits, AVIF, HEIF, and the names of others."""

import io
import re
import struct
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
from odd_images import encoded, on_white, raw_png
from PIL import Image

from inbatch import survey_data
from inbatch.apps.reports.dataset_text import notes, report_rows
from inbatch.data import Loader, decode_all, open_data
from inbatch.data.decoding import pillow, signatures
from inbatch.data.decoding.image_file import ImageFile, decoders
from inbatch.data.sources import folder, folder_scan
from inbatch.data.views import View, Views
from inbatch.errors import DataError
from inbatch.models import create_encoder

RNG = np.random.default_rng(5)
INFRARED = RNG.integers(0, 256, (6, 8, 4), np.uint8)


def opened(data, channels=3, levels=None):
    return ImageFile(data, lambda: "the file", channels, levels)


def read(data, channels=3, levels=None):
    with opened(data, channels, levels) as picture:
        return picture.tensor().permute(1, 2, 0).numpy()


class TestAlpha:
    def test_kept_as_a_channel_on_request(self):
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
            data = encoded(INFRARED, kind, **options)
            assert (read(data, 4) == INFRARED).all(), kind
            white = on_white(INFRARED[..., :3].astype(float), INFRARED[..., 3])
            assert np.abs(read(data, 3).astype(int) - white).max() <= 1, kind
        grey = encoded(Image.fromarray(INFRARED[..., 2:], "LA"), "PNG")
        assert (read(grey, 2) == INFRARED[..., 2:]).all()
        assert (read(grey, 4)[..., 3] == INFRARED[..., 3]).all()  # grey becomes RGB, alpha stays

    def test_alpha_of_16_bits_is_scaled_by_levels(self):
        values = RNG.integers(0, 4096, (6, 8, 4)).astype(np.uint16)
        data = raw_png(16, 6, [row.astype(">u2").tobytes() for row in values], (6, 8))
        assert np.abs(read(data, 4, (0, 4095)) - values / 4095 * 255).max() <= 0.5
        assert (read(data, 4) == values >> 8).all()

    def test_image_without_alpha_is_refused(self):
        for array, kind, stored in ((INFRARED[..., :3], "PNG", 3), (INFRARED[..., 0], "PNG", 1),
                                    (INFRARED[..., :3], "WEBP", 3)):  # fmt: skip
            with pytest.raises(DataError, match=rf"{stored} channels, 4 were .*--set channels={stored} reads"):
                opened(encoded(array, kind), 4)
        with pytest.raises(DataError, match="only TIFF files give 4 channels, PNG, WebP, AVIF and HEIF with alpha"):
            opened(encoded(INFRARED[..., :3], "JPEG"), 4)

    def test_a_pillow_image_for_an_encoder_of_four_channels(self):
        encoder = create_encoder("tiny", size=20, channels=4).eval()
        assert np.allclose(encoder.embed([Image.fromarray(INFRARED)]), encoder.embed(INFRARED[None]), atol=1e-6)
        with pytest.raises(DataError, match="no alpha"):
            encoder.embed([Image.fromarray(INFRARED[..., :3])])

    def test_reported_with_how_much_is_not_opaque(self, tmp_path):
        half = INFRARED.copy()
        half[..., 3] = 255
        half[:3, :, 3] = 7
        for name, array in (("half", half), ("full", np.where(half == 7, 255, half).astype(np.uint8)),
                            ("none", INFRARED[..., :3])):  # fmt: skip
            (tmp_path / f"{name}.png").write_bytes(encoded(array, "PNG"))
        report = survey_data(tmp_path)
        assert report["alpha"]["images"] == 2 and report["alpha"]["not_opaque"] == 0.25
        assert report["alpha"]["files"] == [{"image": "full.png", "not_opaque": 0.0},
                                           {"image": "half.png", "not_opaque": 0.5}]  # fmt: skip
        assert dict(report_rows(report))["alpha"] == "2 images; 25.0% of their pixels are not opaque (laid on white)"
        assert any("half.png 50%" in note and "--set channels=4 keeps it" in note for note in notes(report))
        (remark,) = decode_all(open_data(tmp_path)).notes
        assert remark.startswith("1 image with alpha laid on white") and "--set channels=4" in remark
        (tmp_path / "none.png").unlink()
        kept = survey_data(tmp_path, settings={"channels": 4})
        assert not kept["unreadable"] and dict(report_rows(kept))["alpha"].endswith("(kept as a channel)")
        assert not notes(kept)


def corrupt_exif(kind="JPEG") -> bytes:
    """Encode an image whose EXIF describes a text that ends behind it."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 1
    data = bytearray(encoded(RNG.integers(0, 256, (8, 8, 3), np.uint8), kind, exif=exif))
    at = data.index(struct.pack("<HHI", 0x010E, 2, 14) if b"II*" in data else struct.pack(">HHI", 0x010E, 2, 14))
    data[at + 8 : at + 12] = struct.pack("<I" if b"II*" in data else ">I", 900)
    return bytes(data)


class TestWarnings:
    """Pillow's warnings are collected by image, none is shown, and the caller's filters stay as they are."""

    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(6):
            (tmp_path / f"{i}.jpg").write_bytes(corrupt_exif())
        (tmp_path / "good.png").write_bytes(encoded(INFRARED[..., :3], "PNG"))
        return tmp_path

    def test_collected_by_image(self, recwarn):
        before = warnings.filters[:], warnings.showwarning, warnings.warn
        for kind in ("JPEG", "WEBP"):
            with opened(corrupt_exif(kind)) as picture:
                picture.tensor()
            assert len(picture.warnings) == 1 and "Truncated File Read" in picture.warnings[0], kind
        with opened(encoded(INFRARED[..., :3], "PNG")) as picture:
            picture.tensor()
        assert picture.warnings == [] and not recwarn.list
        assert (warnings.filters, warnings.showwarning, warnings.warn) == before

    def test_counted_in_the_report(self, folder, recwarn):
        report = survey_data(folder)
        assert report["warnings"]["images"] == 6 and report["warnings"]["texts"] == {"Truncated File Read": 6}
        assert [one["image"] for one in report["warnings"]["files"]] == [f"{i}.jpg" for i in range(6)]
        assert dict(report_rows(report))["warnings"] == "Pillow warned about 6 images"
        assert notes(report)[-2:] == [
            "Pillow warned about 6 images: Truncated File Read",
            "Warnings were about: 0.jpg, 1.jpg, 2.jpg and 3 more (--json names all)",
        ]
        assert not recwarn.list

    def test_warnings_are_logged_once_per_run(self, folder, recwarn):
        held = decode_all(open_data(folder))
        assert held.notes == ("Pillow warned about 6 images: inbatch data counts the warnings and names the images",)
        views = Views([View(size=8)], (0.5,) * 3, (0.2,) * 3)
        for whole in (False, True):
            loader = Loader(open_data(folder), batch=7, views=views, seed=1, resident=False, workers=0, whole=whole)
            assert loader.new_remarks() == []
            list(loader.epoch(0))
            (remark,) = loader.new_remarks()
            assert "about 6 images" in remark and loader.new_remarks() == []
        assert not recwarn.list

    def test_each_thread_has_its_own_and_the_last_ends_the_redirection(self, recwarn):
        before, texts, meet = (warnings.filters[:], warnings.warn), {0: [], 1: []}, threading.Barrier(2, timeout=10)

        def read(number):
            with pillow.collected(texts[number]):
                meet.wait()
                warnings.warn(f"of this module {number}", UserWarning, stacklevel=1)  # not of Pillow: shown
                exec(f"warnings.warn('of {number}')", {"__name__": "PIL.Image", "warnings": warnings})
                meet.wait()

        threads = [threading.Thread(target=read, args=(number,)) for number in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == {0: ["of 0"], 1: ["of 1"]} and (warnings.filters, warnings.warn) == before
        shown = sorted((str(w.message), w.filename) for w in recwarn.list)
        assert shown == [(f"of this module {number}", __file__) for number in texts]


def pgm(values, kind="P5", white=4095, comment=b"# a scan\n") -> bytes:
    height, width = values.shape[:2]
    head = f"{kind}\n".encode() + comment + f"{width} {height}\n{white}\n".encode()
    if kind in ("P2", "P3"):
        return head + b"\n".join(b" ".join(b"%d" % v for v in row.ravel()) + b" # row" for row in values) + b"\n"
    return head + values.astype(">u2").tobytes()


class TestNetpbm:
    def test_levels_mean_the_numbers_of_the_file(self):
        for kind, shape in (("P5", (5, 7)), ("P2", (5, 7)), ("P6", (5, 7, 3)), ("P3", (5, 7, 3))):
            for white in (1000, 4095, 65535):
                values = RNG.integers(0, white + 1, shape)
                data, channels = pgm(values, kind, white), 1 if len(shape) == 2 else 3
                plain = read(data, channels).reshape(shape)
                assert (plain == values * 256 // (white + 1)).all(), (kind, white)  # the upper 8 of its bits
                by_levels = read(data, channels, (0, 500)).reshape(shape)
                assert np.abs(by_levels - np.clip(values / 500, 0, 1) * 255).max() <= 0.5, (kind, white)
        with opened(pgm(values[..., 0], white=4095)) as picture:
            assert (picture.bits, picture.white) == (12, 4095)

    def test_eight_bits_are_scaled_as_before(self):
        values = RNG.integers(0, 16, (5, 7)).astype(np.uint8)
        data = b"P5 7 5 15\n" + values.tobytes()
        assert (read(data, 1, (0, 4))[..., 0] == values * 17).all()

    def test_damaged_files_are_refused(self):
        values = RNG.integers(0, 4096, (5, 7))
        cases = {
            "truncated: 34 of 35 values": pgm(values)[:-2],
            "truncated: 5 of 35": pgm(values, "P2")[:45],
            "outside of 0 to 300": pgm(values, white=300),
            "outside of 0 to 4095": pgm(-values, "P2"),
            "invalid literal": pgm(values, "P2").replace(b" # row", b" row", 1),
        }
        for why, data in cases.items():
            with pytest.raises(DataError, match=f"'the file' cannot be read: .*{why}"):
                read(data, 1)

    def test_reported_levels_contain_all_values(self, tmp_path):
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        files = [pgm(RNG.integers(512, 1024, (5, 7))) for _ in range(3)]
        rows = [{"bytes": data, "path": f"{i}.pgm"} for i, data in enumerate(files)]
        parquet.write_table(arrow.table({"image": rows}), tmp_path / "train.parquet")
        report = survey_data(tmp_path, settings={"channels": 1})
        assert report["levels"] == [512, 1023] and report["bits"] == {"12": 3} and report["formats"] == {"PPM": 3}
        assert notes(report)[0].startswith("Of 12 bits a run keeps the upper 8; all values lie from 512 to 1023")


class TestPhotographsOfPhones:
    """HEIF files are read with pillow-heif, AVIF files with Pillow."""

    def test_pixels_orientation_and_alpha(self):
        pillow_heif = pytest.importorskip("pillow_heif")
        ramp = np.add.outer(np.arange(40) * 3, np.arange(60) * 2)
        photo = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1).astype(np.uint8))
        clear = photo.copy()
        clear.putalpha(Image.fromarray((np.arange(2400).reshape(40, 60) // 10).astype(np.uint8)))
        turned = Image.Exif()
        turned[0x0112] = 6

        def heif(image, **options):
            file = io.BytesIO()
            pillow_heif.from_pillow(image).save(file, quality=95, **options)
            return file.getvalue()

        def avif(image, **options):
            return encoded(image, "AVIF", quality=95, **options)

        for kind in (heif, avif):
            data = kind(photo)
            assert np.abs(read(data).astype(int) - np.array(photo)).mean() < 3, kind
            assert read(data, 1).shape == (40, 60, 1) and opened(data).pages() == 1
            assert opened(data).tensor(20).shape == (3, 13, 20)
            upright = np.rot90(np.array(photo), -1)
            with opened(kind(photo, exif=turned.tobytes())) as picture:
                assert picture.size == (60, 40)
                assert np.abs(picture.tensor().permute(1, 2, 0).numpy().astype(int) - upright).mean() < 3
            assert np.abs(read(kind(clear), 4).astype(int)[..., 3] - np.array(clear)[..., 3]).mean() < 3
            with pytest.raises(DataError, match="it has no alpha"):
                opened(data, 4)
        with pytest.raises(Image.UnidentifiedImageError):
            Image.open(io.BytesIO(heif(photo)))  # Pillow of the caller is unchanged
        assert "pillow-heif" in decoders()

    def test_a_folder_of_them(self, tmp_path):
        pillow_heif = pytest.importorskip("pillow_heif")
        for i, name in enumerate(("IMG_1.HEIC", "IMG_2.heif", "IMG_3.avif")):
            image = Image.new("RGB", (32, 24), (50 * i, 80, 90))
            if name.endswith("avif"):
                image.save(tmp_path / name)
            else:
                pillow_heif.from_pillow(image).save(tmp_path / name)
        source = open_data(tmp_path)
        assert len(source) == 3 and "skipped" not in source.report()
        colours = [source.image(i).float().mean((1, 2)) for i in range(3)]
        assert [abs(float(colour[0]) - 50 * i) < 4 for i, colour in enumerate(colours)] == [True] * 3

    def test_the_library_is_named_if_it_is_missing(self, monkeypatch):
        monkeypatch.setattr(signatures, "reads_heif", lambda: False)
        monkeypatch.setattr(folder, "EXTENSIONS", folder_scan.EXTENSIONS[:8])
        missing = r'HEIF files need pillow-heif: python -m pip install "inbatch\[heif\]"'
        with pytest.raises(DataError, match=missing):
            opened(b"\0\0\0\x1cftypheic" + bytes(60))
        assert re.search(rf"5 other files skipped \(4 \.heic, 1 \.txt; {missing}\)", left_out())
        monkeypatch.setattr(folder, "EXTENSIONS", (*folder_scan.EXTENSIONS[:8], *folder_scan.HEIF))
        assert "pip install" not in left_out()


def left_out() -> str:
    return folder.left_out(Counter({".heic": 4, ".txt": 1}))


class TestNames:
    """A file that is not read is called what it is."""

    def test_jpeg_of_other_kinds(self):
        data = encoded(INFRARED[..., :3], "JPEG")
        at = data.index(b"\xff\xc0")
        for marker, bits, name in (
            (0xC1, 12, "12 bits per value"),
            (0xC3, 16, "16 bits per value and the kind lossless"),
            (0xF7, 8, "JPEG-LS"),
        ):
            changed = data[: at + 1] + bytes([marker]) + data[at + 2 : at + 4] + bytes([bits]) + data[at + 5 :]
            with pytest.raises(DataError, match=f"it is a JPEG of .*{name}, which is not supported"):
                read(changed)
        with pytest.raises(DataError, match="JPEG header is damaged"):
            opened(data[:20])

    def test_unsupported_formats_are_named(self):
        for data, name in ((encoded(INFRARED[..., :3], "GIF"), "a GIF file, "), (b"\x93NUMPY\1\0", "a NumPy file, "),
                           (bytes(128) + b"DICM", "a DICOM file, "), (b"no image", "")):  # fmt: skip
            with pytest.raises(DataError, match=f"cannot be read: {name}not one of JPEG, PNG"):
                opened(data)
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        for data, reason in ((b"", r"it is empty \(0 bytes\)"), (pointer, "it is a pointer of Git LFS")):
            with pytest.raises(DataError, match=reason):
                opened(data)
