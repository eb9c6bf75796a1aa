"""torchvision's data sets by name: each laid out on disk as torchvision does, none ever downloaded."""

import bz2
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_cifar import LABELS, PIXELS, Call, ten
from torchvision.datasets import utils

from inbatch.data import open_data, splits
from inbatch.data.sources.torchvision_sets import SETS
from inbatch.errors import DataError

rng = np.random.default_rng(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Skip the comparison of checksums, as files made here differ from the published ones; they must still exist."""
    for module in ("svhn", "stl10", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


def photo(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (value, 0, 0)).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def idx(path, array):
    """Write an array in the format of MNIST's files: big-endian, type and shape first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    head = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(head + array.astype(array.dtype.newbyteorder(">")).tobytes())


def grey(n):
    return rng.integers(256, size=(n, 28, 28), dtype=np.uint8)


def digits(raw, train, test):
    images = grey(5), grey(3)
    for (name, part), pixels in zip((("train", train), ("t10k", test)), images, strict=True):
        idx(raw / f"{name}-images-idx3-ubyte", pixels)
        idx(raw / f"{name}-labels-idx1-ubyte", np.array(part, np.uint8))
    return torch.from_numpy(np.concatenate(images))[:, None]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_mnist(name, tmp_path):
    images = digits(tmp_path / name / "raw", [3, 1, 4, 1, 5], [9, 2, 6])
    data = f"torchvision/{name}:{tmp_path}"
    train, test = open_data(data), open_data(data, "test", channels=1)
    assert splits(data) == ("train", "test") and train.channels == 1 and len(train.classes) == 10
    assert train.labels.tolist() == [3, 1, 4, 1, 5] and test.labels.tolist() == [9, 2, 6]
    assert torch.equal(torch.stack([*(train.image(i) for i in range(5)), *(test.image(i) for i in range(3))]), images)
    assert test.name == f"torchvision/{name} (test)"
    with pytest.raises(DataError, match="has 1 channels, 3 were requested"):
        open_data(data, channels=3)


def test_emnist_and_qmnist(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        idx(tmp_path / f"EMNIST/raw/emnist-letters-{part}-images-idx3-ubyte", grey(n))
        idx(tmp_path / f"EMNIST/raw/emnist-letters-{part}-labels-idx1-ubyte", np.full(n, 26, np.uint8))
        idx(tmp_path / f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte", grey(n))
        labels = np.tile(np.array([[7, 4, 0, 0, 0, 0, 0, 0]], np.int32), (n, 1))
        idx(tmp_path / f"QMNIST/raw/qmnist-{part}-labels-idx2-int", labels)
    letters = open_data(f"torchvision/EMNIST-letters:{tmp_path}", "test")
    assert letters.labels.tolist() == [26, 26] and letters.classes[26] == "z"
    assert open_data(f"torchvision/QMNIST:{tmp_path}").labels.tolist() == [7] * 4


def test_usps(tmp_path):
    values = rng.uniform(-1, 1, (2, 256))
    for name in ("usps.bz2", "usps.t.bz2"):
        rows = (f"{i + 9} " + " ".join(f"{j + 1}:{v:.4f}" for j, v in enumerate(row)) for i, row in enumerate(values))
        (tmp_path / name).write_bytes(bz2.compress("\n".join(rows).encode()))
    source = open_data(f"torchvision/USPS:{tmp_path}", "test")
    assert source.labels.tolist() == [8, 9] and len(source.classes) == 10 and source.image(1).shape == (1, 16, 16)


def test_svhn(tmp_path, unchecked):
    pixels = rng.integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [2]], np.uint8)})
    data = f"torchvision/SVHN:{tmp_path}"
    source = open_data(data)
    assert source.labels.tolist() == [1, 0, 9, 2] and splits(data) == ("train", "test", "extra")
    assert torch.equal(source.image(2), torch.from_numpy(pixels[..., 2].transpose(2, 0, 1).copy()))
    with pytest.raises(DataError, match=r"SVHN \(test\) was looked for in .* and is not whole"):
        open_data(data, "test")


