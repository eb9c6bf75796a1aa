"""Interface of image sources."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.pixels import Levels, checked_levels
from inbatch.errors import many

SKIPPED = "the images are used without labels, and k-NN and the linear probe are left out"
"""What follows from labels that are not classes, for reports."""

CropSpec = tuple[int, Literal["bilinear", "bicubic"]]
"""Crop specification of a view: output side in pixels and interpolation mode."""


@dataclass(frozen=True)
class Reading:
    """Options for reading images, for formats that leave a choice.

    Attributes:
        channels: 1 (grey) or 3 (RGB) for any file, 3 by default; 2 or 4 for the same with alpha as a channel, of PNG,
            WebP, AVIF, HEIF and TIFF files that have it; another number for TIFF files with exactly that many channels,
            or as many on all their pages. Arrays keep their number of channels.
        levels: The two values that are mapped to 0 and 255 in images with more than 8 bits per channel; None for the
            full 16-bit range. 32-bit and floating-point values require levels.
        download: Download a named data set that is not on the disk.
        image_column: Column with the images, or their paths, in data with columns; None for the usual names.
        label_column: Column with the labels; None for the usual names, "none" for images without labels.
        group_column: Column with known groups of images, such as the video of a frame; None for no groups. Of files
            and tar shards: "folder", or a regular expression for paths with one pair of brackets.

    Raises:
        ConfigError: If the levels are not two numbers, the lower one first.
    """

    channels: int | None = None
    levels: Levels | None = None
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            checked_levels(self.levels)


@runtime_checkable
class LazyImage(Protocol):
    """Image with known size and pixels not yet decoded, such as `image_file.ImageFile`."""

    size: tuple[int, int]

    def __enter__(self) -> "LazyImage": ...
    def __exit__(self, *exc: object) -> None: ...
    def tensor(self, longest: int | None = None) -> UInt8[Tensor, "c h w"]: ...
    def crops(self, boxes: Int[Tensor, "v 4"], wanted: Sequence[CropSpec]) -> tuple[UInt8[Tensor, "c s s"], ...]: ...


class Source(ABC):
    """N images with labels. A source needs little memory and is pickled into data workers.

    Attributes:
        name: Origin of the images.
        channels: 1 for grey, 3 for RGB, 2 or 4 for the same with alpha, any number for arrays and TIFF files.
        levels: See `Reading`. Decoded pixels depend on `levels`, `channels` and the `fingerprint`.
        labels: (N,) int64, -1 for unknown.
        classes: Names of the labels; empty if all images are unlabelled.
        note: Sentence part for the report, on what was taken as which split and what was left out.
        ids: The integers of the classes in the data, if these are not 0, 1, 2, ...
        groups: (N,) int64, known group of each image, -1 for none; None if no groups were requested.
        label_note: A sentence if the data have labels that cannot be used as classes, else empty.
    """

    levels: Levels | None = None
    note: str = ""
    ids: tuple[int, ...] | None = None
    groups: Int[Tensor, "n"] | None = None
    label_note: str = ""

    def __init__(self, name: str, channels: int, labels: Int[Tensor, "n"], classes: tuple[str, ...]):
        self.name, self.channels, self.labels, self.classes = name, channels, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, i: int) -> LazyImage:
        """Open image i and read its header, not its pixels; raise DataError with its name on failure."""

    @abstractmethod
    def identity(self, i: int) -> str:
        """Return the name of image i for messages: its path or its number."""

    def file_of(self, i: int) -> str | None:
        """Return the absolute path of the file that holds only image i; None if there is no such file."""
        return None

    def fingerprint(self) -> str | None:
        """Return a short string that changes with the decoded pixels of any image.

        None if caching is not worthwhile.
        """
        return None

    def signature(self) -> str:
        """Return 64 hex digits for the number, order, names, labels and groups of the images, not for their place."""
        return signed(self, "\0".join(map(self.identity, range(len(self)))).encode(errors="surrogatepass"))

    def shard_sizes(self) -> list[int] | None:
        """Return the numbers of images in the shards that the images are in, in order; None if they are in none.

        A shard (a tar file, a row group of a Parquet file) is read from its beginning to its end by `read_shards`.
        """
        return None

    def shard_layout(self) -> str:
        """Return a text for the places of the images in their shards, if `signature` does not cover them."""
        return ""

    def read_shards(self, numbers: Iterable[int]) -> Iterator[Any]:
        """Yield the encoded bytes of images, which `unpack` opens; fast if they follow each other in their shards.

        Raises:
            DataError: If a file cannot be read, or has changed since the source was opened.
        """
        raise NotImplementedError

    def unpack(self, i: int, data: Any) -> LazyImage:
        """Open image i with the bytes from `read_shards`; raise DataError with its name on failure."""
        raise NotImplementedError

    @property
    def whole(self) -> "Source":
        """The source before images that cannot be read were left out: what is drawn from it does not depend on them."""
        return self

    def numbers_here(self, numbers: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
        """Return the numbers that images of `whole` have here; -1 for those that were left out."""
        return numbers

    def skipped(self) -> dict[str, int]:
        """Return the number of files that were not taken as images, by file extension."""
        return {}

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """Return all pixels of image i; raise DataError with its name if it cannot be decoded."""
        with self.open(i) as picture:
            return picture.tensor()

    def report(self) -> str:
        """Return a text report of one or more lines: the images used and the files left out."""
        return "; ".join(filter(None, (f"{self.name}: {many(len(self), 'image')}, {self.labelling()}", self.note)))

    def labelling(self) -> str:
        """Return the number of classes as text, or that there are no labels and why."""
        skipped = f" ({self.label_note}: {SKIPPED})" if self.label_note else ""
        return f"{len(self.classes)} classes" if self.classes else f"unlabelled{skipped}"

    def why_unlabelled(self) -> str:
        """Return `label_note` in parentheses, for the end of a sentence; empty if there is none."""
        return f" ({self.label_note})" if self.label_note else ""


class Subset(Source):
    """Selected images of a source, in the order of `indices`, renumbered from 0."""

    def __init__(self, source: Source, indices: Int[Tensor, "m"], why: str):
        super().__init__(source.name, source.channels, source.labels[indices], source.classes)
        self.source, self.indices, self.why, self.levels = source, indices, why, source.levels
        self.ids, self.label_note = source.ids, source.label_note
        self.groups = None if source.groups is None else source.groups[indices]

    def open(self, i: int) -> LazyImage:
        return self.source.open(int(self.indices[i]))

    def identity(self, i: int) -> str:
        return self.source.identity(int(self.indices[i]))

    def file_of(self, i: int) -> str | None:
        return self.source.file_of(int(self.indices[i]))

    def fingerprint(self) -> str | None:
        if (whole := self.source.fingerprint()) is None:
            return None
        return hashlib.sha256(whole.encode() + self.indices.long().cpu().numpy().tobytes()).hexdigest()

    def signature(self) -> str:
        return signed(self, self.source.signature().encode() + self.indices.long().cpu().numpy().tobytes())

    def shard_sizes(self) -> list[int] | None:
        sizes, numbers = self.source.shard_sizes(), self.indices.cpu().numpy()
        if sizes is None or (np.diff(numbers) <= 0).any():
            return None
        return np.diff(np.searchsorted(numbers, np.cumsum([0, *sizes]))).tolist()

    def shard_layout(self) -> str:
        return self.source.shard_layout()

    def read_shards(self, numbers: Iterable[int]) -> Iterator[Any]:
        return self.source.read_shards(int(self.indices[i]) for i in numbers)

    def unpack(self, i: int, data: Any) -> LazyImage:
        return self.source.unpack(int(self.indices[i]), data)

    def skipped(self) -> dict[str, int]:
        return self.source.skipped()

    def report(self) -> str:
        return f"{self.source.report()}\n{self.name}: {len(self):,} of {len(self.source):,} used: {self.why}"


class Readable(Subset):
    """The images of a source that can be read, in their order."""

    @property
    def whole(self) -> Source:
        return self.source

    def numbers_here(self, numbers: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
        here = torch.full((len(self.source),), -1)
        here[self.indices] = torch.arange(len(self))
        return here[numbers]


def unlabelled(n: int) -> Int[Tensor, "n"]:
    """Return n labels with the value for unknown, -1."""
    return torch.full((n,), -1)


def path_text(path: bytes) -> str:
    """Decode a path of any bytes to text that can be printed and stored."""
    return path.decode("utf-8", "backslashreplace")


def stat_fingerprint(name: bytes, status: os.stat_result) -> bytes:
    """Return what identifies the content of a file without reading it: its name, size and time of change."""
    return b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns)


def signed(source: Source, names: bytes) -> str:
    """Compute the signature of a source from its classes, labels and groups and the joined names of its images."""
    digest = hashlib.sha256("\0".join(source.classes).encode(errors="surrogatepass") + b"\0\0")
    digest.update(source.labels.long().cpu().numpy().tobytes())
    if source.groups is not None:
        digest.update(b"groups" + source.groups.long().cpu().numpy().tobytes())
    digest.update(names)
    return digest.hexdigest()
