"""Every image of a source looked at once: its size, its kind, its pixels in sums, and what tells it from others."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from inbatch.data import Source
from inbatch.errors import DataError
from inbatch.runtime.resources import cores

_CHUNK = 64  # images a thread looks at in one go
_BLOCK = 2**22  # values whose squares lie in memory at once
_DIGEST = 16  # bytes: no two of 10^15 different images share one
_NONE = np.zeros((0, 2), np.uint64)

_KINDS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"II+\0": "TIFF", b"MM\0+": "TIFF", b"RIFF": "WebP",
}  # fmt: skip
"""How files begin."""


@dataclass
class ImageStatistics:
    """What was found in some images; `+=` adds what was found in others.

    numbers, sizes (height, width, height, ...), digests: of those that can be read, in little memory. Sums are over all
    pixels, by channel.
    """

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    kinds: Counter[str] = field(default_factory=Counter)
    bits: Counter[int] = field(default_factory=Counter)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    pixels: int = 0
    sums: np.ndarray | int = 0  # Python's integers: exact, however many
    squares: np.ndarray | int = 0
    lowest: np.ndarray | int = 255
    highest: np.ndarray | int = 0

    def __len__(self) -> int:
        return len(self.numbers) + len(self.unreadable)

    def __iadd__(self, other: "ImageStatistics") -> "ImageStatistics":
        for name in ("numbers", "sizes", "digests", "unreadable"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds += other.kinds
        self.bits += other.bits
        self.pixels += other.pixels
        self.sums, self.squares = self.sums + other.sums, self.squares + other.squares
        self.lowest, self.highest = np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest)
        return self

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Of every channel, over all pixels, 1 being white; nothing where no image can be read."""
        if not self.pixels:
            return [], []
        sums, squares = (np.array(x, dtype=object) for x in (self.sums, self.squares))
        spread = squares * self.pixels - sums * sums  # exact: both are integers
        return (
            [int(x) / self.pixels / 255 for x in sums],
            [int(x) ** 0.5 / self.pixels / 255 for x in spread],
        )


def chunks(source: Source, indices: Sequence[int], *, pixels: bool = True) -> Iterator[ImageStatistics]:
    """The images in pieces, by threads, for decoding leaves Python to others. pixels: False tells them apart only."""
    with ThreadPoolExecutor(cores()) as pool:
        starts = range(0, len(indices), _CHUNK)
        yield from pool.map(lambda at: _look(source, indices[at : at + _CHUNK], pixels), starts)


def total(tallies: Iterable[ImageStatistics]) -> ImageStatistics:
    """All of them in one."""
    whole = ImageStatistics()
    for tally in tallies:
        whole += tally
    return whole


def repeated(*tallies: ImageStatistics) -> list[list[tuple[int, int]]]:
    """Groups of images that are the same, each as (which tally, number), in the order of their first."""
    words = np.concatenate(
        [np.frombuffer(t.digests, np.uint64).reshape(-1, 2) for t in tallies if t.numbers] or [_NONE]
    )
    whose = [(which, number) for which, t in enumerate(tallies) for number in t.numbers]
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: the first of a group comes first
    same = (words[order[1:]] == words[order[:-1]]).all(1)
    cuts = np.flatnonzero(~same) + 1
    groups = [group.tolist() for group in np.split(order, cuts) if len(group) > 1]
    return [[whose[i] for i in group] for group in sorted(groups)]


def _look(source: Source, indices: Sequence[int], pixels: bool) -> ImageStatistics:
    found = ImageStatistics()
    for i in indices:
        try:
            with source.open(i) as picture:
                values = picture.tensor().numpy() if pixels or not hasattr(picture, "contents") else None
                contents = picture.contents() if hasattr(picture, "contents") else None
        except DataError as error:
            found.unreadable.append((i, str(error)))
            continue
        found.numbers.append(i)
        found.sizes.extend(map(int, picture.size))
        found.digests += _digest(contents, values)
        found.kinds[_kind(contents)] += 1
        if contents is not None:
            found.bits[picture.bits] += 1  # type: ignore[attr-defined] # a file, so it is a Picture
        if pixels and values is not None:
            _add(found, values)
    return found


def _kind(contents: bytes | None) -> str:
    if contents is None:
        return "pixels in memory"
    return next((kind for start, kind in _KINDS.items() if contents.startswith(start)), "another")


def _digest(contents: bytes | None, values: np.ndarray | None) -> bytes:
    """Of the file as it is, or of the pixels where there is none."""
    said = hashlib.blake2b(contents or b"", digest_size=_DIGEST)
    if contents is None and values is not None:
        said.update(repr(values.shape).encode())
        said.update(np.ascontiguousarray(values).data)
    return said.digest()


def _add(found: ImageStatistics, values: np.ndarray) -> None:
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    found.pixels += flat.shape[1]
    for block in np.array_split(flat, -(-flat.size // _BLOCK), axis=1):
        squares = np.multiply(block, block, dtype=np.uint16)
        found.sums = found.sums + block.sum(1, dtype=np.int64).astype(object)
        found.squares = found.squares + squares.sum(1, dtype=np.int64).astype(object)
    found.lowest = np.minimum(found.lowest, flat.min(1))
    found.highest = np.maximum(found.highest, flat.max(1))
