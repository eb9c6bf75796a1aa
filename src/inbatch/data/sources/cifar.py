"""CIFAR-10 and CIFAR-100 in the published "python version".

The files are pickles, and unpickling a file can run any code that its author put in. Here no code can run: the few
names that an array consists of are mapped to recorder classes of this module, any other name is refused, and the array
is built from the recorded bytes.
"""

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from inbatch.data.source import Reading, Source, path_text
from inbatch.data.sources.arrays import ArraySource
from inbatch.errors import DataError

_PIXELS = 3 * 32 * 32


class Kind(NamedTuple):
    """File layout of one of the two data sets; `folder` is the name of the unpacked archive."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str


KINDS = {
    "CIFAR10": Kind(
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "labels",
        "batches.meta", "label_names",
    ),
    "CIFAR100": Kind("cifar-100-python", ("train",), ("test",), "fine_labels", "meta", "fine_label_names"),
}  # fmt: skip


def find_cifar(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a folder with CIFAR files, or of a folder that contains such a folder under its own name."""
    if not isinstance(data, str | os.PathLike) or not (root := Path(data)).is_dir():
        return None
    matches = [
        (folder, kind)
        for kind in KINDS.values()
        for folder in (root, root / kind.folder)
        if (folder / kind.train[0]).is_file() and (folder / kind.meta).is_file()
    ]
    if len(matches) > 1:
        raise DataError(
            f"{str(root)!r} holds both {' and '.join(kind.folder for _, kind in matches)}: name one of them"
        )
    if not matches:
        return None
    folder, kind = matches[0]
    tested = (folder / kind.test[0]).is_file()
    return {split: partial(open_split, folder, kind, split, reading) for split in ("train", *(["test"] * tested))}


def open_split(folder: Path, kind: Kind, split: str, reading: Reading) -> Source:
    """Open one split of a folder with CIFAR files: (N, 3, 32, 32) in memory."""
    if reading.channels not in (None, 3):
        raise DataError(
            f"CIFAR's images have 3 channels, {reading.channels} were requested "
            "(a run with --set channels=3 reads them)"
        )
    names = _read(folder / kind.meta).get(kind.names)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(
            f"{str(folder / kind.meta)!r} holds no list {kind.names!r}: it is not a CIFAR file; unpack the archive "
            "again"
        )
    images, labels = [], []
    for file in kind.train if split == "train" else kind.test:
        pixels, numbers = _batch(folder / file, kind.labels, len(names))
        images.append(pixels)
        labels += numbers
    pixels = np.concatenate(images).reshape(-1, 3, 32, 32)
    return ArraySource(torch.from_numpy(pixels), torch.tensor(labels), tuple(map(_text, names)), str(folder))


def _batch(file: Path, key: str, classes: int) -> tuple[np.ndarray, list[int]]:
    """Return the pixels (n, 3072) and the labels of one file."""
    content = _read(file)
    data, labels = content.get("data"), content.get(key)
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataError(f"{str(file)!r} lacks 'data' or {key!r}: it is not a CIFAR file; unpack the archive again")
    pixels = data.pixels(str(file))
    if len(labels) != len(pixels) or not all(type(x) is int and -1 <= x < classes for x in labels):
        raise DataError(
            f"{str(file)!r} needs a label from 0 to {classes - 1} for each of its {len(pixels):,} images; unpack the "
            "archive again"
        )
    return pixels, labels


def _read(file: Path) -> dict[str, Any]:
    """Return the dictionary of a pickle without running any of it; raise DataError if it contains anything else."""
    try:
        with open(file, "rb") as opened:
            content = _Inert(opened, encoding="bytes").load()
    except OSError as e:
        raise DataError(f"{str(file)!r} cannot be read: {e.strerror}; unpack the archive again") from e
    except Exception as e:  # a damaged pickle can raise any exception
        problem = e or type(e).__name__
        raise DataError(f"{str(file)!r} is not a CIFAR file, or is damaged: {problem}; unpack the archive again") from e
    if not isinstance(content, dict):
        raise DataError(f"{str(file)!r} is not a CIFAR file: it holds no dictionary; unpack the archive again")
    return {_text(key): value for key, value in content.items() if isinstance(key, bytes | str)}


def _text(name: bytes | str) -> str:
    return path_text(name) if isinstance(name, bytes) else name


class _Array:
    """Recorder of a pickled array."""

    parts: tuple[Any, ...] = ()

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, data = state
        self.parts = (data, dtype, shape, by_column)

    def pixels(self, file: str) -> np.ndarray:
        """Return the recorded array (n, 3072) as a view of its bytes; raise DataError if it is not such an array."""
        data, dtype, shape, by_column = self.parts or (b"", None, (), False)
        if (
            not isinstance(data, bytes | bytearray)
            or not isinstance(dtype, _Dtype)
            or dtype.name not in ("u1", "uint8")
            or len(data) % _PIXELS
            or shape != (len(data) // _PIXELS, _PIXELS)
            or by_column not in (False, 0, "C")
        ):
            raise DataError(
                f"{file!r}: 'data' is not an array of {_PIXELS:,} bytes per image; unpack the archive again"
            )
        return np.frombuffer(data, np.uint8).reshape(-1, _PIXELS)


class _Buffer(_Array):
    """Recorder of an array in pickle protocol 5."""

    def __init__(self, data: object, dtype: object, shape: object, order: object):
        self.parts = (data, dtype, shape, order)


class _Dtype:
    """Recorder of an array's data type."""

    def __init__(self, name: object = "", *_: object):
        self.name = _text(name) if isinstance(name, bytes | str) else ""

    def __setstate__(self, _: object) -> None:
        pass


class _Encoded:
    """Bytes in pickles that Python 3 writes for Python 2: text in Latin-1."""

    def __new__(cls, text: str, _: str) -> bytes:  # type: ignore[misc]
        return text.encode("latin-1")

    def __setstate__(self, _: object) -> None:
        pass


class _Inert(pickle.Unpickler):
    """Unpickler that maps the parts of an array to recorders and refuses every other name."""

    _KNOWN = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _Encoded,
    } | {
        (f"numpy.{core}.{module}", name): recorder
        for core in ("core", "_core")
        for module, name, recorder in (("multiarray", "_reconstruct", _Array), ("numeric", "_frombuffer", _Buffer))
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return the recorder for a name."""
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        return self._KNOWN[module, name]
