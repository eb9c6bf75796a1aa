"""Image files named individually, by a list or by a known data set."""

import hashlib
import os
from collections.abc import Iterable

from jaxtyping import Int
from torch import Tensor

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.source import Reading, Source, path_text, stat_fingerprint
from inbatch.data.sources.packed_names import Names
from inbatch.errors import DataError


class PathsSource(Source):
    """Image files, decoded on demand; a missing file is reported when it is opened.

    Args:
        name: Name of the source.
        root: Folder that relative paths refer to.
        paths: N paths, absolute or relative to `root`.
        labels: (N,) int64, -1 for unknown.
        classes: Names of the labels.
        reading: See `Reading`.

    Raises:
        DataError: If `paths` is empty.
    """

    def __init__(
        self, name: str, root: str | os.PathLike, paths: Iterable[str], labels: Int[Tensor, "n"],
        classes: tuple[str, ...], reading: Reading,
    ):  # fmt: skip
        super().__init__(name, file_channels(reading.channels), labels, classes)
        self.root, self.levels, self._paths = os.fspath(root), reading.levels, Names(map(os.fsencode, paths))
        if not self._paths:
            raise DataError(f"{name!r} names no image")

    def open(self, i: int) -> ImageFile:
        return ImageFile(self._path(i), lambda: path_text(os.fsencode(self._path(i))), self.channels, self.levels)

    def identity(self, i: int) -> str:
        return path_text(self._paths[i])

    def file_of(self, i: int) -> str:
        return os.path.abspath(self._path(i))

    def fingerprint(self) -> str | None:
        digest = hashlib.sha256(os.fsencode(os.path.realpath(self.root)))
        for i in range(len(self)):
            try:
                status = os.stat(self._path(i))
            except OSError:  # opening the image reports it
                return None
            digest.update(stat_fingerprint(self._paths[i], status))
        return digest.hexdigest()

    def _path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[i]))
