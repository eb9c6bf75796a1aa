"""NumPy files: layouts, names, memory mapping and refused files."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from inbatch.data import open_data, splits
from inbatch.data.loader import Loader
from inbatch.data.sources import numpy_files
from inbatch.data.sources.numpy_files import NpySource
from inbatch.data.views import PRESETS, Views
from inbatch.errors import DataError

IMAGES = np.random.default_rng(0).integers(256, size=(6, 8, 9, 3), dtype=np.uint8)
GIVEN = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
LABELS = np.array([2, 0, 1, -1, 0, 2])


def all_of(source):
    return torch.stack([source.image(i) for i in range(len(source))])


class TestNpy:
    @pytest.mark.parametrize(
        ("images", "expected"),
        [
            (IMAGES, GIVEN),
            (np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)), GIVEN),
            (np.asfortranarray(IMAGES), GIVEN),
            (IMAGES[..., 0], GIVEN[:, :1]),
        ],
    )
    def test_layouts(self, images, expected, tmp_path):
        np.save(tmp_path / "x.npy", images)
        source = open_data(tmp_path / "x.npy")
        assert torch.equal(all_of(source), expected) and source.channels == expected.shape[1]
        assert source.labels.tolist() == [-1] * 6 and splits(tmp_path / "x.npy") == ("train",)
        assert [source.identity(i) for i in (0, 5)] == ["0", "5"]

    def test_images_are_read_alone_and_cannot_be_written(self, tmp_path, monkeypatch):
        np.save(tmp_path / "x.npy", IMAGES)
        before = (tmp_path / "x.npy").read_bytes()
        source = open_data(str(tmp_path / "x.npy"))
        monkeypatch.setattr(numpy_files, "_load", None)
        source.image(0).zero_()
        assert (tmp_path / "x.npy").read_bytes() == before and torch.equal(source.image(0), GIVEN[0])
        (tmp_path / "x.npy").write_bytes(before[:-9])
        assert torch.equal(source.image(4), GIVEN[4])
        with pytest.raises(DataError, match=r"x.npy' cannot be read: it has become shorter and holds no row 5"):
            source.open(5)

    def test_types_and_byte_orders(self, tmp_path):
        for images in (IMAGES.astype(">u2") * 257, IMAGES.astype("<u2") * 257):
            np.save(tmp_path / "x.npy", images)
            np.savez(tmp_path / "x.npz", images=images)
            for file in ("x.npy", "x.npz"):
                assert torch.equal(all_of(open_data(tmp_path / file)), GIVEN)

    def test_pickled_source_holds_no_pixels(self, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((1000, 32, 32, 3), np.uint8))
        source = open_data(tmp_path / "x.npy")
        sent = pickle.dumps(source)
        assert len(sent) < 20_000 and torch.equal(pickle.loads(sent).image(7), source.image(7))

    @pytest.mark.parametrize("resident", [True, False])
    def test_loader_reads_the_file(self, resident, tmp_path):
        np.save(tmp_path / "x.npy", IMAGES[:, :8, :8].repeat(2, 1).repeat(2, 2))
        views = Views(PRESETS["simclr_cifar"](size=16), (0.5,) * 3, (0.25,) * 3)
        loader = Loader(
            open_data(tmp_path / "x.npy"), batch=3, views=views, seed=0, resident=resident, workers=0 if resident else 1
        )
        assert sorted(i for batch in loader.epoch(0) for i in batch.index.tolist()) == list(range(6))

    @pytest.mark.parametrize(
        ("array", "match"),
        [
            (np.zeros((0, 3, 8, 8), np.uint8), "holds no image"),
            (np.zeros((4, 8), np.uint8), r"shape \(1, 8\) is none of"),
            (np.uint8(1), r"shape \(1,\) is none of"),
            (np.zeros((2, 8, 8), "datetime64[s]"), "x.npy': .*"),
            (np.zeros((2, 8, 8), [("a", "u1")]), "x.npy': .*"),
            (np.array([["text"]]), "x.npy': .*"),
        ],
    )
    def test_invalid_npy_files_are_refused(self, array, match, tmp_path):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=match):
            open_data(tmp_path / "x.npy")

    def test_damaged(self, tmp_path):
        np.save(tmp_path / "x.npy", IMAGES)
        whole = (tmp_path / "x.npy").read_bytes()
        for content in (b"", b"no array", whole[:40], whole[:-1]):
            (tmp_path / "x.npy").write_bytes(content)
            with pytest.raises(DataError, match=r"x.npy' cannot be read: "):
                open_data(tmp_path / "x.npy")


class TestNpz:
    @pytest.mark.parametrize(
        "names",
        ["images labels", "images y", "images targets", "x y", "x labels", "data targets", "arr_0 arr_1",
         "arr_0 labels", "x_train y_train", "train_images train_labels"],
    )  # fmt: skip
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_names(self, save, names, tmp_path):
        images, labels = names.split()
        save(tmp_path / "x.npz", **{labels: LABELS, images: IMAGES, "other": np.zeros(3)})
        source = open_data(tmp_path / "x.npz")
        assert torch.equal(all_of(source), GIVEN) and source.labels.tolist() == LABELS.tolist()
        assert source.classes == ("0", "1", "2") and source.name == str(tmp_path / "x.npz")
        assert isinstance(source, NpySource) == (save is np.savez) and len(pickle.dumps(source)) < 20_000

    def test_splits(self, tmp_path):
        keras = {"x_train": IMAGES[:4], "y_train": LABELS[:4], "x_test": IMAGES[4:], "y_test": LABELS[4:]}
        medical = {f"{k}_images": IMAGES[i : i + 2] for i, k in ((0, "train"), (2, "val"), (4, "test"))}
        medical |= {f"{k}_labels": LABELS[i : i + 2, None].astype(np.uint8) % 3 for i, k in ((0, "train"), (4, "test"))}
        for content, start in ((keras, 4), (medical, 2)):
            np.savez(tmp_path / "x.npz", **content)
            train, test = open_data(tmp_path / "x.npz"), open_data(tmp_path / "x.npz", "test")
            assert torch.equal(all_of(train), GIVEN[:start]) and torch.equal(all_of(test), GIVEN[4:])
            numbers = LABELS[:start] if start == 4 else [1, 0]  # the classes 0 and 2
            assert train.labels.tolist() == list(numbers) and test.labels.tolist() == [0, 1 + (start == 4)]
            assert test.name.endswith("x.npz (test)")

    def test_labels_of_other_splits_are_of_the_same_kind(self, tmp_path):
        content = {"x_train": IMAGES, "y_train": LABELS, "kind_train": LABELS % 2, "side": LABELS % 2}
        content |= {"x_val": IMAGES, "y_val": LABELS, "x_test": IMAGES, "y_test": LABELS, "kind_test": 1 - LABELS % 2}
        np.savez(tmp_path / "x.npz", **content)

        def labels(split, column):
            return open_data(tmp_path / "x.npz", split, label_column=column).labels.tolist()

        assert labels("test", "kind_train") == (1 - LABELS % 2).tolist()
        assert labels("val", "kind_train") == labels("test", "side") == [-1] * 6
        assert labels("test", None) == labels("test", "y_train") == labels("val", "y_train") == LABELS.tolist()
        np.savez(tmp_path / "x.npz", **{"x_train": IMAGES, "mine": LABELS, "x_test": IMAGES, "y_test": LABELS})
        assert labels("test", "mine") == LABELS.tolist()

    def test_labels_are_not_needed(self, tmp_path):
        np.savez(tmp_path / "x.npz", images=IMAGES[..., 0])
        source = open_data(tmp_path / "x.npz")
        assert source.labels.tolist() == [-1] * 6 and source.classes == () and source.channels == 1

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ({"pictures": IMAGES}, "holds pictures: name the images one of x_train, train_images, images, x"),
            ({}, "holds nothing: name the images"),
            ({"images": IMAGES, "labels": LABELS[:5]}, "labels given with the array have shape"),
            ({"images": IMAGES.astype(object)}, "cannot be read: Object arrays cannot be loaded"),
            ({"images": IMAGES, "labels": LABELS.astype(object)}, "cannot be read: Object arrays cannot be loaded"),
            ({"images": IMAGES[:, :, :, None]}, "is none of"),
        ],
    )
    def test_invalid_npz_files_are_refused(self, content, match, tmp_path):
        np.savez(tmp_path / "x.npz", **content)
        with pytest.raises(DataError, match=match):
            open_data(tmp_path / "x.npz")

    def test_channels_must_agree(self, tmp_path):
        np.savez(tmp_path / "x.npz", images=IMAGES)
        with pytest.raises(DataError, match=r"x.npz': The array's images have 3 channels, 1 were requested"):
            open_data(tmp_path / "x.npz", channels=1)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_damaged(self, save, tmp_path):
        save(tmp_path / "x.npz", images=IMAGES)
        whole = bytearray((tmp_path / "x.npz").read_bytes())
        whole[len(whole) // 2] ^= 255
        for content in (b"", b"PK no zip", bytes(whole[:300]), bytes(whole)):
            (tmp_path / "x.npz").write_bytes(content)
            with pytest.raises(DataError, match=r"x.npz' cannot be read: "):
                open_data(tmp_path / "x.npz")


class TestHostile:
    def test_a_bomb_is_refused_before_it_is_unpacked(self, tmp_path, monkeypatch):
        np.savez_compressed(tmp_path / "x.npz", images=np.zeros((1000, 64, 64, 3), np.uint8))
        assert (tmp_path / "x.npz").stat().st_size < 20_000
        monkeypatch.setattr(numpy_files, "free_bytes", lambda device: 10_000_000)
        monkeypatch.setattr(numpy_files, "_load", None)
        with pytest.raises(DataError, match=r"would unpack to 0.0 GB, 0.0 GB are free: save the images as .npy"):
            open_data(tmp_path / "x.npz")

    @pytest.mark.parametrize("shape", ["(1000000000000000000, 8, 8)", "(100000000000, 8, 8)", "(-6, 8, 9)"])
    @pytest.mark.parametrize("kind", ["npy", "npz"])
    def test_a_header_that_promises_too_much(self, kind, shape, tmp_path):
        head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        content = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(500)
        file = tmp_path / f"x.{kind}"
        if kind == "npy":
            file.write_bytes(content)
        else:
            with zipfile.ZipFile(file, "w") as opened:
                opened.writestr("images.npy", content)
        with pytest.raises(DataError, match=r"cannot be read|none of"):
            open_data(file)

    @pytest.mark.parametrize("kind", ["npy", "npz"])
    def test_no_pickle_runs(self, kind, tmp_path):
        sentinel = tmp_path / "sentinel"

        class Evil:
            def __reduce__(self):
                return os.system, (f"echo > {sentinel}",)

        array = io.BytesIO()
        np.save(array, np.array([Evil()], object), allow_pickle=True)
        for content in (pickle.dumps(Evil()), array.getvalue()):
            file = tmp_path / f"x.{kind}"
            if kind == "npy":
                file.write_bytes(content)
            else:
                with zipfile.ZipFile(file, "w") as opened:
                    opened.writestr("images.npy", content)
            with pytest.raises(DataError, match=r"cannot be read|x.npz': "):
                open_data(file)
        assert not sentinel.exists()


@pytest.mark.parametrize("name", ["one.npy", "one.npz"])
def test_numpy_file_of_one_image_is_refused_as_an_array_is(tmp_path, name):
    """Of its first row alone, (H, W, C) looks like grey images of 3 columns."""
    file, image = str(tmp_path / name), np.zeros((12, 10, 3), np.uint8)
    np.save(file, image) if name.endswith("npy") else np.savez(file, images=image)
    with pytest.raises(DataError, match=r"\(12, 10, 3\) is that of one image"):
        open_data(file)


def test_npz_members_without_the_ending_are_read(tmp_path):
    file, images = str(tmp_path / "plain.npz"), np.arange(288, dtype=np.int64).reshape(4, 6, 4, 3).astype(np.uint8)
    with zipfile.ZipFile(file, "w") as archive, archive.open("images", "w") as member:
        np.lib.format.write_array(member, images)
    assert torch.equal(open_data(file).image(3), torch.from_numpy(images[3]).permute(2, 0, 1))
