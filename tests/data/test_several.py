"""Several paths and patterns as one data set."""

import os
import pickle

import numpy as np
import pytest
import torch
from test_sources import encoded, fill, picture, write_parquet
from test_webdataset import pictures, shard

from inbatch.data import open_data, splits
from inbatch.errors import ConfigError, DataError
from inbatch.runtime.path_list import joined_paths
from inbatch.training.resolve import resolve_recipe


def identities(source):
    return [source.identity(i) for i in range(len(source))]


@pytest.fixture
def sites(tmp_path, monkeypatch):
    """Return a folder of two labelled sets and one without labels, as the current directory."""
    fill(tmp_path, "s1/cat/1.png", "s1/dog/2.png", "s2/dog/1.png", "s2/emu/1.png", "flat/1.png", "flat/2.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_classes_of_several_folders_are_merged_by_name(sites):
    source = open_data(["s1", "s2", "flat"])
    assert source.classes == ("cat", "dog", "emu") and source.labels.tolist() == [0, 1, 1, 2, -1, -1]
    assert (
        identities(source)[:3] == ["s1/cat/1.png", "s1/dog/2.png", "s2/dog/1.png"]
        and identities(source)[-1] == "flat/2.png"
    )
    assert torch.equal(source.image(2), open_data("s2").image(0))
    text = os.pathsep.join(["s1", "s2", "flat"])
    assert open_data(text).signature() == source.signature() and source.fingerprint() == open_data(text).fingerprint()
    assert "s1: 2 images" in source.report() and f"{text}: 6 images, 3 classes" in source.report()
    back = pickle.loads(pickle.dumps(source))
    assert back.identity(5) == "flat/2.png" and torch.equal(back.image(5), source.image(5))


def test_the_recipe_keeps_them_as_one_text(sites):
    recipe, source = resolve_recipe(joined_paths(["s1", "flat"]), {})
    assert recipe.data == f"s1{os.pathsep}flat" and len(open_data(recipe.data)) == len(source) == 4
    moved = sites / "moved"
    moved.mkdir()
    for name in ("s1", "flat"):
        (sites / name).rename(moved / name)
    assert open_data([moved / "s1", moved / "flat"]).signature() == source.signature()  # of the content, not its place


def test_splits_of_several_folders(sites):
    fill(sites, "a/train/cat/1.png", "a/train/dog/1.png", "a/test/dog/1.png", "a/test/cat/1.png")
    assert splits(["a", "flat"]) == ("train", "test")
    assert open_data(["a", "s1"], "test").labels.tolist() == [0, 1] and len(open_data(["a", "s1"])) == 4
    fill(sites, "b/train/cat/1.png", "b/train/dog/1.png", "b/test/emu/1.png", "b/test/cat/1.png")
    with pytest.raises(DataError, match="classes that the train split lacks: emu"):
        open_data(["a", "b"], "test")


def test_patterns(sites):
    for pattern, names, classes in (
        ("s1/*/*.png", ["cat/1.png", "dog/2.png"], ("cat", "dog")), ("flat/*.png", ["1.png", "2.png"], ()),
        ("s?", ["s1/cat/1.png", "s1/dog/2.png", "s2/dog/1.png", "s2/emu/1.png"], ("cat", "dog", "emu")),
        ("s[2]/**/*.png", ["dog/1.png", "emu/1.png"], None), ("flat", ["1.png", "2.png"], ()),
    ):  # fmt: skip
        source = open_data(pattern)
        assert [name.removeprefix("s2/") if classes is None else name for name in identities(source)] == names
        assert classes is None or source.classes == classes


def test_patterns_of_packed_files(sites):
    images = [encoded(picture(i), "PNG") for i in range(3)]
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(sites / f"{name}.parquet", images)
        shard(sites / "tars" / f"{name}.tar", *pictures(0))
    for ending, folder in (("parquet", "."), ("tar", "tars")):
        assert len(open_data(f"{folder}/train-*.{ending}")) == 6 and splits(f"{folder}/test-*.{ending}") == ("train",)
        assert splits(f"{folder}/*.{ending}") == ("train", "test")
    assert len(open_data(["train-0.parquet", "tars/train-0.tar", "flat/1.png"])) == 7


def test_no_image_is_used_twice(sites):
    fill(sites, "flat/more/3.png")
    (sites / "flat/a.csv").write_text("path,label\n1.png,cat\n2.png,dog\n")
    write_parquet(sites / "a.parquet", [encoded(picture(), "PNG")], [0])
    for paths, why in (
        (["flat", "flat/*.png"], "1.png' is also in the folder '.*flat': leave one of them out"),
        (["flat", "flat/more/3.png"], "3.png' is also in the folder"),
        (["flat/*.png", "flat/1*"], "1.png' twice: leave out one of the paths or patterns"),
        (["flat/1.png", "s1/../flat/1.png"], "1.png' twice"),
        (["flat/a.csv", "flat/a.csv"], "a.csv' twice"),
        (["a.parquet", "a*.parquet"], "a.parquet' twice"),
    ):
        with pytest.raises(DataError, match=why):
            open_data(paths)
    assert len(open_data(["flat/*.png", "flat/more", "s1/cat/1.png", "a.parquet"])) == 5
    assert len(open_data("flat/**/**")) == 3


def test_invalid_paths_are_named(sites):
    fill(sites, "d/train/1.png", "d/test/1.png")
    np.save("x.npy", np.zeros((2, 4, 4, 1), np.uint8))
    (sites / "notes.txt").touch()
    both = {name: os.pathsep.join([name, other]) for name, other in (("s1", "s1/cat"), ("flat", "flat"))}
    for data, match in {
        "nothing*": "matches nothing: correct the pattern",
        "note*": "matches 1 path, but no image",
        os.pathsep.join(["flat", "gone"]): "'gone' does not exist",
        both["s1"]: "hold the same images",
        both["flat"]: "hold the same images",
        "d/*": "matches '.*' and '.*': training on all would include test images",
        "d/*/*.png": "training on all would include test images",
        os.pathsep.join(["flat", "x.npy"]): "have 1 and 3 channels",
    }.items():
        with pytest.raises(DataError, match=match):
            open_data(data)
    with pytest.raises(ConfigError, match="cannot be one of several paths"):
        joined_paths(["a", f"b{os.pathsep}c"])
    pair = ([1], [2])
    assert joined_paths(pair) is pair and joined_paths(None) is None and joined_paths(["a"]) == "a"
