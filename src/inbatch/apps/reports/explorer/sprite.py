"""Thumbnails of a collection as sheets of square tiles in WebP."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from inbatch.apps.collection.features import Collection
from inbatch.errors import DataError
from inbatch.runtime.terminal import counted
from inbatch.runtime.thread_map import thread_map

_SIDE = 1024  # pixels of a sheet: a browser decodes the whole sheet to draw one tile, 15 ms at this size
_QUALITY = 75
_GREY = 128


@dataclass(frozen=True)
class Sprite:
    """Tiles in rows, sheet by sheet, in the order of the images.

    Attributes:
        tile: Side of a tile in pixels.
        columns: Tiles per row.
        per_sheet: Tiles per sheet; the last one may have fewer.
        sheets: WebP files.
        missing: Number of images that could not be read; their tiles are grey.
    """

    tile: int
    columns: int
    per_sheet: int
    sheets: tuple[bytes, ...]
    missing: int

    @property
    def size(self) -> int:
        """Bytes of all sheets."""
        return sum(map(len, self.sheets))


def draw_sprite(collection: Collection, tile: int, quiet: bool = True) -> Sprite:
    """Return the sheets with the central square of every image, decoded at reduced size on all cores.

    Args:
        collection: Images, which must be available.
        tile: Side of a thumbnail in pixels.
        quiet: Print no progress to stderr.
    """
    columns = _SIDE // tile
    per_sheet, missing = columns * columns, 0
    parts = [range(at, min(at + per_sheet, len(collection))) for at in range(0, len(collection), per_sheet)]

    def tiles(part: range) -> Iterator[list[np.ndarray | None]]:
        chunks = [part[at : at + 64] for at in range(0, len(part), 64)]
        yield from thread_map(lambda chunk: [_tile(collection, i, tile) for i in chunk], chunks)

    every = (chunk for part in parts for chunk in tiles(part))
    chunks = every if quiet else counted(every, len(collection), "drawn as thumbnails")
    sheets = []
    for part in parts:
        rows = -(-len(part) // columns)
        sheet, at = np.full((rows * tile, columns * tile, 3), _GREY, np.uint8), 0
        while at < len(part):
            for pixels in next(chunks):
                top, left = tile * (at // columns), tile * (at % columns)
                if pixels is None:
                    missing += 1
                else:
                    sheet[top : top + tile, left : left + tile] = pixels
                at += 1
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, "WEBP", quality=_QUALITY, method=4)
        sheets.append(file.getvalue())
    return Sprite(tile, columns, per_sheet, tuple(sheets), missing)


def _tile(collection: Collection, i: int, side: int) -> np.ndarray | None:
    """Return the pixels of a thumbnail (side, side, 3); None if the image cannot be read."""
    try:
        pixels = collection.thumbnail(i, side).numpy()
    except DataError:
        return None
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 0)
    return shown.transpose(1, 2, 0)
