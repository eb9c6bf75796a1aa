"""Parquet files with encoded images, read by row group.

The images are a column of bytes, or of structs of `bytes` and `path` as written by Hugging Face. Labels are read as
`labels` describes; the class names may be in the file's `huggingface` metadata.
"""

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.source import Reading, Source, signed
from inbatch.data.sources.groups import group_numbers
from inbatch.data.sources.parquet_tables import (
    UNREADABLE,
    join_codes,
    number_labels,
    open_parquet,
    pyarrow_parquet,
    read_table,
)
from inbatch.data.sources.shard_files import (
    map_shards,
    open_shard,
    place_of,
    reached,
    shard_key,
    shard_state,
    unchanged,
)  # fmt: skip
from inbatch.data.sources.shards import Shards, divided, named, shards_below, shards_in, without_images
from inbatch.errors import DataError

CACHE_BYTES = 512 * 2**20
"""Encoded row groups cached per process, in bytes; a larger set is read from disk repeatedly when shuffled."""


class ParquetSource(Source):
    """Rows of one or more files in order; images stay encoded and on disk until they are opened."""

    _last: "_Rows | None"

    def __init__(
        self, files: Sequence[str | os.PathLike], name: str, reading: Reading, note: str = "",
        train: Sequence[str | os.PathLike] = (),
    ):  # fmt: skip
        self.levels, self.note, self.files = reading.levels, note, [*map(place_of, files)]
        described = [*map_shards(lambda file: (shard_key(file), read_table(file, reading)), self.files)]
        self._keys, tables = [key for key, _ in described], [table for _, table in described]
        self._columns = [table.image for table in tables]
        starts, groups = [0], []
        for number_of_file, table in enumerate(tables):
            for group, rows in enumerate(table.rows):
                groups.append((number_of_file, group))
                starts.append(starts[-1] + rows)
        if not starts[-1]:
            raise DataError(f"{name!r} holds no image: its Parquet files have no rows")
        training = [*map_shards(partial(read_table, reading=reading), [*map(place_of, train)])]
        like = number_labels(training, name, None) if training else None
        labels = number_labels(tables, name, like)
        super().__init__(name, file_channels(reading.channels), labels.numbers, labels.classes)
        self.ids, self.label_note = labels.ids, labels.note
        if reading.group_column is not None:
            codes, values = join_codes([table.groups for table in tables if table.groups is not None])
            self.groups = group_numbers(codes, values, f"The groups of {name!r}")
        self._starts, self._groups = starts, groups
        self._reset()

    def open(self, i: int) -> ImageFile:
        return self.unpack(i, self._rows(i)[i])

    def shard_sizes(self) -> list[int]:
        return np.diff(self._starts).tolist()

    def read_shards(self, numbers: Iterable[int]) -> Iterator[bytes | None]:
        for which, part in groupby(numbers, self._group):
            file = self._groups[which][0]
            with unchanged(self.files[file], self._keys[file]) as opened, self._reading(which):
                rows = self._rows_of(which, pyarrow_parquet().ParquetFile(opened))
            yield from (rows[i] for i in part)

    def unpack(self, i: int, data: bytes | None) -> ImageFile:
        if data is None:
            raise DataError(f"{self.identity(i)!r} has no bytes in the Parquet file: images must lie inside it")
        return ImageFile(data, lambda: self.identity(i), self.channels, self.levels)

    def identity(self, i: int) -> str:
        return self._rows(i).path(i)

    def fingerprint(self) -> str | None:
        digest = hashlib.sha256("".join(column for column in self._columns if column != "image").encode())
        try:
            for part in map_shards(lambda name: shard_state(name) + _footer(name), self.files):
                digest.update(part)
        except (OSError, ValueError, DataError):  # reading a row reports the problem
            return None
        return digest.hexdigest()

    def signature(self) -> str:
        """Compute the signature from the file footers instead of the image names.

        The footers contain the sizes and positions of the columns; names can only be read together with the images.
        """
        return signed(self, b"".join(map_shards(_footer, self.files)))

    def _rows(self, i: int) -> "_Rows":
        """Return the row group of row i, from memory if it is cached."""
        last = self._last
        if last is not None and last.first <= i < last.stop:  # the most frequent case, without a lock
            return last
        which = self._group(i)
        if self._process != os.getpid():  # a forked worker must not share the parent's open files
            self._reset()
        with self._lock:
            if which in self._cache:
                self._cache.move_to_end(which)
            else:
                self._cache[which] = self._read(which)
                while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > CACHE_BYTES:
                    self._cache.popitem(last=False)
            self._last = rows = self._cache[which]
            return rows

    def _group(self, i: int) -> int:
        """Return the number of the row group of row i."""
        return bisect_right(self._starts, i) - 1

    def _read(self, which: int) -> "_Rows":
        file, _ = self._groups[which]
        with self._reading(which):
            if file not in self._opened:
                self._opened[file] = open_parquet(self.files[file])
            return self._rows_of(which, self._opened[file])

    def _rows_of(self, which: int, opened: Any) -> "_Rows":
        """Read a row group from its opened file; raise ValueError if it has another number of rows."""
        file, group = self._groups[which]
        table = opened.read_row_group(group, columns=[self._columns[file]], use_threads=False)
        rows = _Rows(table[self._columns[file]].combine_chunks(), self._starts[which])
        if rows.stop != (stop := self._starts[which + 1]):
            raise ValueError(f"it holds {rows.stop - rows.first:,} rows, not {stop - rows.first:,}")
        return rows

    @contextmanager
    def _reading(self, which: int) -> Iterator[None]:
        """Raise DataError with the name of a row group if it cannot be read."""
        file, group = self._groups[which]
        with reached(self.files[file]):
            try:
                yield
            except UNREADABLE as e:
                raise DataError(
                    f"Row group {group} of {str(self.files[file])!r} cannot be read: {e}; copy or download the "
                    "file again"
                ) from e

    def _reset(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._opened: dict[int, Any] = {}
        self._cache: OrderedDict[int, _Rows] = OrderedDict()
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_opened", "_cache", "_last", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


class _Rows:
    """Encoded images of a row group in memory, numbered as in the source."""

    def __init__(self, images: Any, first: int):
        self.first, self.stop, self.nbytes = first, first + len(images), images.nbytes
        fields = {"bytes": images}
        if images.type.num_fields:  # a struct
            fields = dict(zip((field.name for field in images.type), images.flatten(), strict=True))
        self._paths, self._bytes = fields.get("path"), fields["bytes"].cast("large_binary")
        _, ends, data = self._bytes.buffers()
        self._ends = memoryview(ends).cast("B").cast("q")[self._bytes.offset :]
        self._data = memoryview(data if data is not None else b"")

    def __getitem__(self, i: int) -> bytes | None:
        place = i - self.first
        start, end = self._ends[place], self._ends[place + 1]
        # Empty: missing, or a file of 0 bytes.
        return bytes(self._data[start:end]) if start < end else self._bytes[place].as_py()

    def path(self, i: int) -> str:
        path = None if self._paths is None else self._paths[i - self.first].as_py()
        return path or f"row {i}"


def find_parquet(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits: a `.parquet` file is `train`.

    A folder, or a sub-folder of it, holds files or shards that are named as splits, or in folders of such names. In a
    folder without images, the files can have any names.
    """
    if not isinstance(data, str | os.PathLike):
        return None
    path = Path(data)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return parquet_splits(Shards({"train": [path]}, {}), str(path), reading)
    if not path.is_dir():
        return None
    files = shards_in(path, ".parquet")
    shards = named(files, path) if files else shards_below(path, ".parquet")
    if shards is None and files and without_images(path):
        shards = divided(files, path)
    return None if shards is None else parquet_splits(shards, str(path), reading)


def parquet_splits(shards: Shards, name: str, reading: Reading) -> dict[str, Callable[[], Source]]:
    """Return what opens each split of Parquet files."""
    note, train = shards.note(), shards.files.get("train", [])
    return {
        split: partial(ParquetSource, files, shards.name(split, name), reading, note, train if files != train else ())
        for split, files in shards.files.items()
    }


def _footer(place: str) -> bytes:
    """Return the footer of a Parquet file, which describes its contents and their positions."""
    with open_shard(place) as file, reached(place):
        file.seek(-8, os.SEEK_END)  # the length of the footer, and the four final magic bytes
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return file.read(length)
