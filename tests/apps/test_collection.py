"""Features of a collection: computed once, kept, read from files, and matched with their images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch import embed_run, find_duplicates, find_label_errors, find_outliers, search_images, select_images
from inbatch.apps.collection import features
from inbatch.apps.collection.features import open_collection
from inbatch.apps.collection.images import open_images
from inbatch.apps.collection.output_files import write_list
from inbatch.data import Source, open_data
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, write_embeddings
from inbatch.evaluation.feature_table import read_features
from inbatch.evaluation.neighbours import nearest, nearest_others
from inbatch.models import create_encoder, save_encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 12 images in two splits and two classes, the last of them unreadable."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        folder = root / ("train" if i < 8 else "test") / ("cats" if i % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{i:02d}.png")
    (root / "test" / "dogs" / "99.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_encoder(create_encoder("tiny", size=20), folder)
    return folder


def _refuse(source: Source, i: int, name: str) -> torch.Tensor:
    """Read an image as `Source.image`; DataError for that of one name."""
    if source.identity(i) == name:
        raise DataError(f"{name!r} needs a decoder")
    with source.open(i) as picture:
        return picture.tensor()


def test_features_of_an_encoder_are_kept_until_images_or_weights_change(
    photos: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mine = tmp_path / "encoder", tmp_path / "photos"
    shutil.copytree(encoder, folder)
    shutil.copytree(photos, mine)
    first = open_collection(folder, mine)
    kept = Path(first.origin["file"])
    written = kept.stat().st_mtime_ns
    again = open_collection(folder, mine)
    assert kept.stat().st_mtime_ns == written and torch.equal(first.vectors, again.vectors)
    assert len(again) == 12 and again.unreadable == first.unreadable and len(again.unreadable) == 1
    assert set(again.splits) == {"train", "test"} and again.classes == ("cats", "dogs")
    for i in range(12):
        assert np.array_equal(again.image(i), np.array(Image.open(again.file_of(i))).transpose(2, 0, 1))
        assert again.class_of(i) == Path(again.paths[i]).parts[0] == again.row(i)["class"]
    with monkeypatch.context() as patch:  # an image that needs a decoder
        patch.setattr(Source, "image", lambda self, i: _refuse(self, i, "dogs/02.png"))
        kept.unlink()
        assert len(open_collection(folder, mine)) == 11 and len(open_collection(folder, mine).unreadable) == 2
    decoded = open_collection(folder, mine)
    assert torch.equal(decoded.vectors, first.vectors) and decoded.unreadable == first.unreadable
    assert not decoded.origin["reused"] and open_collection(folder, mine).origin["reused"]
    with monkeypatch.context() as patch:  # pixels may differ
        patch.setattr(features, "decoders", lambda: "another version")
        assert not open_collection(folder, mine).origin["reused"]
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(mine / "train" / "dogs" / "00.png")
    assert open_collection(folder, mine).origin["file"] != str(kept)
    kept.with_suffix(".json").write_text("damaged")
    shutil.copytree(photos, mine, dirs_exist_ok=True)
    save_encoder(create_encoder("tiny", size=20), folder)
    assert open_collection(folder, mine).origin["file"] != str(kept)


def test_a_file_of_features_gives_the_same_collection(photos: Path, encoder: Path, tmp_path: Path) -> None:
    computed = open_collection(encoder, photos)
    for ending in ("npz", "parquet"):
        file, parts = tmp_path / f"features.{ending}", []
        for split in ("train", "test"):
            here = torch.tensor([one == split for one in computed.splits])
            at = here.nonzero()[:, 0]
            names = tuple(computed.paths[i] for i in at)
            part = Embeddings(computed.vectors[at], computed.labels[at], names, "photos", "pooled", computed.index[at])
            parts.append(replace(part, split=split, classes=computed.classes))
        write_embeddings(file, parts)
        read = open_collection(file, photos)
        assert torch.equal(read.vectors, computed.vectors) and torch.equal(read.labels, computed.labels)
        assert (read.paths, read.splits, read.classes) == (computed.paths, computed.splits, computed.classes)
        assert torch.equal(read.image(9), computed.image(9))
        assert set(open_collection(file, split="test").splits) == {"test"}
        with pytest.raises(DataError, match="without their images"):
            open_collection(file).image(0)
        with pytest.raises(DataError, match="no split 'val', only train, test"):
            open_collection(file, split="val")
        (tmp_path / "other").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(tmp_path / "other" / "a.png")
        with pytest.raises(DataError):
            open_collection(file, tmp_path / "other")
        assert "lacks 1 image of the data" in read.notes[0]  # the unreadable one
    rest = Embeddings(part.vectors[1:], part.labels[1:], names[1:], "photos", "pooled", part.index[1:])
    write_embeddings(tmp_path / "fewer.npz", [replace(rest, split="test", classes=computed.classes)])
    assert "fewer.npz lacks 2 images of the data" in open_collection(tmp_path / "fewer.npz", photos).notes[0]


def test_a_list_of_images_is_read_by_data(photos: Path, encoder: Path, tmp_path: Path) -> None:
    collection = open_collection(encoder, photos)
    rows = [11, 2, 5]
    assert write_list(tmp_path / "list.csv", collection, rows, {"rank": [1, 2, 3]}) == 3
    source = open_data(tmp_path / "list.csv", "test")
    assert len(source) == 1 and torch.equal(source.image(0), collection.image(11))
    assert source.classes[int(source.labels[0])] == collection.class_of(11)
    with pytest.raises(ConfigError, match=r"ends in \.csv"):
        write_list(tmp_path / "list.txt", collection, rows)
    array = tmp_path / "images.npy"
    np.save(array, np.zeros((3, 20, 20, 3), np.uint8))
    with pytest.raises(DataError, match="no files of their own"):
        write_list(tmp_path / "list.csv", open_collection(encoder, array), [0])
    (tmp_path / "named" / "null").mkdir(parents=True)
    shutil.copytree(photos / "train", tmp_path / "named", dirs_exist_ok=True)
    shutil.copy(photos / "train" / "cats" / "01.png", tmp_path / "named" / "null")
    unlabelled, keep = open_images(tmp_path / "named", None, None, None, "cpu", True), tmp_path / "keep.csv"
    for write in (
        lambda: find_duplicates(tmp_path / "named", write=keep), lambda: write_list(keep, unlabelled, range(9)),
        lambda: select_images(encoder, tmp_path / "named", count=1, write=keep),
        lambda: find_outliers(encoder, tmp_path / "named", count=1, write=keep),
        lambda: find_label_errors(encoder, tmp_path / "named", write=keep),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"has the class 'null', .*; rename the class"):
            write()
        assert not keep.exists()
    assert write_list(keep, unlabelled, range(8)) == 8  # without the image of this class


def test_features_that_cannot_be_used_are_refused(photos: Path, encoder: Path, tmp_path: Path) -> None:
    for name, error, words in (
        ("missing.npz", DataError, "does not exist"), ("a.txt", ConfigError, "not the folder"),
        ("empty", ConfigError, "neither recipe"),
    ):  # fmt: skip
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(error, match=words):
            open_collection(tmp_path / name)
    with pytest.raises(ConfigError, match="no images of its own"):
        open_collection(encoder)
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "nan.npz", path=np.array(["a"]), vector=np.full((1, 2), np.nan, np.float32))
    np.savez(tmp_path / "narrow.npz", path=np.array(["a", "b"]), vector=np.zeros((2, 0), np.float32))
    np.savez(tmp_path / "uneven.npz", path=np.array(["a", "b"]), vector=np.zeros((1, 2), np.float32))
    for name, words in (
        ("damaged", "cannot be read"),
        ("other", "path and vector"),
        ("nan", "NaN"),
        ("uneven", "no features"),
        ("narrow", "no features"),
    ):
        with pytest.raises(DataError, match=words):
            read_features(tmp_path / f"{name}.npz")
    np.savez_compressed(tmp_path / "packed.npz", path=np.array(["a"]), vector=np.ones((1, 2)))
    assert read_features(tmp_path / "packed.npz").vectors.tolist() == [[1.0, 1.0]]


def test_unreadable_images_are_named_if_no_other_is_there(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 1 image can be read: .*a\.png"):
        open_collection(encoder, tmp_path / "photos")
    assert not [*(encoder / "features").glob("*.npz.*")]


def test_messages_name_the_data(photos: Path, encoder: Path) -> None:
    assert open_collection(encoder, photos).name == str(photos)


def test_neighbours_are_those_of_a_sort() -> None:
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(rows, dim=1)
    similarity = unit @ unit.T
    expected = similarity.sort(dim=1, descending=True)
    near, place = nearest(rows, rows, 7)
    assert torch.equal(place, expected.indices[:, :7])
    torch.testing.assert_close(near, expected.values[:, :7])
    assert torch.equal(nearest_others(rows, 6)[1], place[:, 1:])
    for k, words in ((0, "choose 1"), (300, "1 to 299")):
        with pytest.raises(ConfigError, match=words):
            nearest_others(rows, k)
    with pytest.raises(DataError, match="one encoder"):
        nearest(rows[:, :4], rows, 2)
    with pytest.raises(DataError, match="NaN"):
        nearest(rows * float("nan"), rows, 2)


def test_origin_is_json(photos: Path, encoder: Path) -> None:
    assert json.loads(json.dumps(dict(open_collection(encoder, photos).origin)))["data"] == str(photos)


def test_features_that_cannot_be_kept_are_reported(photos: Path, encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("features"))
    (folder / "features").write_text("a file in place of the folder")
    collection = open_collection(folder, photos)
    assert collection.origin["file"] is None and "cannot be kept" in collection.notes[0]
    assert "1 unreadable image left out" in collection.sentences[1]
    assert not open_collection(encoder, photos).notes


def test_a_file_that_is_read_is_not_replaced(photos: Path, encoder: Path, tmp_path: Path) -> None:
    images, listed = tmp_path / "images.npz", tmp_path / "list.csv"
    np.savez(images, images=np.zeros((9, 20, 20, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None])
    write_list(listed, open_collection(encoder, photos), range(4))
    (tmp_path / "photos").mkdir()
    picture = shutil.copy(sorted(photos.glob("*/*/*.png"))[0], tmp_path / "photos" / "a.png")
    before = {file: file.read_bytes() for file in (images, listed, picture)}
    for written in (
        lambda: embed_run(encoder, images, images), lambda: find_duplicates(listed, write=listed),
        lambda: select_images(encoder, photos, count=1, labelled=listed, write=listed),
        lambda: find_outliers(encoder, listed, count=1, write=listed),
        lambda: find_duplicates(picture.parent, picture=picture),
        lambda: search_images(encoder, picture, photos, out=picture),
        lambda: search_images(encoder, picture.parent, photos, out=picture),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="would replace"):
            written()
    assert {file: file.read_bytes() for file in before} == before
