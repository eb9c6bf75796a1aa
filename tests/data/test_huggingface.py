"""Hugging Face datasets, written by the datasets library."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch.data import OPENERS, Loader, open_data, splits
from inbatch.data.views import View, Views
from inbatch.errors import DataError

datasets = pytest.importorskip("datasets")

CLASSES = ["cat", "dog", "eel"]


def encoded(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 7, 9)).save(file, "PNG")
    return file.getvalue()


def table(n=6, image="image", label="label", images=None, **more):
    images = images or [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(n)]
    columns, kinds = {image: images}, {image: datasets.Image()}
    if label:
        columns[label], kinds[label] = [i % 3 for i in range(n)], datasets.ClassLabel(names=CLASSES)
    for name, (values, kind) in more.items():
        columns[name], kinds[name] = values, kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(root: Path, dataset) -> Path:
    dataset.save_to_disk(str(root))
    return root


class TestSaved:
    def test_a_dataset(self, tmp_path):
        source = open_data(saved(tmp_path, table()))
        assert len(source) == 6 and source.classes == tuple(CLASSES) and source.labels.tolist() == [0, 1, 2] * 2
        assert [source.image(i)[:, 0, 0].tolist() for i in (5, 0)] == [[5, 7, 9], [0, 7, 9]]
        assert source.identity(4) == "4.png" and source.image(0).shape == (3, 10, 12)
        assert "6 images, 3 classes" in source.report() and splits(tmp_path) == ("train",)

    def test_every_split_and_test_by_any_of_its_names(self, tmp_path):
        parts = {"validation": table(4), "unsupervised": table(3, label=None), "train": table(9)}
        saved(tmp_path, datasets.DatasetDict(parts))
        assert splits(tmp_path) == ("train", "val", "unsupervised")
        sources = {split: open_data(tmp_path, split) for split in (*splits(tmp_path), "test", "validation")}
        assert sources["validation"].signature() == sources["val"].signature()
        assert [len(sources[s]) for s in ("train", "test", "unsupervised")] == [9, 4, 3]
        assert sources["test"].classes == sources["train"].classes and sources["unsupervised"].classes == ()

    def test_rows_that_were_chosen_and_shuffled_come_in_their_order(self, tmp_path):
        source = open_data(saved(tmp_path, table().shuffle(seed=1).select(range(4))))
        again = datasets.load_from_disk(str(tmp_path))
        assert [source.identity(i) for i in range(4)] == [
            row["image"]["path"] for row in again.cast_column("image", datasets.Image(decode=False))
        ]

    @pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("photo", "species"), ("image", "labels")])
    def test_columns_by_their_feature_or_their_name(self, tmp_path, image, label):
        source = open_data(saved(tmp_path, table(image=image, label=label)))
        assert source.classes == tuple(CLASSES) and source.image(3)[0, 0, 0] == 3

    def test_several_columns_of_images(self, tmp_path):
        mask = ([{"bytes": encoded(200), "path": None}] * 6, datasets.Image())
        assert open_data(saved(tmp_path / "a", table(mask=mask))).image(2)[0, 0, 0] == 2
        with pytest.raises(DataError, match=r"left \(Image\), mask \(Image\): .* with image_column"):
            open_data(saved(tmp_path / "b", table(image="left", label=None, mask=mask)))

    def test_plain_integers_as_labels_and_unknown_ones(self, tmp_path):
        kinds = {"labels": ([2, 0, -1, 1, 1, 0], datasets.Value("int64"))}
        source = open_data(saved(tmp_path / "a", table(label=None, **kinds)))
        assert source.labels.tolist() == [2, 0, -1, 1, 1, 0] and source.classes == ("0", "1", "2")
        words = {"labels": (list("abcaef"), datasets.Value("string"))}
        source = open_data(saved(tmp_path / "b", table(label=None, **words)))
        assert source.labels.tolist() == [0, 1, 2, 0, 3, 4] and source.classes == tuple("abcef")

    def test_images_are_read_on_request_and_the_pickled_source_is_small(self, tmp_path):
        dataset = table(300, images=[{"bytes": encoded(i % 256) + bytes(20_000), "path": None} for i in range(300)])
        source = open_data(saved(tmp_path, dataset))
        pickled = pickle.dumps(source)
        assert len(pickled) < 20_000 + 8 * 300
        assert torch.equal(pickle.loads(pickled).image(77), source.image(77)) and source.identity(5) == "row 5"

    def test_streamed_by_workers(self, tmp_path):
        source = open_data(saved(tmp_path, table(8)))
        views = Views([View(size=8)], (0.5,) * 3, (0.2,) * 3)
        seen = {}
        for workers in (0, 2):
            loader = Loader(source, batch=4, views=views, seed=1, resident=False, workers=workers)
            seen[workers] = torch.cat([batch.crops[0] for batch in loader.epoch(0)])
        assert torch.equal(seen[0], seen[2])

    def test_fingerprints(self, tmp_path):
        a, b = (open_data(saved(tmp_path / name, table())).fingerprint() for name in "ab")
        assert a and b and a != b and a == open_data(tmp_path / "a").fingerprint()
        rows = datasets.load_from_disk(tmp_path / "a")
        parts = [open_data(rows.select(range(*ends))).fingerprint() for ends in ((0, 3), (3, 6))]
        assert len({a, *parts}) == 3, "slices of a table are different images"

    def test_empty_and_damaged(self, tmp_path):
        with pytest.raises(DataError, match="has no rows"):
            open_data(saved(tmp_path / "empty", table(0, label=None, images=[])))
        saved(tmp_path / "a", table())
        (file,) = (tmp_path / "a").glob("*.arrow")
        file.write_bytes(file.read_bytes()[:300])
        with pytest.raises(DataError, match="cannot be read as a saved dataset"):
            open_data(tmp_path / "a")
        saved(tmp_path / "b", table())
        (tmp_path / "b" / "state.json").write_text("{")
        with pytest.raises(DataError, match=r"state.json' cannot be read"):
            open_data(tmp_path / "b")

    def test_a_row_without_an_image_is_named(self, tmp_path):
        source = open_data(saved(tmp_path, table(images=[None] + [{"bytes": b"?", "path": "x.png"}] * 5)))
        with pytest.raises(DataError, match=r"'row 0' of .* holds no image"):
            source.open(0)
        with pytest.raises(DataError, match=r"'x.png' cannot be read: not one of"):
            source.open(1)


class TestOutside:
    """Image files outside the table."""

    def rows(self, root: Path, *paths: str):
        source = open_data(saved(root, table(len(paths), label=None)))
        rows = [{"image": {"bytes": None, "path": path}} for path in paths]
        kinds = datasets.Features({"image": datasets.Image(decode=False)})
        source.rows = datasets.Dataset.from_list(rows, features=kinds)
        return source

    def test_paths_in_the_folder_and_absolute_paths_are_read(self, tmp_path):
        root = tmp_path / "set"
        source = self.rows(root, "pictures/a.png", str(tmp_path / "b.png"))
        (root / "pictures").mkdir()
        (root / "pictures" / "a.png").write_bytes(encoded(11))
        (tmp_path / "b.png").write_bytes(encoded(22))
        assert [int(source.image(i)[0, 0, 0]) for i in range(2)] == [11, 22]
        assert source.fingerprint() is None  # the table does not record their changes

    @pytest.mark.parametrize("path", ["../secret.png", "link.png", "https://example.org/a.png", "zip://a.png::b.zip"])
    def test_paths_that_leave_the_folder_are_refused(self, tmp_path, path):
        (tmp_path / "secret.png").write_bytes(encoded(1))
        source = self.rows(tmp_path / "set", path)
        (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
        with pytest.raises(DataError, match="not in its folder"):
            source.open(0)

    def test_tables_and_splits_elsewhere(self, tmp_path):
        saved(tmp_path / "a", table())
        state = json.loads((tmp_path / "a" / "state.json").read_text())
        state["_data_files"][0]["filename"] = "../b/data.arrow"
        (tmp_path / "a" / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match="a table that is not in its folder"):
            open_data(tmp_path / "a")
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["../a"]}')
        with pytest.raises(DataError, match="names no splits, or splits without a folder"):
            splits(tmp_path)


class TestHub:
    def test_missing_data_set_is_not_downloaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(DataError, match="hf/nobody/nothing is not on this machine: fetch it with --download"):
            open_data("hf/nobody/nothing")
        assert not datasets.config.HF_HUB_OFFLINE  # as before
        with pytest.raises(DataError, match="not a data set on the Hugging Face hub"):
            open_data("hf/../../etc")

    @pytest.mark.slow
    def test_from_the_caches_of_this_machine(self, tmp_path):
        """Files that the hub's client fetched; in another process, as the library reads the cache location once."""
        place = tmp_path / "hub" / "datasets--me--toy"
        files = place / "snapshots" / ("a" * 40)
        (files / "data").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("a" * 40)
        table(5).to_parquet(str(files / "data" / "train-00000-of-00001.parquet"))
        table(3).to_parquet(str(files / "data" / "test-00000-of-00001.parquet"))
        code = (
            "import socket\n"
            "def no(*_): raise SystemExit('it tried to connect')\n"
            "socket.socket.connect = no\n"
            "from inbatch.data import open_data, splits\n"
            "s = open_data('hf/me/toy', 'test')\n"
            "print(splits('hf/me/toy'), len(s), s.classes, s.image(2)[:, 0, 0].tolist(), s.name)\n"
        )
        env = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        env.pop("HF_DATASETS_CACHE", None)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == "('train', 'test') 3 ('cat', 'dog', 'eel') [2, 7, 9] hf/me/toy (test)", (
            done.stderr
        )


def test_other_kinds_of_data_are_left_to_other_sources(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "state.json").write_text("{}")
    assert len(open_data(tmp_path)) == 1
    assert any("hf/NAME" in kind for kind in OPENERS)
