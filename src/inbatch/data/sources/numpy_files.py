"""NumPy files: one array of images (`.npy`), or images with labels (`.npz`); nothing is unpickled."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inbatch.data.pixels import to_bytes
from inbatch.data.source import Reading, Source, unlabelled
from inbatch.data.sources.arrays import LABELS, ArraySource, Pixels, channels_first, check_shape, open_arrays
from inbatch.data.sources.groups import groups_of_array
from inbatch.data.sources.labels import NO_LABELS, Labels, from_array
from inbatch.errors import DataError
from inbatch.runtime.files import open_regular
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.stored_array import StoredArray, stored_member

_BLOCK = 1 << 20  # bytes whose checksum is computed at a time
_AGAIN = "write it again with numpy.save or numpy.savez, as arrays of numbers"

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
    """Images of one array in a file, each of which is read when it is needed."""

    def __init__(
        self, array: StoredArray, reading: Reading, labels: np.ndarray | None = None, like: Labels | None = None
    ):
        self.array, self.reading = array, reading
        try:
            check_shape(array.shape)  # of one row, it cannot be told that the array is one image (H, W, C)
        except DataError as e:
            raise DataError(f"{array.file!r}: {e}") from e
        channels, count = _converted(self._row(0)[None], reading, array.file).channels, array.shape[0]
        known = Labels(unlabelled(count))
        if labels is not None:
            try:
                known = from_array(labels, count, LABELS, like=like)
            except (DataError, TypeError, ValueError) as e:
                raise DataError(f"{array.file!r}: {e}") from e
        super().__init__(array.file, channels, known.numbers, known.classes)
        self.ids, self.label_note = known.ids, known.note

    def open(self, i: int) -> Pixels:
        row = torch.from_numpy(to_bytes(self._row(i), self.reading.levels))
        return Pixels(channels_first(row[None])[0])

    def _row(self, i: int) -> np.ndarray:
        try:
            return self.array.row(i)
        except OSError as e:
            raise DataError(f"{self.array.file!r} cannot be read: {e}") from e

    def identity(self, i: int) -> str:
        return str(i)


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
        return {"train": partial(_open_npy, file, reading)}
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
    """Return the name of a split's images and, if there are any, of its labels.

    The settings name those of train. Another split has the labels whose name has its word in the place of train.
    Without such labels it has the usual ones, or none if train has usual ones that are not those of the settings.
    """
    own = [reading.image_column, reading.label_column] if split == "train" else [None, None]
    for name in (*own, reading.group_column):
        if name not in (None, NO_LABELS, *sizes):
            raise DataError(f"{file!r} has no array {name!r}, only {', '.join(sizes)}")
    images = own[0] or next((name for name in NAMES[split] if name in sizes), None)
    if images is None:
        return []
    usual = NAMES[split].get(images) or tuple(name for names in NAMES[split].values() for name in names)
    labels = own[1] or next((name for name in usual if name in sizes), NO_LABELS)
    if split != "train" and (column := reading.label_column) not in (None, NO_LABELS):
        usual_of_train = _names(file, "train", sizes, replace(reading, label_column=None))[1:]
        if (other := column.replace("train", split)) != column and other in sizes:
            labels = other
        elif usual_of_train and column not in usual_of_train:
            labels = NO_LABELS
    return [images] if NO_LABELS in (labels, reading.label_column) else [images, labels]


def _open_npy(file: str, reading: Reading) -> Source:
    mapped = _load(file, mmap_mode="r")
    images = np.atleast_1d(mapped)
    if not len(images):
        raise DataError(f"{file!r} holds no image (its first side is 0)")
    _converted(images[:1], reading, file)  # raises for arrays that are not images
    if images.flags.c_contiguous:
        return NpySource(StoredArray(file, mapped.offset, images.shape, images.dtype), reading)
    _check_memory(file, images.nbytes)  # column by column: no image can be read alone
    source = _converted(np.asarray(images), reading, file)
    source.name = file
    return source


def _open(
    file: str, split: str, names: list[str], train: list[str], sizes: dict[str, int], reading: Reading
) -> Source:  # fmt: skip
    array = _stored(file, names[0])
    groups = [] if reading.group_column is None else [reading.group_column]
    shared = train[1:] if split != "train" and names[1:] else []
    _check_memory(file, sum(sizes[name] for name in names[array is not None :]))
    arrays = _arrays(file, [*names[array is not None :], *groups, *shared])
    like = None
    for name in shared:
        like = from_array(arrays[name], len(arrays[name]), f"The labels of the train split of {file!r}")
    labels = arrays[names[1]] if names[1:] else None
    if array is None:
        source: Source = _converted(arrays[names[0]], reading, file, labels, like)
    else:
        source = NpySource(array, reading, labels, like)
    source.name = file if split == "train" else f"{file} ({split})"
    for name in groups:
        source.groups = groups_of_array(arrays[name], len(source), f"The groups {name!r} of {file!r}")
    return source


def _stored(file: str, name: str) -> StoredArray | None:
    """Return the images of an archive after a check of their checksum; None if they must be loaded as a whole."""
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            if f"{name}.npy" not in archive.namelist():  # NumPy also reads members without the ending
                return None
            array = stored_member(file, opened, archive, name)
            if array is None or not array.shape or not array.shape[0]:
                return None
            with archive.open(f"{name}.npy") as member:
                while member.read(_BLOCK):  # raises at the end if the checksum is wrong
                    pass
            return array
    except Exception as e:  # a damaged file can raise any exception
        raise DataError(f"{file!r} cannot be read: {str(e).rstrip('.')}; {_AGAIN}") from e


def _arrays(file: str, names: list[str]) -> dict[str, np.ndarray]:
    with _load(file) as opened:
        try:
            return {name: np.asarray(opened[name]) for name in names}
        except Exception as e:  # a damaged file can raise any exception
            raise DataError(f"{file!r} cannot be read: {str(e).rstrip('.')}; {_AGAIN}") from e


def _check_memory(file: str, needed: int) -> None:
    """Raise DataError if arrays of `needed` bytes cannot be loaded."""
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise DataError(
            f"{file!r} would unpack to {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free: "
            "save the images as .npy, of which no more is read than is used"
        )


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
        raise DataError(f"{file!r} cannot be read: {str(e).rstrip('.')}; {_AGAIN}") from e


def _members(file: str) -> dict[str, int]:
    """Return the arrays in a `.npz` file and their uncompressed sizes in bytes."""
    try:
        with zipfile.ZipFile(file) as opened:
            return {info.filename.removesuffix(".npy"): info.file_size for info in opened.infolist()}
    except (OSError, zipfile.BadZipFile) as e:
        raise DataError(f"{file!r} cannot be read: {str(e).rstrip('.')}; {_AGAIN}") from e
