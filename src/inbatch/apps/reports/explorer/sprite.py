"""Thumbnails of a collection as sprites, which are images of square tiles, in WebP."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.errors import DataError
from inbatch.evaluation.near_duplicates import SIDE, thumbnail
from inbatch.runtime.terminal import counted
from inbatch.runtime.thread_map import thread_map

_SIDE = 1024  # pixels of a sprite: a browser decodes all of it to draw one tile, 15 ms at this size
_QUALITY = 75
_GREY = 128


@dataclass(frozen=True)
class Sprite:
    """Tiles in rows, sprite by sprite, in the order of the images.

    Attributes:
        tile: Side of a tile in pixels.
        columns: Tiles per row.
        per_sheet: Tiles per sprite; the last one may have fewer.
        sheets: WebP files.
        grey: (N, 32, 32) the whole images for `evaluation.near_duplicates`.
        digests: For each image, the same bytes as for images with the same thumbnail; None if it cannot be read: its
            tile is grey.
    """

    tile: int
    columns: int
    per_sheet: int
    sheets: tuple[bytes, ...]
    grey: UInt8[Tensor, "n s s"]
    digests: tuple[bytes | None, ...]

    @property
    def size(self) -> int:
        """Bytes of all sprites."""
        return sum(map(len, self.sheets))

    @property
    def missing(self) -> int:
        """Number of images that could not be read."""
        return self.digests.count(None)


@dataclass(frozen=True)
class _Drawn:
    """One image: its tile (side, side, 3), its grey values and its digest."""

    tile: np.ndarray
    grey: Tensor
    digest: bytes


def draw_sprite(collection: Collection, tile: int, quiet: bool = True) -> Sprite:
    """Return the sprites with the central square of every image, decoded at reduced size on all cores.

    Args:
        collection: Images, which must be available.
        tile: Side of a thumbnail in pixels.
        quiet: Print no progress to stderr.
    """
    columns = _SIDE // tile
    per_sheet = columns * columns
    grey, digests = torch.zeros(len(collection), SIDE, SIDE, dtype=torch.uint8), list[bytes | None]()
    parts = [range(at, min(at + per_sheet, len(collection))) for at in range(0, len(collection), per_sheet)]

    def tiles(part: range) -> Iterator[list[_Drawn | None]]:
        chunks = [part[at : at + 64] for at in range(0, len(part), 64)]
        yield from thread_map(lambda chunk: [_drawn(collection, i, tile) for i in chunk], chunks)

    every = (chunk for part in parts for chunk in tiles(part))
    chunks = every if quiet else counted(every, len(collection), "drawn as thumbnails")
    sheets = []
    for part in parts:
        rows = -(-len(part) // columns)
        sheet, at = np.full((rows * tile, columns * tile, 3), _GREY, np.uint8), 0
        while at < len(part):
            for drawn in next(chunks):
                top, left = tile * (at // columns), tile * (at % columns)
                if drawn is not None:
                    sheet[top : top + tile, left : left + tile] = drawn.tile
                    grey[len(digests)] = drawn.grey
                digests.append(None if drawn is None else drawn.digest)
                at += 1
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, "WEBP", quality=_QUALITY, method=4)
        sheets.append(file.getvalue())
    return Sprite(tile, columns, per_sheet, tuple(sheets), grey, tuple(digests))


def _drawn(collection: Collection, i: int, side: int) -> _Drawn | None:
    """Return what is drawn of an image, which is decoded once; None if it cannot be read."""
    try:
        with collection.open(i) as picture:
            height, width = picture.size
            short = min(height, width)
            square, whole = ((height - short) // 2, (width - short) // 2, short, short), (0, 0, height, width)
            small, all_of_it = picture.crops(torch.tensor([square, whole]), [(side, "bilinear"), (SIDE, "bilinear")])
    except DataError:
        return None
    pixels = small.numpy()
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 0)
    digest = hashlib.blake2b(all_of_it.numpy().tobytes(), digest_size=16).digest()
    return _Drawn(shown.transpose(1, 2, 0), thumbnail(all_of_it), digest)
