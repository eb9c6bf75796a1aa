"""torchvision's labelled data sets by name: `torchvision/STL10`, or `torchvision/STL10:FOLDER`.

They are stored where torchvision puts them, under FOLDER, $INBATCH_DATA or ./data. They are downloaded only on request,
by torchvision, and only if it has the checksum of the archive. CIFAR files, which are pickles, are read by `cifar`.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inbatch.data.source import Reading, Source
from inbatch.data.sources import cifar
from inbatch.data.sources.arrays import ArraySource
from inbatch.data.sources.labels import from_array
from inbatch.data.sources.path_source import PathsSource
from inbatch.errors import DataError, closest
from inbatch.runtime.files import one_process_at_a_time
from inbatch.runtime.paths import path_of, variable

PREFIX = "torchvision/"


class Known(NamedTuple):
    """Data set of torchvision.

    Attributes:
        place: File or folder under the root that exists if the data set is present.
        splits: Names of the splits here -> arguments of the torchvision class.
        maker: Name of the torchvision class, by default the name of the data set.
        fetched: Whether torchvision can download the data set and verify its checksum.
    """

    place: str
    splits: dict[str, dict[str, Any]]
    maker: str | None = None
    fetched: bool = True


def _named(*same: str, **other: str) -> dict[str, dict[str, Any]]:
    """Return splits with the same name in torchvision, and those with another name there."""
    return {name: {"split": its} for name, its in ({name: name for name in same} | other).items()}


_TWO: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_ONE: dict[str, dict[str, Any]] = {"train": {}}

SETS = {
    "CIFAR10": Known(cifar.KINDS["CIFAR10"].folder, _TWO),
    "CIFAR100": Known(cifar.KINDS["CIFAR100"].folder, _TWO),
    "MNIST": Known("MNIST", _TWO),
    "FashionMNIST": Known("FashionMNIST", _TWO),
    "KMNIST": Known("KMNIST", _TWO),
    "QMNIST": Known("QMNIST", _TWO),
    **{
        f"EMNIST-{part}": Known("EMNIST", {k: {"split": part} | v for k, v in _TWO.items()}, "EMNIST")
        for part in ("balanced", "byclass", "bymerge", "letters", "digits", "mnist")
    },
    "USPS": Known("usps.bz2", _TWO),
    "SVHN": Known("train_32x32.mat", _named("train", "test", "extra")),
    "STL10": Known("stl10_binary", _named("train", "test", "unlabeled", "train+unlabeled")),
    "Food101": Known("food-101", _named("train", "test")),
    "Flowers102": Known("flowers-102", _named("train", "test", "val")),
    "OxfordIIITPet": Known("oxford-iiit-pet", _named(train="trainval", test="test")),
    "DTD": Known("dtd", _named("train", "test", "val")),
    "EuroSAT": Known("eurosat", _ONE),
    "Caltech101": Known("caltech101", _ONE),
    "GTSRB": Known("gtsrb", _named("train", "test")),
    "FGVCAircraft": Known("fgvc-aircraft-2013b", _named("train", "test", "val", "trainval"), fetched=False),
    "Country211": Known("country211", _named("train", "test", val="valid")),
    "StanfordCars": Known("stanford_cars", _named("train", "test"), fetched=False),
    "SUN397": Known("SUN397", _ONE),
    "Imagenette": Known("imagenette2", _named("train", test="val")),
}
"""All data sets that can be opened by name."""


def find_torchvision(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a torchvision data set, present or not.

    Return None for names without the prefix `torchvision/`.
    """
    if not isinstance(data, str) or not data.startswith(PREFIX):
        return None
    name, _, where = data.removeprefix(PREFIX).partition(":")
    if name not in SETS:
        close = closest(name, SETS)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"there are {', '.join(SETS)}"
        raise DataError(f"{data!r} is not a supported data set of torchvision: {hint}")
    root = path_of(where or variable("INBATCH_DATA") or "data", "the folder of torchvision's sets")
    return {split: partial(_open, name, split, root, reading) for split in SETS[name].splits}


