"""Splits by the names of folders, files, shards and columns: test images are never training images unnoticed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_sources import encoded, fill, picture, write_parquet
from test_webdataset import pictures, shard

from inbatch.data import decode_all, open_data, splits
from inbatch.data.sources.split_names import arranged, distinct, find_split, split_within
from inbatch.errors import DataError
from inbatch.training.holdout import evaluation_split
from inbatch.training.monitors.label_free import Chosen
from inbatch.training.resolve import resolve_recipe


def classes(*folders: str) -> list[str]:
    """Return the paths of two images of each of two classes in each folder."""
    return [f"{folder}/{c}/{i}.png" for folder in folders for c in "ab" for i in range(2)]


def refill(root: Path, *paths: str) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    return fill(root, *paths)


class TestNames:
    def test_words_within_names(self):
        names = {"train2017": "train", "seg_test": "test", "TRAIN-001": "train", "valSet": "val", "trainval": None}
        names |= {"station": None, "latest": None, "trainA": "train", "evaluation_3": "test", "Dev": "val"}
        names |= {"trainset": "train", "TestData": "test", "val_images": "val", "testimages": "test", "trains": None}
        assert {name: split_within(name) for name in names} == names

    def test_second_name_of_a_split_stays_unchanged(self):
        assert list(arranged(dict.fromkeys(["x", "dev", "Test", "val", "Train"]))) == [
            "train",
            "val",
            "test",
            "dev",
            "x",
        ]

    def test_any_word_finds_its_split(self):
        assert find_split("Testing", ["train", "test"]) == "test" and find_split("extra", ["train"]) is None
        assert find_split("test", ["train", "val"]) == "val" and find_split("val", ["train", "test"]) is None
        assert distinct(["train", "val", "trainval", "train+x", "a+b"]) == ["train", "val", "train+x", "a+b"]


class TestFolders:
    @pytest.mark.parametrize("names", [
        {"train": "Training", "test": "Testing"}, {"train": "Train", "test": "Test"},
        {"train": "train", "val": "valid"}, {"train": "TRAIN", "val": "Validation", "test": "eval"},
        {"train": "training", "val": "dev"}, {"train": "train", "val": "val", "test": "holdout"},
        {"train": "train2017", "val": "val2017"}, {"train": "train_images", "test": "test"},
        {"train": "seg_train", "test": "seg_test"},
    ])  # fmt: skip
    def test_splits_are_recognised_by_any_usual_name(self, names, tmp_path):
        fill(tmp_path, *classes(*names.values()))
        assert splits(tmp_path) == tuple(names)
        for split, folder in names.items():
            source = open_data(tmp_path, split)
            assert source.name == str(tmp_path / folder) and source.classes == ("a", "b") and len(source) == 4
            assert (split if split == folder else f"{split} = {folder}") in source.report()

    def test_splits_in_a_single_subfolder(self, tmp_path):
        fill(tmp_path, *classes("archive/train", "archive/test"))
        assert splits(tmp_path) == ("train", "test") and open_data(tmp_path).classes == ("a", "b")

    def test_splits_in_a_single_subfolder_at_any_depth(self, tmp_path):
        fill(tmp_path, *classes("archive/images/train", "archive/images/test"))
        assert splits(tmp_path) == ("train", "test") and len(open_data(tmp_path)) == 4

    def test_a_split_whose_only_folder_has_its_name(self, tmp_path):
        fill(tmp_path, *classes("training_set/training_set", "test_set/test_set"))
        source = open_data(tmp_path)
        assert source.classes == open_data(tmp_path, "test").classes == ("a", "b")
        assert "train = training_set/training_set" in source.report()

    @pytest.mark.parametrize("folders, other", [
        (("seg_train", "seg_test"), "seg_pred"), (("train2017", "val2017"), "unlabeled2017"),
        (("trainset", "testset"), "extra"),
    ])  # fmt: skip
    def test_folders_next_to_names_that_hold_splits(self, folders, other, tmp_path):
        fill(tmp_path, *classes(*folders), f"{other}/1.png")
        assert len(splits(tmp_path)) == 3 and splits(tmp_path)[0] == "train" and splits(tmp_path)[2] == other
        assert len(open_data(tmp_path)) == 4 and len(open_data(tmp_path, other)) == 1

    def test_classes_whose_names_hold_words_of_splits(self, tmp_path):
        fill(tmp_path, "steam_train/1.png", "test_tube/1.png", "cat/1.png")
        assert open_data(tmp_path).classes == ("cat", "steam_train", "test_tube")

    def test_folders_and_images_next_to_splits(self, tmp_path):
        fill(tmp_path, *classes("train", "test"), "unlabeled/1.png", "cover.png")
        (tmp_path / "annotations").mkdir()
        assert splits(tmp_path) == ("train", "test", "unlabeled") and len(open_data(tmp_path, "unlabeled")) == 1
        assert "1 image next to the splits not used" in open_data(tmp_path).report()

    def test_ambiguous_folders_are_refused_with_both_remedies(self, tmp_path):
        root = tmp_path / "d"
        way = r"move the other images into .*train; if it is a class, rename it, or pass --data '.*\*\*'"
        for paths in (
            ["test/1.png", "cat/1.png", "dog/1.png"],
            ["Testing/1.png", "1.png"],
            ["valid/1.png", "cat/1.png"],
        ):
            with pytest.raises(DataError, match=f"it may be a split or a class. If it is a split, {way}"):
                splits(refill(root, *paths))
        for paths in ([*classes("train"), "cat/1.png"], ["training/1.png", "cat/1.png"]):
            with pytest.raises(DataError, match=r"If it is a split, pass --data .*train"):
                splits(refill(root, *paths))
        for first, second, other in (("train", "training", "test"), ("trainA", "trainB", "testA")):
            with pytest.raises(DataError, match=f"{first}', '{second}', which are all named as training images"):
                splits(refill(root, *classes(first, second, other)))

    def test_remedies_for_ambiguous_folders_work(self, tmp_path):
        fill(tmp_path, "test/1.png", "cat/1.png", "dog/1.png")
        assert open_data(f"{tmp_path}/**").classes == ("cat", "dog", "test")
        (tmp_path / "train").mkdir()
        for name in ("cat", "dog"):
            (tmp_path / name).rename(tmp_path / "train" / name)
        assert open_data(tmp_path).classes == ("cat", "dog") and len(open_data(tmp_path, "test")) == 1

    def test_splits_inside_of_classes(self, tmp_path):
        fill(tmp_path, *classes("bottle/train", "bottle/test", "cable/train", "cable/test"))
        with pytest.raises(DataError, match=r"divided into splits \(bottle/train and others\)"):
            open_data(tmp_path)
        assert splits(tmp_path / "bottle") == ("train", "test") and len(open_data(f"{tmp_path}/*/train")) == 8

    def test_a_vehicle_and_its_photographs(self, tmp_path):
        fill(tmp_path, "train/1.png", "plane/2.png", "bus/3.png")
        source = open_data(tmp_path)
        assert source.classes == ("bus", "plane", "train") and "'train' is not taken as a split" in source.report()
        assert len(open_data(refill(tmp_path / "d", "train/1.png", "2.png"))) == 2

    def test_folder_without_images_is_not_taken_as_a_split(self, tmp_path):
        fill(tmp_path, "cat/1.png", "dog/1.png")
        for name in ("test", "valid"):
            (tmp_path / name).mkdir()
        assert splits(tmp_path) == ("train",) and open_data(tmp_path).classes == ("cat", "dog")

    def test_only_test_images(self, tmp_path):
        fill(tmp_path, *classes("val", "test"))
        assert splits(tmp_path) == ("val", "test") and open_data(tmp_path, "val").classes == ("a", "b")
        with pytest.raises(DataError, match=r"no split 'train', only val, test: .* --set split=val"):
            open_data(tmp_path)

    def test_a_test_split_of_one_class_is_labelled(self, tmp_path):
        fill(tmp_path, *classes("train"), "test/b/1.png")
        assert open_data(tmp_path, "test").labels.tolist() == [1]

    def test_the_evaluation_uses_the_first_labelled_one(self, tmp_path):
        cases = {
            "test split": classes("train", "valid", "test"),
            "val split": [*classes("train", "valid"), "test/1.png"],
        }
        cases |= {"a tenth": [*classes("train"), "test/1.png"]}
        for expected, paths in cases.items():
            recipe, source = resolve_recipe(refill(tmp_path / "d", *paths), {})
            assert evaluation_split(recipe, source, tmp_path / "d").description.startswith(expected)

    def test_the_bank_has_every_class(self, tmp_path):
        """Of 65 images the last one is in the tenth, here as the only one of its class."""
        folder = fill(tmp_path / "d", *(f"a/{i:02}.png" for i in range(64)), "b/1.png")
        recipe, source = resolve_recipe(folder, {})
        for images in (source, decode_all(open_data(folder)).source):
            split = evaluation_split(recipe, images, folder)
            assert sorted(split.bank.labels.unique().tolist()) == [0, 1] and split.queries.labels.tolist() == [0] * 5
            assert len(split.bank) == 60

    def test_test_data_that_are_in_the_bank_are_stated(self, tmp_path):
        """k-NN finds the query itself, which looks like a good encoder."""
        files = [f"{c}/{i}.png" for c in "ab" for i in range(9)]
        folder, part = fill(tmp_path / "d", *files), fill(tmp_path / "p", *files)
        fill(tmp_path / "d" / "a", *("x/1.png",))
        for test, words in (
            (folder, "; all of them are also in the bank, so that the figures are too high"),
            (part, ""),
        ):
            recipe, source = resolve_recipe(folder, {"test": str(test)})
            for images in (source, decode_all(source).source):
                described = evaluation_split(recipe, images, folder).description
                assert described == f"train split of {test}{words}", described
        some = tmp_path / "some.csv"
        some.write_text("path,label\n" + "".join(f"{folder / c / f'{i}.png'},{c}\n" for c in "ab" for i in range(2)))
        recipe, source = resolve_recipe(part, {"test": str(some)})
        assert "in the bank" not in evaluation_split(recipe, source, part).description
        recipe, source = resolve_recipe(folder, {"test": str(some)})
        assert "; all of them are also in the bank" in evaluation_split(recipe, source, folder).description

    def test_images_that_cannot_be_read_do_not_change_the_tenth(self, tmp_path):
        """A run leaves them out before the tenth is chosen, a later evaluation after."""
        folder = fill(tmp_path / "d", *(f"{c}/{i:02}.png" for c in "ab" for i in range(20)))
        recipe, source = resolve_recipe(folder, {})
        whole = evaluation_split(recipe, source, folder).queries
        names = [whole.identity(i) for i in range(len(whole))]
        assert len(names) == 4
        for broken in (names[:1], [f"b/{i:02}.png" for i in range(9)], names[1:]):
            for name in broken:
                (folder / name).write_bytes(b"")
            left = decode_all(open_data(folder), max_bad=0.9).source
            split = evaluation_split(recipe, left, folder)
            held_out, rest = ([part.identity(i) for i in range(len(part))] for part in (split.queries, split.bank))
            readable = [left.identity(i) for i in range(len(left))]
            assert held_out == [name for name in names if name in readable]
            sample, chosen = (Chosen(one, None, 0, 30) for one in (source, left))
            halves = [[one.identity(i) for i in range(len(one))] for one in (sample, chosen)]
            assert halves[1] == [name for name in halves[0] if name in readable]
            assert halves[1][: chosen.viewed] == [name for name in halves[0][: sample.viewed] if name in readable]
            assert sorted(held_out + rest) == readable and split.queries.labels.tolist() == [
                "ab".index(n[0]) for n in held_out
            ]
            refill(folder, *(f"{c}/{i:02}.png" for c in "ab" for i in range(20)))


class TestShards:
    def test_tar_files(self, tmp_path):
        for name in ("Cats-Train-0", "cats-train-1", "cats-valid-0", "cats-testing"):
            shard(tmp_path / f"{name}.tar", *pictures(0))
        assert splits(tmp_path) == ("train", "val", "test")
        assert [len(open_data(tmp_path, split)) for split in splits(tmp_path)] == [6, 3, 3]
        assert "splits: train, val = valid, test = testing" in open_data(tmp_path).report()

    def test_parquet_files(self, tmp_path):
        images = [encoded(picture(i), "PNG") for i in range(4)]
        for name in ("Training-00000-of-00001", "valid", "test-00000-of-00001-0123456789abcdef", "train_features"):
            write_parquet(tmp_path / f"{name}.parquet", images)
        assert splits(tmp_path) == ("train", "val", "test") and len(open_data(tmp_path)) == 4
        report = open_data(tmp_path).report()
        assert "train = training, val = valid, test; 1 file without the name of a split not used" in report

    @pytest.mark.parametrize("where", ["data", "plain_text"])
    def test_a_hub_folder_as_downloaded(self, where, tmp_path):
        (tmp_path / where).mkdir()
        (tmp_path / "README.md").touch()
        fill(tmp_path, ".huggingface/1.png", *(["assets/1.png"] if where == "data" else []))
        images = [encoded(picture(i), "PNG") for i in range(4)]
        for name, count in {
            "train-00000-of-00002": 4,
            "train-00001-of-00002": 3,
            "validation-00000-of-00001": 2,
        }.items():
            write_parquet(tmp_path / where / f"{name}.parquet", images[:count])
        assert splits(tmp_path) == ("train", "val") and len(open_data(tmp_path)) == 7

    def test_every_name_of_a_hub_is_a_split(self, tmp_path):
        (tmp_path / "data").mkdir()
        for name in ("train", "extra", "test"):
            write_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", [encoded(picture(1), "PNG")])
        assert splits(tmp_path) == ("train", "test", "extra") and len(open_data(tmp_path)) == 1

    def test_folders_named_as_splits(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / "default" / split).mkdir(parents=True)
            write_parquet(tmp_path / "default" / split / "0000.parquet", [encoded(picture(1), "PNG")])
            shard(tmp_path / "tars" / split / "0.tar", *pictures(0))
        assert splits(tmp_path / "default") == splits(tmp_path / "tars") == ("train", "test")
        shutil.rmtree(tmp_path / "tars")
        assert splits(tmp_path) == ("train", "test")

    def test_two_configurations(self, tmp_path):
        for name in ("en", "fr"):
            (tmp_path / name).mkdir()
            write_parquet(tmp_path / name / "train-00000-of-00001.parquet", [encoded(picture(1), "PNG")])
        with pytest.raises(DataError, match=r"several folders \(en, fr\): name one or several"):
            splits(tmp_path)

    def test_features_next_to_images_are_ignored(self, tmp_path):
        fill(tmp_path, *classes("."))
        write_parquet(tmp_path / "features.parquet", [encoded(picture(1), "PNG")])
        assert len(open_data(tmp_path)) == 4 and open_data(tmp_path).classes == ("a", "b")


def test_columns_and_arrays(tmp_path):
    (tmp_path / "l.csv").write_text("path,split\n1,Train\n2,Valid\n3,TEST\n")
    assert splits(tmp_path / "l.csv") == ("train", "val", "test")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, val_images=images[:1], test_images=images)
    assert [len(open_data(tmp_path / "x.npz", split)) for split in splits(tmp_path / "x.npz")] == [2, 1, 2]
