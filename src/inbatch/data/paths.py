"""Image files named one by one, by a list or by a known set."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int
from torch import Tensor

from inbatch.data.decode import Picture
from inbatch.data.source import Source
from inbatch.errors import DataError


class PathsSource(Source):
    """Image files, decoded when asked for; whether one is there is seen when it is opened.

    paths: N names, absolute or relative to `root`. They are kept as one string of bytes: Python strings would be
    copied into every data worker (pytorch#13246).
    """

    def __init__(
        self, name: str, root: str | os.PathLike, paths: Iterable[str], labels: Int[Tensor, "n"],
        classes: tuple[str, ...], channels: int,
    ):  # fmt: skip
        encoded = [os.fsencode(path) for path in paths]
        if not encoded:
            raise DataError(f"{name!r} names no image")
        super().__init__(name, channels, labels, classes)
        self.root, self._bytes = os.fspath(root), b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def open(self, i: int) -> Picture:
        return Picture(self._path(i), lambda: printable(os.fsencode(self._path(i))), self.channels)

    def identity(self, i: int) -> str:
        return printable(self._given(i))

    def fingerprint(self) -> str | None:
        said = hashlib.sha256(os.fsencode(os.path.realpath(self.root)))
        for i in range(len(self)):
            try:
                status = os.stat(self._path(i))
            except OSError:  # opening it will say so
                return None
            said.update(b"%s\0%d\0%d\0" % (self._given(i), status.st_size, status.st_mtime_ns))
        return said.hexdigest()

    def _given(self, i: int) -> bytes:
        return self._bytes[self._ends[i] : self._ends[i + 1]]

    def _path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._given(i)))


def printable(path: bytes) -> str:
    """A name that can be printed and stored whatever bytes it is made of."""
    return path.decode("utf-8", "backslashreplace")
