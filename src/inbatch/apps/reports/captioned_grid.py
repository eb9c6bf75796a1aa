"""Grid of images with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inbatch.apps.reports.view_grid import resampling, rgb_image, save_picture
from inbatch.runtime.text import printable

_SIDE, _FRAME, _GAP, _LINE = 96, 3, 8, 13
"""Side of an image, width of its frame, gap between images, and height of a line of text, in pixels."""


@dataclass(frozen=True)
class Tile:
    """An image with lines of text below it, and the colour of its frame; an empty place if there is no image."""

    image: UInt8[Tensor, "c h w"] | None
    lines: tuple[str, ...] = ()
    colour: str = "#999999"


def save_captioned(path: Path, rows: Sequence[Sequence[Tile]], gap_every: int | None = None) -> None:
    """Write rows of images with captions to a file.

    Args:
        path: File to write; a PNG is marked as a picture of inbatch, so that it is never read as data.
        rows: Images of each row.
        gap_every: Number of images that stay together, with a wider gap between these groups.

    Raises:
        ConfigError: For an unknown file extension.
        InbatchError: If the file cannot be written.
    """
    lines = max((len(tile.lines) for row in rows for tile in row), default=0)
    side = _SIDE + 2 * _FRAME
    columns = max(map(len, rows))
    lefts = [_GAP + i * (side + _GAP) + (i // gap_every * 2 * _GAP if gap_every else 0) for i in range(columns)]
    height = side + lines * _LINE + _GAP
    sheet = Image.new("RGB", (lefts[-1] + side + _GAP, len(rows) * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for number, row in enumerate(rows):
        top = _GAP + number * height
        for left, tile in zip(lefts, row, strict=False):
            _place(sheet, pen, left, top, tile)
            for line, text in enumerate(tile.lines):
                place = (left, top + side + line * _LINE)
                pen.text(place, _shortened(printable(text), font, side), fill="black", font=font)
    save_picture(path, sheet)


def _place(sheet: Image.Image, pen: ImageDraw.ImageDraw, left: int, top: int, tile: Tile) -> None:
    """Draw an image in its frame, with its longer side scaled to the side of a cell."""
    side = _SIDE + 2 * _FRAME
    pen.rectangle((left, top, left + side - 1, top + side - 1), outline=tile.colour, width=_FRAME)
    if tile.image is None:
        return
    pixels = np.asarray(tile.image.cpu())
    zoom = _SIDE / max(pixels.shape[-2:])
    height, width = (max(1, round(length * zoom)) for length in pixels.shape[-2:])
    shown = rgb_image(pixels).resize((width, height), resampling(zoom))
    sheet.paste(shown, (left + _FRAME + (_SIDE - width) // 2, top + _FRAME + (_SIDE - height) // 2))


def _font() -> Any:
    """Return the font of matplotlib, which has the letters of many languages."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 10)


def _shortened(text: str, font: Any, width: int) -> str:
    """Return the beginning of a text that fits a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