def _open(name: str, split: str, root: Path, reading: Reading) -> Source:
    """Open one split of a data set; download it first if requested and missing."""
    try:
        dataset = _load(name, split, root)
    except Exception as e:  # a damaged file can raise any exception
        exists, fetched = (root / SETS[name].place).exists(), SETS[name].fetched
        if not (reading.download and fetched):
            how = (
                "`inbatch pretrain --download` (download=True) fetches it"
                if fetched
                else "it must be downloaded manually"
            )
            detail = "" if "download=True" in str(e) else f" ({e})"
            wrong = f"whole{detail}: remove {str(root / SETS[name].place)!r}, and" if exists else "there:"
            raise DataError(f"{PREFIX}{name} ({split}) was looked for in {str(root)!r} and is not {wrong} {how}") from e
        _fetch(name, split, root)
        return _open(name, split, root, Reading(reading.channels, reading.levels))
    source = dataset if isinstance(dataset, Source) else _source(dataset, f"{PREFIX}{name} ({split})", root, reading)
    if reading.channels not in (None, source.channels):
        raise DataError(
            f"{source.name} has {source.channels} channels, {reading.channels} were requested "
            f"(a run with --set channels={source.channels} reads them)"
        )
    return source


def _load(name: str, split: str, root: Path, download: bool = False) -> Any:
    """Return the torchvision object, or for CIFAR the source of `cifar`."""
    known = SETS[name]
    if not download and not (root / known.place).exists():
        raise FileNotFoundError(f"no {root / known.place}")
    if name in cifar.KINDS and not download:
        return cifar.open_split(root / known.place, cifar.KINDS[name], split, Reading())
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    maker = getattr(datasets, known.maker or name)
    if name in cifar.KINDS:  # its constructor unpickles
        return download_and_extract_archive(maker.url, str(root), filename=maker.filename, md5=maker.tgz_md5)
    return maker(root=str(root), download=download, **known.splits[split])


def _fetch(name: str, split: str, root: Path) -> None:
    """Download a data set through torchvision; processes that need the same one wait for each other."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(root / ".inbatch.lock"), contextlib.redirect_stdout(sys.stderr):
            try:
                _load(name, split, root)  # another process may have finished first
            except Exception:
                _load(name, split, root, download=True)
    except Exception as e:
        raise DataError(
            f"{PREFIX}{name} could not be fetched into {str(root)!r}: {' '.join(str(e).split())}; repeat the command "
            "with a network, or put the files there"
        ) from e


def _source(dataset: Any, name: str, root: Path, reading: Reading) -> Source:
    """Wrap a torchvision object as a source: arrays unchanged, files by their paths."""
    if getattr(dataset, "data", None) is not None:
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images
        labels, classes = _labels(dataset, getattr(dataset, "targets", None), name)
        return ArraySource(images, labels, classes, name)
    files = sorted(_files(dataset))  # torchvision's order may be that of the file system
    labels, classes = _labels(dataset, [label for _, label in files], name)
    paths = (path.removeprefix(f"{root}{os.sep}") for path, _ in files)
    return PathsSource(name, root, paths, labels, classes, reading)


def _files(dataset: Any) -> list[tuple[str, int]]:
    """Return the paths and labels from the attributes of the torchvision object."""
    if hasattr(dataset, "categories"):  # Caltech's numbers are converted to names when an image is opened
        folder = Path(dataset.root, "101_ObjectCategories")
        names = [
            folder / dataset.categories[y] / f"image_{i:04d}.jpg" for y, i in zip(dataset.y, dataset.index, strict=True)
        ]
        return [(str(path), y) for path, y in zip(names, dataset.y, strict=True)]
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if pairs is None:
        paths = dataset._images if hasattr(dataset, "_images") else dataset._image_files
        pairs = zip(paths, dataset._labels, strict=True)
    return [(str(path), int(label)) for path, label in pairs]


def _labels(dataset: Any, targets: Any, name: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels (N,) and class names; the names are numbers if torchvision has none."""
    values = np.asarray(dataset.labels if targets is None else targets)
    values = values[:, 0] if values.ndim == 2 else values  # QMNIST's other columns describe the writer
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or range(int(values.max()) + 1)
    names = [str(c if isinstance(c, str | int) else c[0]) for c in classes]
    labels = from_array(values, len(values), f"The labels of {name}", names)
    return labels.numbers, labels.classes or tuple(names)
