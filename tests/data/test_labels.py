"""Labels of every type in every source, and the columns that hold them."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from inbatch.data import GreyAsRGB, Subset, open_data, splits
from inbatch.data.sources import arrays, labels
from inbatch.errors import DataError

IMAGES = np.random.default_rng(0).integers(256, size=(6, 8, 9, 3), dtype=np.uint8)
LEFT_OUT = "the images are used without labels, and k-NN and the linear probe are left out"


def encoded(value: int) -> bytes:
    Image.new("RGB", (6, 4), (value, 7, 9)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def table(path, columns: dict, kind=None):
    """Write columns as Parquet; `image` is added."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n = len(next(iter(columns.values())))
    images = {} if "image" in columns else {"image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(n)]}
    held = {name: arrow.array(values, kind if name != "image" else None) for name, values in (images | columns).items()}
    parquet.write_table(arrow.table(held), path)
    return path


def as_list(path, values):
    path.write_text("path,label\n" + "".join(f"{i}.png,{value}\n" for i, value in enumerate(values)))
    return path


def class_names(source):
    return [source.classes[label] if label >= 0 else None for label in source.labels.tolist()]


CLASSES = [
    ([3, 1, 3, -1], ["3", "1", "3", None]),
    ([1000, 181_000, 4_000_000_000, 1000], ["1000", "181000", "4000000000", "1000"]),
    ([1.0, float("nan"), -1.0, 3.0], ["1", None, None, "3"]),
    (["b", "a", None, "b"], ["b", "a", None, "b"]),
    (["nan", "None", "NA", "-1.0"], [None] * 4),
    (["", " ", "-1", "N/A"], [None] * 4),
    (["2", "10", "7", "2"], ["2", "10", "7", "2"]),
    ([True, False, True, None], ["True", "False", "True", None]),
    ([None, None, None, None], [None] * 4),
]
NAMES = {
    ("cat", "null", "nan", "NA", "-1", "None", "N/A"): ["null", "nan", "NA", "-1", "None", "N/A"],
    ("cat", " dog", "dog "): [" dog", "dog "],
    ("1", "01", "2"): ["1", "01"],
    ("cat", "1", "01", "-2"): [],
    ("-2", "-1.0", "2"): ["-2", "-1.0"],
    ("001", "2.0", "13"): [],
    ("none", "?", "true", "2e3", "-"): [],
}
OTHER = [[0.5, 1.0, 2.0, 3.0], [[1, 2], [3], [], [4]], [{"a": 1}] * 4]


class TestTypes:
    def test_names_that_a_list_changes(self, tmp_path):
        for names, changed in NAMES.items():
            assert labels.changed_names(names) == changed
            kept = [name for name in names if name not in changed]
            source = open_data(as_list(tmp_path / "list.csv", kept))
            assert len(set(source.labels.tolist())) == len(kept) == len(source.classes) and min(source.labels) == 0

    @pytest.mark.parametrize("source", ["array", "parquet", "list", "npz", "saved"])
    def test_classes_of_every_source(self, source, tmp_path):
        for number, (values, expected) in enumerate(CLASSES):
            path = tmp_path / f"{number}"
            if source == "array":
                opened = open_data((IMAGES[:4], values))
            elif source == "parquet":
                opened = open_data(table(path.with_suffix(".parquet"), {"label": values}))
            elif source == "list":
                opened = open_data(as_list(path.with_suffix(".csv"), ["" if v is None else v for v in values]))
            elif source == "npz":
                if None in values:
                    continue  # an array of objects, which is a pickle
                np.savez(path.with_suffix(".npz"), images=IMAGES[:4], labels=values)
                opened = open_data(path.with_suffix(".npz"))
            else:
                datasets = pytest.importorskip("datasets")
                rows = [{"bytes": encoded(i), "path": None} for i in range(4)]
                features = datasets.Features({"image": datasets.Image()})
                dataset = datasets.Dataset.from_dict({"image": rows}, features=features).add_column("label", values)
                opened = open_data(dataset)
            assert class_names(opened) == expected, (source, values)
            assert opened.labels.dtype == torch.int64
            ids = [int(name) for name in opened.classes if name.isdigit()]
            assert opened.classes in ((), tuple(map(str, sorted(ids)))) or not ids
            assert opened.ids == (tuple(sorted(ids)) if ids else None)

    def test_integers_of_every_type(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        kinds = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
        for kind in kinds:
            for values in (np.array([2, 0, 1, 2], kind), torch.tensor([2, 0, 1, 2], dtype=getattr(torch, kind))):
                assert open_data((IMAGES[:4], values)).labels.tolist() == [2, 0, 1, 2], kind
            column = {"label": [2, 0, 1, 2]}
            source = open_data(table(tmp_path / f"{kind}.parquet", column, getattr(pa, kind)()))
            assert source.labels.tolist() == [2, 0, 1, 2] and source.ids is None
            np.savez(
                tmp_path / "a.npz", images=IMAGES[:4], labels=np.array([2, 0, 1, 2], np.dtype(kind).newbyteorder(">"))
            )
            assert open_data(tmp_path / "a.npz").labels.tolist() == [2, 0, 1, 2]
        for values in (
            torch.tensor([1.0, 0.0]).bfloat16(),
            np.array([b"1", b"0"]),
            np.array([[1], [0]], np.uint8),
            [torch.tensor(1), np.int8(0)],
        ):
            assert open_data((IMAGES[:2], values)).labels.tolist() == [1, 0]
        assert open_data((IMAGES[:2], [2**64 - 1, 1])).classes == ("1", str(2**64 - 1))  # too large for int64: names

    def test_columns_of_other_kinds_are_left_out(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        for values in OTHER:
            for source in (table(tmp_path / "a.parquet", {"label": values}), (IMAGES[:4], values)):
                opened = open_data(source)
                assert opened.labels.tolist() == [-1] * 4 and opened.classes == () and opened.ids is None
                assert f"{opened.label_note}: {LEFT_OUT}" in opened.report()
        times = open_data(table(tmp_path / "a.parquet", {"label": [1, 2]}, pa.timestamp("s")))
        assert "timestamp[ms], neither whole numbers nor names" in times.report()
        assert open_data((IMAGES[:2], np.array(["2026"] * 2, "M8[Y]"))).label_note
        categories = pa.array(["b", "a", None]).dictionary_encode()
        assert class_names(open_data(table(tmp_path / "c.parquet", {"label": categories}))) == ["b", "a", None]

    def test_several_labels_for_each_image(self, tmp_path):
        """Arrays (N, L), as those of ChestMNIST."""
        many = np.zeros((6, 14), np.uint8)
        np.savez(tmp_path / "a.npz", images=IMAGES, labels=many)
        for data in ((IMAGES, many), tmp_path / "a.npz"):
            source = open_data(data)
            assert source.labels.tolist() == [-1] * 6
            assert "have shape (6, 14), several for each image" in source.report() and LEFT_OUT in source.report()
            assert Subset(source, torch.arange(3), "").label_note == source.label_note
        for wrong in (many[:5], np.zeros((3,)), np.zeros(()), np.zeros((5, 1)), 5):
            with pytest.raises(DataError, match="but there are 6 images: one label each"):
                open_data((IMAGES, wrong))
        for unordered in (set("abcdef"), dict.fromkeys(range(6))):
            with pytest.raises(DataError, match="pass a list or an array, in the order of the images"):
                open_data((IMAGES, unordered))

    def test_invalid_labels_are_refused(self, tmp_path, monkeypatch):
        for data in ((IMAGES, [-100] * 6), table(tmp_path / "a.parquet", {"label": [-100]})):
            with pytest.raises(DataError, match=r"go down to -100: use -1 .*label_column = none"):
                open_data(data)
        monkeypatch.setattr(labels, "MOST_CLASSES", 3)
        with pytest.raises(DataError, match=r"are 6 classes, more than 3: use no labels \(label_column = none\)"):
            open_data((IMAGES, range(6)))


class TestNumbering:
    def test_the_same_for_proper_labels(self):
        """Labels 0 to C - 1 keep their numbers, and with them the signature of the data."""
        source = open_data((IMAGES, [2, 0, 1, -1, 0, 2]))
        assert source.labels.tolist() == [2, 0, 1, -1, 0, 2] and source.classes == ("0", "1", "2")
        assert source.signature().startswith("37a576568edcdabe")

    def test_numbering_is_kept_by_subsets_and_wrappers(self, tmp_path):
        grey = open_data((IMAGES[..., 0], [10, 30, 20, -1, 30, 10]))
        for source in (grey, GreyAsRGB(grey), Subset(grey, torch.arange(6), "all")):
            assert source.ids == (10, 20, 30) and source.labels.tolist() == [0, 2, 1, -1, 2, 0]
        (tmp_path / "classes.txt").write_text("30\n10\n")
        chosen = open_data((IMAGES, [10, 30, 20, -1, 30, 10]), classes=str(tmp_path / "classes.txt"))
        assert (chosen.ids, chosen.classes) == ((30, 10), ("30", "10")) and chosen.labels.tolist() == [1, 0, 0, 1]

    def test_a_test_split_is_numbered_like_the_train_split(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        train, test = [100, 7, 5000], [5000, 60, 7]
        for name, values in (("train", train), ("test", test)):
            table(tmp_path / f"{name}.parquet", {"label": values})
        arrays = {"x_train": IMAGES[:3], "y_train": train, "x_test": IMAGES[3:], "y_test": test}
        np.savez(tmp_path / "a.npz", **arrays)
        rows = [{"bytes": encoded(i), "path": None} for i in range(3)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        parts = {
            name: datasets.Dataset.from_dict({"image": rows, "label": values}, features=features)
            for name, values in (("train", train), ("test", test))
        }
        for data in (tmp_path, tmp_path / "a.npz", datasets.DatasetDict(parts)):
            first, second = open_data(data), open_data(data, "test")
            assert (first.ids, first.labels.tolist()) == ((7, 100, 5000), [1, 0, 2])
            assert (second.ids, second.labels.tolist()) == ((7, 100, 5000, 60), [2, 3, 0])


class TestColumns:
    def test_usual_names_of_images(self, tmp_path):
        for name in ("img", "pixel_values", "jpg", "bytes", "photo"):
            images = {name: [encoded(i) for i in range(3)], "image_id": [1, 2, 3], "class": list("aba")}
            source = open_data(table(tmp_path / "a.parquet", {"image": [1, 2, 3]} | images))
            assert int(source.image(2)[0, 0, 0]) == 2 and source.identity(1) == "row 1", name
            assert source.classes == ("a", "b") and source.labels.tolist() == [0, 1, 0]

    def test_settings_name_the_columns(self, tmp_path):
        columns = {"image": [encoded(i) for i in range(3)], "mask": [encoded(100 + i) for i in range(3)]}
        columns |= {"label": [0, 1, 0], "species": ["cat", "dog", "cat"]}
        datasets = pytest.importorskip("datasets")
        file = table(tmp_path / "a.parquet", columns)
        for data in (file, datasets.Dataset.from_dict(columns)):
            source = open_data(data, image_column="mask", label_column="species")
            assert int(source.image(2)[0, 0, 0]) == 102 and source.classes == ("cat", "dog")
            assert open_data(data, label_column="none").classes == () and open_data(data).classes == ("0", "1")
            with pytest.raises(DataError, match=r"has no column 'kind' \(label_column\), only image, mask, label"):
                open_data(data, label_column="kind")
            with pytest.raises(DataError, match="no encoded images in image_column = 'label'"):
                open_data(data, image_column="label")
        assert open_data(file).fingerprint() != open_data(file, image_column="mask").fingerprint()
        two = {"left": columns["image"], "right": columns["mask"], "image": [1, 2, 3]}
        with pytest.raises(DataError, match=r"choose one of left, right with image_column \(--image-column\)"):
            open_data(table(tmp_path / "b.parquet", two))

    def test_arrays_of_a_file(self, tmp_path):
        file = tmp_path / "a.npz"
        np.savez(file, pictures=IMAGES, kinds=np.array(list("abcabc")), labels=np.arange(6))
        chosen = {"image_column": "pictures", "label_column": "kinds"}
        assert splits(file, **chosen) == ("train",) and open_data(file, **chosen).classes == ("a", "b", "c")
        assert len(open_data(file, image_column="pictures").classes) == 6
        assert open_data(file, image_column="pictures", label_column="none").classes == ()
        with pytest.raises(DataError, match="or set image_column"):
            open_data(file)
        with pytest.raises(DataError, match="has no array 'kind', only pictures, kinds, labels"):
            open_data(file, image_column="pictures", label_column="kind")

    def test_columns_of_a_list(self, tmp_path):
        for i in range(2):
            Image.new("L", (4, 4), 10 * i).save(tmp_path / f"{i}.png")
        file = tmp_path / "l.csv"
        file.write_text("Photo,label,kind,split\n0.png,4,cat,train\n1.png,5,dog,test\n")
        chosen = {"image_column": "photo", "label_column": "kind"}
        assert splits(file, **chosen) == ("train", "test") and open_data(file, **chosen).classes == ("cat", "dog")
        assert open_data(file, "test", image_column="photo").ids == (4, 5)
        assert open_data(file, image_column="photo", label_column="none").classes == ()
        with pytest.raises(
            DataError, match=r"no columns for .*label_column = 'what'; its first line has 'Photo', 'label"
        ):
            open_data(file, image_column="photo", label_column="what")

    def test_label_column_none_and_names_for_kinds_without_columns(self, tmp_path):
        for name in ("a/0.png", "b/1.png"):
            (tmp_path / name).parent.mkdir()
            Image.new("L", (4, 4)).save(tmp_path / name)
        np.save(tmp_path / "x.npy", IMAGES)
        (tmp_path / "l.txt").write_text("a/0.png cat\n")
        for data in (tmp_path, (IMAGES, [1, 2] * 3), tmp_path / "x.npy", tmp_path / "l.txt"):
            source = open_data(data, label_column="none")
            assert (
                source.labels.tolist() == [-1] * len(source) and "unlabelled (label_column = none: " in source.report()
            )
            with pytest.raises(DataError, match=r"has no columns|without names|leave out image_column"):
                open_data(data, label_column="kind")

    def test_ids_of_several_files_are_joined(self, tmp_path):
        (tmp_path / "c").mkdir()
        for name, values in (("a", [10, 9]), ("b", [9, 1000]), ("c/x", [10, 8])):
            table(tmp_path / f"{name}.parquet", {"label": values})
        source = open_data(f"{tmp_path}/*.parquet")
        assert source.ids == (9, 10, 1000) and source.labels.tolist() == [1, 0, 0, 2]
        joined = open_data([tmp_path / "a.parquet", tmp_path / "c"])
        assert joined.ids == (8, 9, 10) and joined.labels.tolist() == [2, 1, 2, 0]

    def test_semicolons(self, tmp_path):
        """As spreadsheets write where the comma is the decimal sign."""
        for name in ("0.png", "1.png", "a;b.png"):
            Image.new("L", (4, 4)).save(tmp_path / name)
        (tmp_path / "l.csv").write_text('path;label;split\n0.png;cat, tabby;train\n"1.png";dog;test\n')
        assert splits(tmp_path / "l.csv") == ("train", "test")
        assert open_data(tmp_path / "l.csv").classes == ("cat, tabby", "dog")
        (tmp_path / "l.csv").write_text("0.png;3\n1.png;4\n")
        assert open_data(tmp_path / "l.csv").ids == (3, 4)
        (tmp_path / "l.csv").write_text("a;b.png\n0.png\n")  # a name with a semicolon, without a header
        assert open_data(tmp_path / "l.csv").identity(0) == "a;b.png" and len(open_data(tmp_path / "l.csv")) == 2


class ArrayOfAnotherLibrary:
    """As of h5py and zarr: rows are read when they are indexed."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, at):
        return self.values[at]


class Stubborn(ArrayOfAnotherLibrary):
    def __getitem__(self, at):
        raise TypeError("Implicit conversion is not allowed")


class TestNearMisses:
    def test_arrays_of_other_libraries(self, monkeypatch):
        images, numbers = ArrayOfAnotherLibrary(IMAGES), ArrayOfAnotherLibrary(np.array([1000, 2000, 1000] * 2))
        for data in ((images, numbers), (images, numbers.values), (IMAGES, numbers)):
            source = open_data(data)
            assert source.ids == (1000, 2000) and torch.equal(
                source.image(3), torch.from_numpy(IMAGES[3]).permute(2, 0, 1)
            )
        assert len(open_data(images)) == 6
        with pytest.raises(
            DataError, match=r"test_labels.Stubborn cannot be converted .*Implicit.*; pass a NumPy array"
        ):
            open_data(Stubborn(IMAGES))
        monkeypatch.setattr(arrays, "free_bytes", lambda device: 100)
        with pytest.raises(DataError, match=r"test_labels.ArrayOfAnotherLibrary would take .* save the images as .npy"):
            open_data(images)

    def test_datasets_of_hugging_face(self):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_dict({"img": [encoded(i) for i in range(4)], "label": [5, 9, 5, -1]})
        source = open_data(dataset.shuffle(seed=1).with_format("numpy"))
        assert source.ids == (5, 9) and sorted(int(source.image(i)[0, 0, 0]) for i in range(4)) == [0, 1, 2, 3]
        assert splits(datasets.DatasetDict(validation=dataset, train=dataset)) == ("train", "val")
        with pytest.raises(DataError, match=r"datasets\.iterable_dataset\.IterableDataset is a stream"):
            open_data(dataset.to_iterable_dataset())
        with pytest.raises(DataError, match=r"A tuple of datasets\.arrow_dataset\.Dataset cannot be opened"):
            open_data((dataset, dataset))

    def test_unsupported_items_are_named_with_their_module(self):
        photo = Image.new("RGB", (4, 4))
        for data, match in (
            (
                torch.utils.data.TensorDataset(torch.zeros(3)),
                r"item 0 of the TensorDataset is \(torch\.Tensor\): an item is an image",
            ),
            ({"images": 3}, "A dict cannot be opened; pass its images as one array"),
            ((1, "x", 2), "A tuple of int and str cannot be opened"),
            (3, "A int cannot be opened; data can be"),
            ("", "the path of the data is empty; data can be"),
            (photo, r"A PIL\.Image\.Image cannot be opened; pass numpy\.asarray\(image\)\[None\] for one image"),
            (IMAGES[0], r"shape \(8, 9, 3\) is that of one image \(H, W, C\).* pass array\[None\]"),
        ):
            with pytest.raises(DataError, match=match):
                open_data(data)

    def test_the_library_is_not_imported_for_it(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "datasets", raising=False)
        assert len(open_data(IMAGES)) == 6 and "datasets" not in sys.modules
