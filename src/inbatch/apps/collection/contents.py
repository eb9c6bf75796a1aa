"""Read the images of a collection for a comparison: digests, sizes and thumbnails."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.apps.reports.image_statistics import DIGEST, digest, equal_rows
from inbatch.errors import DataError
from inbatch.evaluation.near_duplicates import SIDE, thumbnail
from inbatch.runtime.terminal import counted
from inbatch.runtime.thread_map import thread_map

_CHUNK = 64  # images per task of a thread


@dataclass
class ImageContents:
    """What was read of the images of a collection.

    Attributes:
        readable: Positions of the readable images in the collection.
        pixels: Number of pixels of each of these.
        thumbnails: Their grey values.
        copies: Positions in `readable` of identical images, by the first of them.
        unreadable: A message for each of the others.
    """

    readable: Int[Tensor, "m"]
    pixels: Int[Tensor, "m"]
    thumbnails: UInt8[Tensor, "m s s"]
    copies: dict[int, list[int]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class _Part:
    """What was read of adjacent images of a collection, from position `first` on: of unreadable ones zeros."""

    first: int
    pixels: list[int]
    digests: bytes
    thumbnails: UInt8[Tensor, "n s s"]
    unreadable: list[str]

    def __len__(self) -> int:
        return len(self.pixels)


def read_contents(collection: Collection, quiet: bool) -> ImageContents:
    """Read every image once, for its digest, its size and its thumbnail."""
    count, unreadable = len(collection), [*collection.unreadable]
    pixels, thumbnails = torch.zeros(count, dtype=torch.long), torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    digests = np.zeros((count, 2), np.uint64)
    parts = thread_map(lambda at: _read(collection, range(count)[at : at + _CHUNK]), range(0, count, _CHUNK))
    for part in parts if quiet else counted(parts, count, "read"):
        at = slice(part.first, part.first + len(part))
        pixels[at], thumbnails[at] = torch.tensor(part.pixels), part.thumbnails
        digests[at] = np.frombuffer(part.digests, np.uint64).reshape(-1, 2)
        unreadable += part.unreadable
    readable = pixels.nonzero()[:, 0]
    if len(readable) < count:  # else a copy of a gigabyte for a million images
        pixels, thumbnails, digests = pixels[readable], thumbnails[readable], digests[readable.numpy()]
    copies = {group[0]: group[1:] for group in equal_rows(digests)}
    return ImageContents(readable, pixels, thumbnails, copies, unreadable)


def _read(collection: Collection, numbers: range) -> _Part:
    pixels, digests, unreadable = [0] * len(numbers), bytearray(DIGEST * len(numbers)), []
    crops: dict[int, Tensor] = {}
    for at, i in enumerate(numbers):
        try:
            with collection.open(i) as picture:
                contents = picture.contents() if hasattr(picture, "contents") else None
                values = picture.tensor().numpy() if contents is None else None
                height, width = picture.size
                crops[at] = picture.crops(torch.tensor([[0, 0, height, width]]), [(SIDE, "bilinear")])[0]
        except DataError as error:
            unreadable.append(str(error))
            continue
        pixels[at] = height * width
        digests[DIGEST * at : DIGEST * (at + 1)] = digest(contents, values)
    thumbnails = torch.zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
    for channels in {len(crop) for crop in crops.values()}:
        alike = [at for at, crop in crops.items() if len(crop) == channels]
        thumbnails[alike] = thumbnail(torch.stack([crops[at] for at in alike]))
    return _Part(numbers.start, pixels, bytes(digests), thumbnails, unreadable)
