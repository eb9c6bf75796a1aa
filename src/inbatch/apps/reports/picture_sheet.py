"""Draw images in rows, with captions and a title."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from inbatch.training.build import RunComponents

CELL, GAP, LINE = 96, 4, 14
Cells = Sequence[tuple[Image.Image, str]]
"""Images in one row, each with its caption."""


@dataclass(frozen=True)
class Row:
    """Cells, with an optional heading above."""

    cells: Cells
    heading: str = ""


def sheet(title: Sequence[str], lines: Sequence[Row]) -> Image.Image:
    """Draw rows of images under a title on a white background."""
    font = ImageFont.load_default(11)
    places: list[tuple[int, int, str]] = [(GAP, GAP + i * LINE, text) for i, text in enumerate(title)]
    pasted: list[tuple[Image.Image, tuple[int, int]]] = []
    y, wide = GAP + len(title) * LINE + GAP, 0
    for line in lines:
        if line.heading:
            places.append((GAP, y, line.heading))
            y += LINE
        x = GAP
        for picture, text in line.cells:
            pasted.append((picture, (x, y)))
            places.append((x, y + picture.height, text))
            x += max(picture.width, round(font.getlength(text))) + GAP
        y += max(picture.height for picture, _ in line.cells) + LINE + GAP
        wide = max(wide, x)
    wide = max(wide, *(round(x + font.getlength(text)) + GAP for x, _, text in places))
    drawing = Image.new("RGB", (wide, y), "white")
    pen = ImageDraw.Draw(drawing)
    for picture, place in pasted:
        drawing.paste(picture, place)
    for x, top, text in places:
        pen.text((x, top), text, fill="black", font=font)
    return drawing


def pixels(built: RunComponents, images: Tensor) -> Float[Tensor, "n c h w"]:
    """Undo the normalisation; views return to values from 0 to 1."""
    return images.float().cpu() * column(built.views.std) + column(built.views.mean)


def column(values: Sequence[float]) -> Float[Tensor, "c 1 1"]:
    """Return a value for each channel of an image."""
    return torch.tensor(values)[:, None, None]


def tile(image: Float[Tensor, "c h w"]) -> Image.Image:
    """Convert values from 0 to 1 to an image: one channel in grey; of more than three channels, the first three."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    pixels = (shown.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().contiguous().numpy()
    zoom = CELL / max(pixels.shape[:2])
    how = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((round(pixels.shape[1] * zoom), round(pixels.shape[0] * zoom)), how)
