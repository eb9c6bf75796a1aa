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
from inbatch.data.sources.arrays import ArraySource, Pixels, open_arrays
from inbatch.data.sources.groups import groups_of_array
from inbatch.data.sources.labels import NO_LABELS, Labels, from_array
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
        if reading.image_column or reading.group_column or reading.label_column not in (None, NO_LABELS):
            raise DataError(
                f"{file!r} is one array without names: leave out image_column, label_column and group_column"
            )
        return {"train": lambda: NpySource(file, reading)}
    if kind != ".npz":
        return None
    sizes = _members(file)
    names = {split: _names(file, split, sizes, reading) for split in NAMES}
    if not names["train"]:
        held = ", ".join(sizes) or "nothing"
        raise DataError(
            f"{file!r} holds {held}: name the images one of {', '.join(NAMES['train'])}, or set image_column"
        )
    return {
        split: partial(_open, file, split, arrays, names["train"], sizes, reading)
        for split, arrays in names.items()
        if arrays
    }


def _names(file: str, split: str, sizes: dict[str, int], reading: Reading) -> list[str]:
    """Return the name of a split's images and, if there are any, of its labels; the settings name those of train."""
    own = [reading.image_column, reading.label_column] if split == "train" else [None, None]
    for name in (*own, reading.group_column):
        if name not in (None, NO_LABELS, *sizes):
            raise DataError(f"{file!r} has no array {name!r}, only {', '.join(sizes)}")
    images = own[0] or next((name for name in NAMES[split] if name in sizes), None)
    if images is None:
        return []
    usual = NAMES[split].get(images) or tuple(name for names in NAMES[split].values() for name in names)
    labels = own[1] or next((name for name in usual if name in sizes), NO_LABELS)
    return [images] if NO_LABELS in (labels, reading.label_column) else [images, labels]


def _open(
    file: str, split: str, names: list[str], train: list[str], sizes: dict[str, int], reading: Reading
) -> Source:  # fmt: skip
    needed, free = sum(sizes[name] for name in names), free_bytes(torch.device("cpu"))
    if needed > free:
        raise DataError(
            f"{file!r} would unpack to {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "save the images as .npy, of which no more is read than is used"
        )
    with _load(file) as opened:
        try:
            images, *labels = (np.asarray(opened[name]) for name in names)
            group = None if reading.group_column is None else np.asarray(opened[reading.group_column])
            shared = np.asarray(opened[train[1]]) if split != "train" and labels and len(train) > 1 else None
        except Exception as e:  # a damaged file can raise any exception
            raise DataError(f"{file!r} cannot be read: {e}") from e
    like = None if shared is None else from_array(shared, len(shared), f"The labels of the train split of {file!r}")
    source = _converted(images, reading, file, labels[0] if labels else None, like)
    source.name = file if split == "train" else f"{file} ({split})"
    if group is not None:
        source.groups = groups_of_array(group, len(source), f"The groups {reading.group_column!r} of {file!r}")
    return source


def _converted(
    images: np.ndarray, reading: Reading, file: str, labels: np.ndarray | None = None, like: Labels | None = None
) -> ArraySource:  # fmt: skip
    """Convert images of any supported layout as for in-memory arrays; raise DataError with the name of the file."""
    try:
        # torch supports neither a foreign byte order nor read-only arrays
        images = np.require(images, images.dtype.newbyteorder("="), "W")
        return open_arrays(images, labels, reading, like)
    except (DataError, TypeError, ValueError) as e:
        raise DataError(f"{file!r}: {e}") from e


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
