"""WebDataset: samples in tar files, read in place. Nothing is extracted or uncompressed.

`tar_samples` describes which members are images and labels.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.source import Reading, Source
from inbatch.data.sources.groups import group_numbers, groups_of_paths, is_path_rule
from inbatch.data.sources.labels import number
from inbatch.data.sources.packed_names import Names
from inbatch.data.sources.shard_files import place_of, read_part, shard_state, unchanged
from inbatch.data.sources.shards import Shards, divided, has_range, ranges, shards_below, shards_in, without_images
from inbatch.data.sources.tar_samples import choose_images, read_members
from inbatch.errors import DataError, many

_PACKED = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)


class TarSource(Source):
    """Images of the shards in order; only the position and the name of each image are kept in memory.

    Args:
        shards: Tar files.
        name: Name of the source.
        reading: See `Reading`; `image_column` is the extension of the images.
        note: See `Source`.
        train: Tar files of the train split, whose numbering of the classes is used; empty to number this split's.

    Raises:
        DataError: If a file cannot be read, or if it is not clear which of several images of a key is meant.
    """

    def __init__(
        self, shards: Sequence[str | os.PathLike], name: str, reading: Reading, note: str = "",
        train: Sequence[str | os.PathLike] = (),
    ):  # fmt: skip
        self.shards, self.levels, self.note = [*map(place_of, shards)], reading.levels, note
        every = read_members(self.shards, name, reading)
        self._keys = every.keys_of_shards
        chosen = choose_images(every, reading.image_column, name)
        self._skipped, self._rule, self._column = chosen.skipped, chosen.rule, reading.image_column or ""
        if not len(chosen.places):
            raise DataError(f"No image in {name!r}{self._left_out()}: put KEY.jpg, KEY.png and so on there")
        whole = len(chosen.places) == len(every.names)
        self._names = every.names if whole else Names(every.names[i] for i in chosen.places.tolist())
        self._starts, self._sizes = np.array(every.starts)[chosen.places], np.array(every.sizes)[chosen.places]
        self._first = np.searchsorted(chosen.places, every.first).tolist()
        codes, like = np.array(every.labels)[chosen.places], None
        if train and (codes >= 0).any():
            first = read_members(train, name, reading)
            like = number(first.labels, first.distinct.values, f"The labels of {name!r}")
        labels = number(codes, every.distinct.values, f"The labels of {name!r}", like=like)
        super().__init__(name, file_channels(reading.channels), labels.numbers, labels.classes)
        self.ids, self.label_note = labels.ids, labels.note
        if reading.group_column is not None:
            self.groups = self._groups(reading, reading.group_column, chosen.places)

    def _groups(self, reading: Reading, column: str, places: np.ndarray) -> Tensor:
        """Return the groups of the images: by the names of their members, or by KEY.txt or KEY.json as labels are."""
        if is_path_rule(column):
            return groups_of_paths((self._member(i) for i in range(len(self))), column, self.name)
        named = read_members(self.shards, self.name, replace(reading, label_column=column), "group_column")
        what = f"The groups {column!r} of {self.name!r}"
        return group_numbers(np.array(named.labels)[places], named.distinct.values, what)

    def open(self, i: int) -> ImageFile:
        return self.unpack(i, read_part(self._shard(i), int(self._starts[i]), int(self._sizes[i])))

    def shard_sizes(self) -> list[int]:
        return np.diff(self._first).tolist()

    def shard_layout(self) -> str:
        return hashlib.sha256(self._starts.tobytes() + self._sizes.tobytes()).hexdigest()

    def read_shards(self, numbers: Iterable[int]) -> Iterator[bytes]:
        for which, part in groupby(numbers, self._which):
            with unchanged(self.shards[which], self._keys[which]) as file:
                for i in part:
                    file.seek(int(self._starts[i]))
                    yield file.read(int(self._sizes[i]))

    def unpack(self, i: int, data: Any) -> ImageFile:
        if len(data) < self._sizes[i]:
            raise DataError(
                f"{str(self._shard(i))!r} is shorter than at the start of the run: {self.identity(i)!r} is missing; "
                "restore the file, or start a new run"
            )
        return ImageFile(data, lambda: f"{self._shard(i)}:{self._member(i)}", self.channels, self.levels)

    def identity(self, i: int) -> str:
        return f"{os.path.basename(self._shard(i))}:{self._member(i)}"

    def fingerprint(self) -> str | None:
        digest = hashlib.sha256(self._column.encode())
        try:
            for shard in self.shards:
                digest.update(shard_state(shard))
        except (OSError, DataError):  # opening an image reports it
            return None
        return digest.hexdigest()

    def skipped(self) -> dict[str, int]:
        return dict(self._skipped.most_common())

    def report(self) -> str:
        where = many(len(self.shards), "tar file")
        contents = f"{self.name}: {many(len(self), 'image')} in {where}{self._left_out()}{self._rule}"
        return "; ".join(filter(None, (contents, self.labelling(), self.note)))

    def _member(self, i: int) -> str:
        return self._names[i].decode("utf-8", "backslashreplace")

    def _shard(self, i: int) -> str:
        return self.shards[self._which(i)]

    def _which(self, i: int) -> int:
        """Return the number of the shard of an image."""
        return int(np.searchsorted(self._first, i, "right")) - 1

    def _left_out(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._skipped.most_common(5))
        return f", {many(self._skipped.total(), 'other member')} skipped ({kinds})" if kinds else ""


def find_webdataset(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a `.tar`, of a pattern such as `train-{000..146}.tar`, or of a folder of shards.

    The names of the shards in a folder may hold the name of their split. A folder that also holds images is not matched
    here; it is opened as a folder of images.
    """
    if not isinstance(data, str | os.PathLike):
        return None
    text, path = os.fspath(data), Path(data)
    if text.lower().endswith(".tar") and has_range(text) and not path.exists():
        shards = _expanded(text)
        return {"train": lambda: TarSource(shards, text, reading)}
    if path.is_file() and _PACKED.fullmatch(path.name):
        raise DataError(
            f"{text!r} is compressed, and images in it cannot be reached one by one: unpack it to a plain .tar"
        )
    if path.is_file() and path.suffix.lower() == ".tar":
        return {"train": lambda: TarSource([path], text, reading)}
    if not path.is_dir():
        return None
    shards = shards_in(path, ".tar")
    if shards:
        return tar_splits(divided(shards, path), text, reading) if without_images(path) else None
    below = shards_below(path, ".tar")
    return tar_splits(below, text, reading) if below is not None and without_images(path) else None


def tar_splits(shards: Shards, name: str, reading: Reading) -> dict[str, Callable[[], Source]]:
    """Return what opens each split of tar files."""
    note, train = shards.note(), shards.files.get("train", [])
    return {
        split: partial(TarSource, files, shards.name(split, name), reading, note, train if files != train else ())
        for split, files in shards.files.items()
    }


def _expanded(pattern: str) -> list[Path]:
    """Return the files of a pattern such as `{000..146}`, which must all exist."""
    files = [Path(text) for text in ranges(pattern)]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"{pattern!r}: {len(missing):,} of {len(files):,} files are missing, such as "
            f"{str(missing[0])!r}: restore them, or correct the pattern"
        )
    return files
