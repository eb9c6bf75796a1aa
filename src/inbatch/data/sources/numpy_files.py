"""NumPy files: one array of images (`.npy`), or images with labels (`.npz`); nothing is unpickled."""

import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbatch.data.source import Reading, Source, unlabelled
from inbatch.data.sources import arrays
from inbatch.data.sources.arrays import ArraySource, Pixels
from inbatch.errors import DataError
from inbatch.runtime.memory import free_bytes

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "x_train": ("y_train",), "train_images": ("train_labels",), "images": ("labels", "y", "targets"),
        "x": ("y", "labels", "targets"), "data": ("targets", "labels", "y"), "arr_0": ("arr_1", "labels"),
    },
    "val": {"x_val": ("y_val",), "val_images": ("val_labels",)},
    "test": {"x_test": ("y_test",), "test_images": ("test_labels",)},
}  # fmt: skip
"""Names of a split's images, and of their labels, in a `.npz` file; the first one present is used.

The names are those of Keras and MedMNIST, and common names of arrays with and without names.
"""


class NpySource(Source):
    """Images of one memory-mapped array; only the pages in use are in memory."""

    def __init__(self, file: str, reading: Reading):
        self.file, self.reading = file, reading
        self._images: np.ndarray | None = None
        images = np.atleast_1d(self._map())
        if not len(images):
            raise DataError(f"{file!r} holds no image (its first side is 0)")
        super().__init__(file, _converted(images[:1], reading, file).channels, unlabelled(len(images)), ())

    def open(self, i: int) -> Pixels:
        return _converted(self._map()[i : i + 1], self.reading, self.file).open(0)

    def identity(self, i: int) -> str:
        return str(i)

    def _map(self) -> np.ndarray:
        if self._images is None:
            self._images = _load(self.file, mmap_mode="r")
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}  # each data worker maps the file itself


def find_numpy(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a file: a `.npy` file is `train`, a `.npz` file has the splits for which it names images."""
    if not isinstance(data, str | os.PathLike) or not Path(data).is_file():
        return None
    file, kind = os.fspath(data), Path(data).suffix.lower()
    if kind == ".npy":
        return {"train": lambda: NpySource(file, reading)}
    if kind != ".npz":
        return None
    sizes = _members(file)
    found = {}
    for split, known in NAMES.items():
        if (images := next((name for name in known if name in sizes), None)) is not None:
            labels = [name for name in known[images] if name in sizes][:1]
            found[split] = partial(_open, file, split, [images, *labels], sizes, reading)
    if "train" not in found:
        held = ", ".join(sizes) or "nothing"
        raise DataError(f"{file!r} holds {held}: name the images one of {', '.join(NAMES['train'])}")
    return dict(found)


def _open(file: str, split: str, names: list[str], sizes: dict[str, int], reading: Reading) -> Source:
    needed, free = sum(sizes[name] for name in names), free_bytes(torch.device("cpu"))
    if needed > free:
        raise DataError(
            f"{file!r} would unpack to {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "save the images as .npy, of which no more is read than is used"
        )
    with _load(file) as opened:
        try:
            images, *labels = (np.asarray(opened[name]) for name in names)
        except Exception as e:  # a damaged file can raise any exception
            raise DataError(f"{file!r} cannot be read: {e}") from e
    source = _converted(images, reading, file, *map(_column, labels))
    source.name = file if split == "train" else f"{file} ({split})"
    return source


def _column(labels: np.ndarray) -> np.ndarray:
    """Return labels (n, 1), as in MedMNIST, as (n,); convert integers to int64, which torch can compare."""
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels


def _converted(images: np.ndarray, reading: Reading, file: str, labels: np.ndarray | None = None) -> ArraySource:
    """Convert images of any supported layout as for in-memory arrays; raise DataError with the name of the file."""
    try:
        # torch supports neither a foreign byte order nor read-only arrays
        images = np.require(images, images.dtype.newbyteorder("="), "W")
        source = arrays.find_arrays(images if labels is None else (images, labels), reading)["train"]()  # type: ignore[index]
    except (DataError, TypeError, ValueError) as e:
        raise DataError(f"{file!r}: {e}") from e
    assert isinstance(source, ArraySource)
    return source


def _load(file: str, **how: Any) -> Any:
    try:
        return np.load(file, allow_pickle=False, **how)
    except Exception as e:  # a damaged file can raise any exception
        raise DataError(f"{file!r} cannot be read: {e}") from e


def _members(file: str) -> dict[str, int]:
    """Return the arrays in a `.npz` file and their uncompressed sizes in bytes."""
    try:
        with zipfile.ZipFile(file) as opened:
            return {info.filename.removesuffix(".npy"): info.file_size for info in opened.infolist()}
    except (OSError, zipfile.BadZipFile) as e:
        raise DataError(f"{file!r} cannot be read: {e}") from e
