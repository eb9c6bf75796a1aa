"""Statistics of a source in one pass over its images: sizes, formats, pixel sums and digests."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from inbatch.data import Source
from inbatch.data.decoding import signatures
from inbatch.data.decoding.image_file import ImageFile
from inbatch.errors import DataError
from inbatch.runtime.thread_map import thread_map

_CHUNK = 64  # images per task of a thread
_BLOCK = 2**22  # values whose squares are in memory at once
DIGEST = 16
"""Bytes of a digest: enough that no two of 10^15 different images share one."""
_NONE = np.zeros((0, 2), np.uint64)


@dataclass
class ImageStatistics:
    """Statistics of some images; `+=` adds those of others.

    Attributes:
        numbers, sizes, digests: Number, size (height, width, height, ...) and digest of the readable images, in compact
            form.
        kinds: Number of images by file format.
        bits: Number of images by bits per value.
        white: Largest value that becomes white without levels, over all images.
        inverted: Whether zero is white in an image of more than 8 bits.
        pages: Number of images by the number of pages or frames of their file, if that is more than one.
        transparent: (image number, fraction of its pixels that are not opaque) of images with alpha.
        warned: (image number, what Pillow warned about).
        unreadable: (image number, reason).
        pixels: Number of pixels.
        sums, squares: Sums over all pixels, by channel.
        lowest, highest: Extreme values, by channel.
    """

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    kinds: Counter[str] = field(default_factory=Counter)
    bits: Counter[int] = field(default_factory=Counter)
    white: int = 255
    inverted: bool = False
    pages: Counter[int] = field(default_factory=Counter)
    transparent: list[tuple[int, float]] = field(default_factory=list)
    warned: list[tuple[int, list[str]]] = field(default_factory=list)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    pixels: int = 0
    sums: np.ndarray | int = 0  # Python integers: exact for any number of images
    squares: np.ndarray | int = 0
    lowest: np.ndarray | int = 255
    highest: np.ndarray | int = 0

    def __len__(self) -> int:
        return len(self.numbers) + len(self.unreadable)

    def __iadd__(self, other: "ImageStatistics") -> "ImageStatistics":
        for name in ("numbers", "sizes", "digests", "transparent", "warned", "unreadable"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds += other.kinds
        self.bits += other.bits
        self.white = max(self.white, other.white)
        self.inverted |= other.inverted
        self.pages += other.pages
        self.pixels += other.pixels
        self.sums, self.squares = self.sums + other.sums, self.squares + other.squares
        self.lowest, self.highest = np.minimum(self.lowest, other.lowest), np.maximum(self.highest, other.highest)
        return self

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation per channel over all pixels, 1 is white; empty if no image is readable."""
        if not self.pixels:
            return [], []
        sums, squares = (np.array(x, dtype=object) for x in (self.sums, self.squares))
        spread = squares * self.pixels - sums * sums  # exact, since both are integers
        return (
            [int(x) / self.pixels / 255 for x in sums],
            [int(x) ** 0.5 / self.pixels / 255 for x in spread],
        )


def chunks(source: Source, indices: Sequence[int], *, pixels: bool = True) -> Iterator[ImageStatistics]:
    """Iterate over statistics of chunks of images, by threads (decoding releases the GIL).

    Pixels: also sum pixel values.
    """
    starts = range(0, len(indices), _CHUNK)
    return thread_map(lambda at: _statistics(source, indices[at : at + _CHUNK], pixels), starts)


def total(parts: Iterable[ImageStatistics]) -> ImageStatistics:
    """Return the sum of several statistics."""
    whole = ImageStatistics()
    for part in parts:
        whole += part
    return whole


def repeated(*parts: ImageStatistics) -> list[list[tuple[int, int]]]:
    """Return groups of identical images, each as (index in `parts`, image number), ordered by their first image."""
    words = np.concatenate([np.frombuffer(t.digests, np.uint64).reshape(-1, 2) for t in parts if t.numbers] or [_NONE])
    origins = [(which, number) for which, t in enumerate(parts) for number in t.numbers]
    return [[origins[i] for i in group] for group in equal_rows(words)]


def equal_rows(words: np.ndarray) -> list[list[int]]:
    """Return the positions of equal rows of two numbers, in groups of at least two, ordered by their first row."""
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: the first row of a group stays first
    same = (words[order[1:]] == words[order[:-1]]).all(1)
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False)).reshape(-1, 2)
    return sorted(order[first : last + 1].tolist() for first, last in edges)


def _statistics(source: Source, indices: Sequence[int], pixels: bool) -> ImageStatistics:
    statistics = ImageStatistics()
    for i in indices:
        try:
            with source.open(i) as picture:
                pages = picture.pages() if isinstance(picture, ImageFile) else 1
                values = picture.tensor().numpy() if pixels or not hasattr(picture, "contents") else None
                contents = picture.contents() if hasattr(picture, "contents") else None
        except DataError as error:
            statistics.unreadable.append((i, str(error)))
            continue
        statistics.numbers.append(i)
        statistics.sizes.extend(map(int, picture.size))
        statistics.digests += digest(contents, values)
        statistics.kinds[_kind(contents)] += 1
        if isinstance(picture, ImageFile):
            _add_file(statistics, i, picture, pages)
        if pixels and values is not None:
            _add_pixels(statistics, values)
    return statistics


def _add_file(statistics: ImageStatistics, i: int, picture: ImageFile, pages: int) -> None:
    """Add what only a file has: bits, pages, alpha and warnings."""
    statistics.bits[picture.bits] += 1
    statistics.white = max(statistics.white, picture.white)
    statistics.inverted |= picture.inverted and picture.bits > 8
    statistics.pages += Counter({pages: 1} if pages > 1 else {})
    if picture.transparent is not None:
        statistics.transparent.append((i, picture.transparent))
    if picture.warnings:
        statistics.warned.append((i, picture.warnings))


def _kind(contents: bytes | None) -> str:
    if contents is None:
        return "pixels in memory"
    return signatures.kind(contents) or "another"


def digest(contents: bytes | None, values: np.ndarray | None) -> bytes:
    """Return `DIGEST` bytes that identify the file, or the pixels if there is no file."""
    hasher = hashlib.blake2b(contents or b"", digest_size=DIGEST)
    if contents is None and values is not None:
        hasher.update(repr(values.shape).encode())
        hasher.update(np.ascontiguousarray(values).data)
    return hasher.digest()


def _add_pixels(statistics: ImageStatistics, values: np.ndarray) -> None:
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    statistics.pixels += flat.shape[1]
    for block in np.array_split(flat, -(-flat.size // _BLOCK), axis=1):
        squares = np.multiply(block, block, dtype=np.uint16)
        statistics.sums = statistics.sums + block.sum(1, dtype=np.int64).astype(object)
        statistics.squares = statistics.squares + squares.sum(1, dtype=np.int64).astype(object)
    statistics.lowest = np.minimum(statistics.lowest, flat.min(1))
    statistics.highest = np.maximum(statistics.highest, flat.max(1))
