"""WebDataset: samples in tar files, read in place. Nothing is extracted or uncompressed.

The members of one sample share a key, which is the member name up to the first dot of its last path component:
`cat/01.jpg` has its label in `cat/01.cls` (a number) or `cat/01.json` ({"label": number}).
"""

import hashlib
import json
import math
import operator
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.source import Reading, Source, stat_fingerprint
from inbatch.data.sources.arrays import MOST_CLASSES
from inbatch.data.sources.folder_scan import EXTENSIONS
from inbatch.data.sources.packed_names import Names
from inbatch.data.sources.shards import Shards, divided, shards_below, shards_in, without_images
from inbatch.errors import DataError, many
from inbatch.runtime.files import open_regular

_IMAGES = tuple(extension.decode()[1:] for extension in EXTENSIONS)
_PACKED = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABEL_BYTES = 2**20  # maximum size of a .cls or .json; a longer one is not a label
_MOST = 10**6  # maximum number of shards of a pattern


class TarSource(Source):
    """Images of the shards in order; only the position and the name of each image are kept in memory."""

    def __init__(self, shards: Sequence[Path], name: str, reading: Reading, note: str = ""):
        self.shards, self.levels, self.note = [str(shard) for shard in shards], reading.levels, note
        self._skipped: Counter[str] = Counter()
        self._names, labels = Names(), array("q")
        starts, sizes, self._first = array("q"), array("q"), [0]
        for shard in self.shards:
            for member in _members(shard, self._skipped):
                self._names.append(member.name)
                starts.append(member.start)
                sizes.append(member.size)
                labels.append(member.label)
            self._first.append(len(starts))
        if not len(starts):
            raise DataError(f"No image in {name!r}{self._left_out()}: put KEY.jpg, KEY.png and so on there")
        self._starts, self._sizes = np.array(starts), np.array(sizes)
        known = torch.from_numpy(np.array(labels))
        classes = tuple(str(c) for c in range(int(known.max()) + 1))
        super().__init__(name, file_channels(reading.channels), known, classes)

    def open(self, i: int) -> ImageFile:
        start, size, shard = int(self._starts[i]), int(self._sizes[i]), self._shard(i)
        try:
            with open_regular(shard) as file:
                file.seek(start)
                data = file.read(size)
        except OSError as e:
            raise DataError(f"{shard!r} cannot be read: {e.strerror or e}") from e
        if len(data) < size:
            raise DataError(f"{shard!r} is shorter than at the start of the run: {self.identity(i)!r} is missing")
        return ImageFile(data, lambda: f"{shard}:{self._member(i)}", self.channels, self.levels)

    def identity(self, i: int) -> str:
        return f"{os.path.basename(self._shard(i))}:{self._member(i)}"

    def fingerprint(self) -> str | None:
        said = hashlib.sha256()
        try:
            for shard in self.shards:
                name = os.path.realpath(shard).encode("utf-8", "surrogateescape")
                said.update(stat_fingerprint(name, os.stat(shard)))
        except OSError:  # opening an image reports it
            return None
        return said.hexdigest()

    def skipped(self) -> dict[str, int]:
        return dict(self._skipped.most_common())

    def report(self) -> str:
        known = f"{len(self.classes)} classes" if self.classes else "unlabelled"
        where = many(len(self.shards), "tar file")
        parts = (f"{self.name}: {many(len(self), 'image')} in {where}{self._left_out()}", known, self.note)
        return "; ".join(filter(None, parts))

    def _member(self, i: int) -> str:
        return self._names[i].decode("utf-8", "backslashreplace")

    def _shard(self, i: int) -> str:
        return self.shards[int(np.searchsorted(self._first, i, "right")) - 1]

    def _left_out(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._skipped.most_common(5))
        return f", {many(self._skipped.total(), 'other member')} skipped ({kinds})" if kinds else ""


class _Member(NamedTuple):
    """Image in a shard: its bytes begin at `start`; label -1 means unknown."""

    name: bytes
    start: int
    size: int
    label: int