def test_stl10(tmp_path, unchecked, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = rng.integers(256, size=(7, 3, 96, 96), dtype=np.uint8)
    parts = {"train": slice(3), "test": slice(3, 5), "unlabeled": slice(5, 7)}
    for name, part in parts.items():
        pixels[part].tofile(folder / f"{name}_X.bin")
    np.array([1, 10, 3], np.uint8).tofile(folder / "train_y.bin")
    np.array([2, 4], np.uint8).tofile(folder / "test_y.bin")
    text(folder / "class_names.txt", *(f"class {i}" for i in range(9)), "truck")
    monkeypatch.setenv("INBATCH_DATA", str(tmp_path))
    data = "torchvision/STL10"
    assert splits(data) == ("train", "test", "unlabeled", "train+unlabeled")
    both = open_data(data, "train+unlabeled")
    assert both.labels.tolist() == [0, 9, 2, -1, -1] and both.classes[9] == "truck"
    assert torch.equal(both.image(4), torch.from_numpy(pixels[6].transpose(0, 2, 1).copy()))  # stored by column
    assert open_data(data, "unlabeled").labels.tolist() == [-1, -1]
    assert open_data(data, "test").labels.tolist() == [1, 3]
    np.array([2, 14], np.uint8).tofile(folder / "test_y.bin")
    with pytest.raises(DataError, match="hold the label 13, but 10 classes are named"):
        open_data(data, "test")


def test_cifar_is_read_by_the_source_of_inbatch(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", None)  # which would unpickle
    ten(tmp_path / "cifar-10-batches-py")
    source = open_data(f"torchvision/CIFAR10:{tmp_path}", "test")
    assert source.labels.tolist() == LABELS[20:] and source.image(0).flatten().tolist() == PIXELS[20].tolist()


def food(root):
    text(root / "food-101/meta/train.json", json.dumps({"b": ["b/2", "b/1"], "a": ["a/3"]}))
    return [("food-101/images/a/3.jpg", "a"), ("food-101/images/b/1.jpg", "b"), ("food-101/images/b/2.jpg", "b")]


def flowers(root):
    (root / "flowers-102/jpg").mkdir(parents=True)
    savemat(root / "flowers-102/setid.mat", {"trnid": [[3, 1]], "valid": [[2]], "tstid": [[2]]})
    savemat(root / "flowers-102/imagelabels.mat", {"labels": [[1, 102, 2]]})
    return [("flowers-102/jpg/image_00001.jpg", "pink primrose"), ("flowers-102/jpg/image_00003.jpg", None)]


def pets(root):
    text(root / "oxford-iiit-pet/annotations/trainval.txt", "pug_2 2 2 1", "big_cat_1 1 1 1")
    (root / "oxford-iiit-pet/images").mkdir()
    return [("oxford-iiit-pet/images/big_cat_1.jpg", "Big Cat"), ("oxford-iiit-pet/images/pug_2.jpg", "Pug")]


def textures(root):
    text(root / "dtd/dtd/labels/train1.txt", "woven/w_1.jpg", "banded/b_1.jpg")
    return [("dtd/dtd/images/banded/b_1.jpg", "banded"), ("dtd/dtd/images/woven/w_1.jpg", "woven")]


def folders(place, ending="jpg", first="a", second="b"):
    return lambda root: [(f"{place}/{name}/1.{ending}", name) for name in (first, second)]


def caltech(root):
    place = "caltech101/101_ObjectCategories"
    photo(root / f"{place}/BACKGROUND_Google/image_0001.jpg", 0)
    return [(f"{place}/{name}/image_000{i}.jpg", name) for name in ("Faces", "ant") for i in (1, 2)]


def aircraft(root):
    text(root / "fgvc-aircraft-2013b/data/variants.txt", "707-320", "A300")
    text(root / "fgvc-aircraft-2013b/data/images_variant_train.txt", "002 A300", "001 707-320")
    return [(f"fgvc-aircraft-2013b/data/images/00{i}.jpg", n) for i, n in ((1, "707-320"), (2, "A300"))]


def cars(root):
    (root / "stanford_cars/devkit").mkdir(parents=True)
    annotations = [{"fname": f"{i}.jpg", "class": label} for i, label in ((1, 2), (2, 1))]
    savemat(root / "stanford_cars/devkit/cars_train_annos.mat", {"annotations": annotations})
    savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": np.array(["old", "new"], object)})
    return [("stanford_cars/cars_train/1.jpg", "new"), ("stanford_cars/cars_train/2.jpg", "old")]


def scenes(root):
    text(root / "SUN397/ClassName.txt", "/a/abbey", "/b/bar/indoor")
    return [("SUN397/a/abbey/sun_1.jpg", "abbey"), ("SUN397/b/bar/indoor/sun_2.jpg", "bar/indoor")]


FILES = {
    "Food101": food,
    "Flowers102": flowers,
    "OxfordIIITPet": pets,
    "DTD": textures,
    "EuroSAT": folders("eurosat/2750"),
    "Caltech101": caltech,
    "GTSRB": folders("gtsrb/GTSRB/Training", "ppm", "00000", "00001"),
    "FGVCAircraft": aircraft,
    "Country211": folders("country211/train", first="AD", second="ZW"),
    "StanfordCars": cars,
    "SUN397": scenes,
    "Imagenette": folders("imagenette2/train", "jpeg", "n01440764", "n02102040"),
}


@pytest.mark.parametrize("name", FILES)
def test_sets_of_files(name, tmp_path, unchecked):
    expected = FILES[name](tmp_path)
    for i, (path, _) in enumerate(expected):
        photo(tmp_path / path, 10 * i)
    source = open_data(f"torchvision/{name}:{tmp_path}")
    assert [source.identity(i) for i in range(len(source))] == [path for path, _ in expected]
    assert [int(source.image(i)[0, 4, 5]) for i in range(len(source))] == pytest.approx(
        [10 * i for i in range(len(source))], abs=3
    )
    shown = [source.classes[label] for label in source.labels.tolist()]
    if name == "Imagenette":
        assert shown == ["tench", "English springer"]
    elif name == "GTSRB":  # whose classes have numbers only
        assert shown == ["0", "1"]
    else:
        assert [b for _, b in expected if b] == [a for a, (_, b) in zip(shown, expected, strict=True) if b]
    assert source.channels == 3 and open_data(f"torchvision/{name}:{tmp_path}", channels=1).image(0).shape[0] == 1
    before = source.fingerprint()
    assert before == open_data(f"torchvision/{name}:{tmp_path}").fingerprint() != None  # noqa: E711
    (tmp_path / expected[0][0]).unlink()
    assert source.fingerprint() is None
    with pytest.raises(DataError, match="No such file"):
        source.image(0)


def test_every_set_is_tried_here():
    arrays = {"MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS", "SVHN", "STL10", "CIFAR10", "CIFAR100"}
    assert {name for name in SETS if "EMNIST" not in name} == arrays | FILES.keys()


def test_the_page_lists_every_set_and_split():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    rows = page[page.index("| splits | sets |") :].split("\n\n")[0].splitlines()[2:]
    documented = {}
    for row in rows:
        names, sets = (re.sub(r"\(.*?\)", "", cell) for cell in row.strip("|").split("|"))
        for name, star in re.findall(r"`([^`]+)`(\*?)", sets):
            documented[name] = (re.findall("`(.*?)`", names), not star)
    assert documented == {name: (list(known.splits), known.fetched) for name, known in SETS.items()}


@pytest.mark.parametrize("name", SETS)
def test_missing_data_set_is_refused(name, tmp_path):
    """The message names the searched folder and the remedy; no file is left behind."""
    how = "--download" if SETS[name].fetched else "downloaded manually"
    with pytest.raises(DataError, match=f"was looked for in '{tmp_path}' and is not there: .*{how}"):
        open_data(f"torchvision/{name}:{tmp_path}", splits(f"torchvision/{name}")[-1])
    assert not list(tmp_path.iterdir())


def test_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="looked for in 'data'"):
        open_data("torchvision/MNIST")
    monkeypatch.setenv("INBATCH_DATA", "~/sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"looked for in '{tmp_path}/sets'"):
        open_data("torchvision/MNIST")


def test_wrong_names():
    for name, meant in (("cifar10", "CIFAR10"), ("STL-10", "STL10"), ("Flower102", "Flowers102")):
        with pytest.raises(DataError, match=f"did you mean torchvision/{meant}"):
            splits(f"torchvision/{name}")
    with pytest.raises(DataError, match="not a supported data set of torchvision: there are CIFAR10"):
        open_data("torchvision/WIDERFace")


def test_damaged(tmp_path):
    digits(tmp_path / "MNIST/raw", [1] * 5, [1] * 3)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 not an image")
    with pytest.raises(DataError, match=r"is not whole .*: remove '.*MNIST', and `inbatch pretrain --download`"):
        open_data(f"torchvision/MNIST:{tmp_path}")
    ten(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(DataError, match=r"is not whole \(.*data_batch_4' cannot be read"):
        open_data(f"torchvision/CIFAR10:{tmp_path}")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN", "DTD"])
def test_a_download_without_a_network(name, tmp_path):
    with pytest.raises(DataError, match=f"torchvision/{name} could not be fetched into '{tmp_path}': [^\\n]*$"):
        open_data(f"torchvision/{name}:{tmp_path}", download=True)


def test_a_download(tmp_path, monkeypatch, capsys):
    """A stub replaces torchvision's download; only missing files are fetched, and stdout stays empty."""
    asked = []

    def fetch(url, download_root, extract_root=None, filename=None, md5=None, remove_finished=False):
        asked.append((Path(url).name, md5))
        print("a word")
        ten(Path(download_root) / "cifar-10-batches-py")

    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    for _ in range(2):
        source = open_data(f"torchvision/CIFAR10:{tmp_path / 'new'}", download=True)
    assert source.labels.tolist() == LABELS[:20]
    assert asked == [("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")]
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="downloaded manually"):  # no checksum is known, or no server
        open_data(f"torchvision/FGVCAircraft:{tmp_path}", download=True)


def test_simultaneous_downloads_wait_for_each_other(tmp_path, monkeypatch):
    """The kernel's lock belongs to the opened file, so it excludes threads as it excludes processes."""
    asked = []

    def fetch(url, root, filename, md5):
        asked.append(url)
        time.sleep(0.2)
        ten(Path(root) / "cifar-10-batches-py")

    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    with ThreadPoolExecutor(3) as pool:
        sources = list(pool.map(lambda _: open_data(f"torchvision/CIFAR10:{tmp_path}", download=True), range(3)))
    assert [len(source) for source in sources] == [20] * 3 and len(asked) == 1


def test_an_old_file_of_torchvisions_is_not_run(tmp_path):
    """An old version of MNIST is stored as a pickle; torchvision still reads it, as tensors only."""
    for name in ("training.pt", "test.pt"):
        path = tmp_path / "MNIST/processed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(Call(os.system, f"echo > {tmp_path / 'sentinel'}"), path)
    with pytest.raises(DataError, match="is not whole"):
        open_data(f"torchvision/MNIST:{tmp_path}")
    assert not (tmp_path / "sentinel").exists()
