"""What every source of images offers, whatever it reads from."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.pixels import Levels
from inbatch.errors import many

CropSpec = tuple[int, Literal["bilinear", "bicubic"]]
"""What a view wants of its crop: the side of the output in pixels, and how to interpolate."""


@dataclass(frozen=True)
class Reading:
    """How images are to be read, where their kind leaves a choice.

    channels: 1 (grey) or 3 (RGB) for any file, 3 by default; another number for TIFF files that hold just as many;
        whatever they hold for arrays.
    levels: the two values of an image with more than 8 bits a channel that become 0 and 255; None for the range of
        16 bits. Values of 32 bits, and floats, cannot do without.
    download: fetch a set that is known by name and not on the disk.
    """

    channels: int | None = None
    levels: Levels | None = None
    download: bool = False


@runtime_checkable
class LazyImage(Protocol):
    """An image whose size is known and whose pixels are not yet decoded (`decode.Picture` is one)."""

    size: tuple[int, int]

    def __enter__(self) -> "LazyImage": ...
    def __exit__(self, *exc: object) -> None: ...
    def tensor(self, longest: int | None = None) -> UInt8[Tensor, "c h w"]: ...
    def crops(self, boxes: Int[Tensor, "v 4"], wanted: Sequence[CropSpec]) -> tuple[UInt8[Tensor, "c s s"], ...]: ...


class Source(ABC):
    """N images with labels; cheap to hold, pickles into data workers.

    name: where the images come from. channels: 1 grey, 3 RGB, any number for arrays and TIFF files.
    levels: see `Reading`; what decoded pixels depend on, beside `channels` and the `fingerprint`.
    labels: (N,) int64, -1 where unknown. classes: the labels' names, empty when nothing is labelled.
    """

    levels: Levels | None = None

    def __init__(self, name: str, channels: int, labels: Int[Tensor, "n"], classes: tuple[str, ...]):
        self.name, self.channels, self.labels, self.classes = name, channels, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, i: int) -> LazyImage:
        """Image i, header read, pixels not; DataError that names it if that fails."""

    @abstractmethod
    def identity(self, i: int) -> str:
        """What a person calls image i: its path, or its number."""

    def fingerprint(self) -> str | None:
        """What the decoded pixels of all images depend on, in few characters; None: they are not worth keeping."""
        return None

    def signature(self) -> str:
        """64 letters that change with the images' number, order, names and labels; where they lie does not matter."""
        return signed(self, "\0".join(map(self.identity, range(len(self)))).encode(errors="surrogatepass"))

    def skipped(self) -> dict[str, int]:
        """Files beside the images that were not taken for any, counted by their ending."""
        return {}

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """All pixels of image i; DataError that names it if it cannot be decoded."""
        with self.open(i) as picture:
            return picture.tensor()

    def report(self) -> str:
        """One or more lines for people: what was found, and what was not used."""
        known = f"{len(self.classes)} classes" if self.classes else "unlabelled"
        return f"{self.name}: {many(len(self), 'image')}, {known}"


class Subset(Source):
    """Some images of a source, in the order given, renumbered from 0."""

    def __init__(self, source: Source, indices: Int[Tensor, "m"], why: str):
        super().__init__(source.name, source.channels, source.labels[indices], source.classes)
        self.source, self.indices, self.why, self.levels = source, indices, why, source.levels

    def open(self, i: int) -> LazyImage:
        return self.source.open(int(self.indices[i]))

    def identity(self, i: int) -> str:
        return self.source.identity(int(self.indices[i]))

    def fingerprint(self) -> str | None:
        if (whole := self.source.fingerprint()) is None:
            return None
        return hashlib.sha256(whole.encode() + self.indices.long().cpu().numpy().tobytes()).hexdigest()

    def signature(self) -> str:
        return signed(self, self.source.signature().encode() + self.indices.long().cpu().numpy().tobytes())

    def skipped(self) -> dict[str, int]:
        return self.source.skipped()

    def report(self) -> str:
        return f"{self.source.report()}\n{self.name}: {len(self):,} of {len(self.source):,} used: {self.why}"


def unlabelled(n: int) -> Int[Tensor, "n"]:
    """n labels that say: unknown."""
    return torch.full((n,), -1)


def signed(source: Source, names: bytes) -> str:
    """The signature of a source whose images' names, in order, are in these bytes."""
    said = hashlib.sha256("\0".join(source.classes).encode(errors="surrogatepass") + b"\0\0")
    said.update(source.labels.long().cpu().numpy().tobytes())
    said.update(names)
    return said.hexdigest()