def find_webdataset(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a `.tar`, of a pattern such as `train-{000..146}.tar`, or of a folder of shards.

    The names of the shards in a folder may hold the name of their split. A folder that also holds images is not matched
    here; it is opened as a folder of images.
    """
    if not isinstance(data, str | os.PathLike):
        return None
    text, path = os.fspath(data), Path(data)
    if text.lower().endswith(".tar") and _RANGE.search(text) and not path.exists():
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
    note = shards.note()
    return {
        split: partial(TarSource, files, shards.name(split, name), reading, note)
        for split, files in shards.files.items()
    }


def _expanded(pattern: str) -> list[Path]:
    """Return the files of a pattern such as `{000..146}`, which must all exist; numbers keep their width."""
    pieces = _RANGE.split(pattern)  # text, first, last, text, ...
    ends = [(int(first), int(last), len(first)) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(max(0, last - first + 1) for first, last, _ in ends) not in range(1, _MOST + 1):
        raise DataError(f"{pattern!r} names no file, or more than {_MOST:,}: a range is {{FIRST..LAST}}")
    numbers = product(*([f"{n:0{width}}" for n in range(first, last + 1)] for first, last, width in ends))
    texts = pieces[::3]
    files = [Path("".join(a + b for a, b in zip(texts, (*chosen, ""), strict=True))) for chosen in numbers]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"{pattern!r}: {len(missing):,} of {len(files):,} files are missing, such as {str(missing[0])!r}"
        )
    return files


def _members(shard: str, skipped: Counter[str]) -> Iterator[_Member]:
    """Iterate over the images of a shard in order, with labels; raise DataError with its name on any problem."""
    found: list[tuple[bytes, str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with open_regular(shard) as file:
            _check_plain(file)
            length = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:") as opened:
                while (member := opened.next()) is not None:
                    opened.members = []  # type: ignore[attr-defined]  # tarfile keeps all members
                    if (name := _allowed(member, skipped)) is None:
                        continue
                    if member.offset_data + member.size > length:
                        raise ValueError(f"it is truncated within {name!r}")
                    folder, _, last = name.rpartition("/")
                    stem, _, extension = last.partition(".")
                    key, extension = f"{folder}/{stem}", extension.lower()
                    if extension in _IMAGES:
                        encoded = name.encode("utf-8", "surrogateescape")
                        found.append((encoded, key, member.offset_data, member.size))
                    elif extension in ("cls", "json"):
                        if (label := _label(file, member, extension)) is not None:
                            labels[key] = label
                    else:
                        skipped[f".{extension}" if extension else "no extension"] += 1
                file.seek(opened.offset)
                if file.read(512) != bytes(512):  # tarfile treats data that it cannot read as the end of the archive
                    raise ValueError(f"it is damaged or truncated behind byte {opened.offset:,}")
    except Exception as e:  # tarfile can raise any exception on damaged headers
        raise DataError(f"{shard!r} cannot be read as a tar file: {getattr(e, 'strerror', None) or e}") from e
    for encoded, key, start, size in found:
        yield _Member(encoded, start, size, labels.get(key, -1))


def _check_plain(file: BinaryIO) -> None:
    """Raise ValueError if the file is compressed, for any name."""
    head = file.read(6)
    file.seek(0)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError("it is compressed, and images in it cannot be reached one by one: unpack it to a plain .tar")


def _allowed(member: tarfile.TarInfo, skipped: Counter[str]) -> str | None:
    """Return the name of a readable member, None if it is left out; raise ValueError for members that are unsafe."""
    name = member.name.removeprefix("./")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise ValueError(f"its member {member.name!r} points out of the folder that it is unpacked in")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise ValueError(f"its member {member.name!r} is a link, a device or a sparse file: only plain files are read")
    if any(part.startswith(".") for part in parts):
        skipped["hidden"] += 1
        return None
    return name


def _label(file: BinaryIO, member: tarfile.TarInfo, extension: str) -> int | None:
    """Return the class in a .cls or .json; None if a .json has none."""
    if member.size > _LABEL_BYTES:
        raise ValueError(f"its member {member.name!r} of {member.size / 1e6:,.0f} MB is too long for a label")
    file.seek(member.offset_data)
    text = file.read(member.size)
    try:
        if extension == "cls":
            label = int(text)
        else:
            said = json.loads(text)
            if not isinstance(said, dict) or said.get("label") is None:
                return None
            label = operator.index(said["label"])
        if not -1 <= label < MOST_CLASSES:
            raise ValueError(f"classes are numbers from 0 to {MOST_CLASSES:,}, -1 is unknown")
        return label
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"its member {member.name!r} holds no whole number as a label: {e}") from e
