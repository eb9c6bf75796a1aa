"""Grids of images and of their views: the model's input, and the crop box of each view."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data import Subset, decode_all
from inbatch.data.views.pipeline import Drawn
from inbatch.errors import ConfigError
from inbatch.rng import permutation
from inbatch.runtime.files import check_writable, replacing
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import check_not_read, joined_paths, listed_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.picture_mark import is_marked, png_mark
from inbatch.training.own_requests import with_own_parts
from inbatch.training.recipe import Part
from inbatch.training.requested_settings import merged_settings, requested_data
from inbatch.training.resolve import resolve_recipe
from inbatch.training.run_views import views_of

_CELL = 96
_GAP = 4
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5a5", "#f032e6", "#9a6324")


def grid(images: Tensor | Sequence[Tensor], drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return one row per image: the image with the box of every view, then the views, framed in their box's colour.

    One channel is shown in grey; of more than three channels, the first three are shown.

    Args:
        images: (n, C, H, W) uint8, or n of (C, h, w).
        drawn: Their views, normalised with mean and std.
        mean: Mean per channel.
        std: Standard deviation per channel.

    Returns:
        (height, width, 3) uint8.
    """
    views = len(drawn.images)
    sheet = Image.new("RGB", ((_CELL + _GAP) * (1 + views) + _GAP, (_CELL + _GAP) * len(images) + _GAP), "white")
    for row, image in enumerate(images):
        top = _GAP + row * (_CELL + _GAP)
        height, width = image.shape[-2:]
        zoom = _CELL / max(height, width)
        original = rgb_image(image.cpu().numpy()).resize((round(width * zoom), round(height * zoom)), resampling(zoom))
        pen = ImageDraw.Draw(original)
        for view in range(views):
            y, x, h, w = (zoom * side for side in drawn.boxes[view, row].tolist())
            pen.rectangle((x, y, x + w - 1, y + h - 1), outline=_COLOURS[view % len(_COLOURS)], width=2)
        sheet.paste(original, (_GAP, top))
        for view, batch in enumerate(drawn.images):
            values = batch[row].float().cpu().numpy() * _column(std) + _column(mean)
            tile = rgb_image((values * 255).round().clip(0, 255).astype(np.uint8))
            tile = tile.resize((_CELL, _CELL), resampling(_CELL / tile.width))
            colour = _COLOURS[view % len(_COLOURS)]
            ImageDraw.Draw(tile).rectangle((0, 0, _CELL - 1, _CELL - 1), outline=colour, width=2)
            sheet.paste(tile, (_GAP + (1 + view) * (_CELL + _GAP), top))
    return np.asarray(sheet)


def save_grid(
    path: str | Path,
    images: Tensor | Sequence[Tensor],
    drawn: Drawn,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write `grid` to an image file atomically; raise ConfigError for an unknown file extension."""
    save_picture(path, Image.fromarray(grid(images, drawn, mean, std)))


def save_sheet(path: str | Path, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write rows of images, (C, h, w) uint8 of any sizes, to a file; ConfigError for an unknown file extension."""
    columns = max(map(len, rows))
    sheet = Image.new("RGB", ((_CELL + _GAP) * columns + _GAP, (_CELL + _GAP) * len(rows) + _GAP), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            zoom = _CELL / max(image.shape[-2:])
            height, width = (max(1, round(side * zoom)) for side in image.shape[-2:])
            tile = rgb_image(image.cpu().numpy()).resize((width, height), resampling(zoom))
            sheet.paste(tile, (_GAP + column * (_CELL + _GAP), _GAP + row * (_CELL + _GAP)))
    save_picture(path, sheet)


def save_picture(path: str | Path, picture: Image.Image) -> None:
    """Write a picture atomically."""
    kind = _format(path)
    with replacing(path_of(path, "out")) as file:
        picture.save(file, format=kind, **({"pnginfo": png_mark()} if kind == "PNG" else {}))


def check_place(out: str | Path, data: Any) -> None:
    """Raise ConfigError if a picture would replace, or become, an image of the data: marked PNG files are left out."""
    data, file = joined_paths(data), path_of(out, "out")
    if not isinstance(data, str | os.PathLike):
        return
    check_not_read(file, data)
    for path in listed_paths(os.fspath(data)):
        if not Path(path).is_dir() or not file.resolve().is_relative_to(Path(path).resolve()):
            continue
        if file.suffix.lower() != ".png":
            raise ConfigError(
                f"{out} lies in {path} and would become an image of the data: choose a name that ends in .png, which "
                "inbatch marks and leaves out, or another folder"
            )
        if file.exists() and not is_marked(str(file)):
            raise ConfigError(f"{out} is an image of {path}, which the picture would replace: choose another name")


def check_picture(path: str | Path) -> None:
    """Raise ConfigError for a file extension that Pillow cannot write, InbatchError if the file cannot be written."""
    _format(path)
    check_writable(path_of(path, "out"))


def _format(path: str | Path) -> str:
    """Return Pillow's name of the format of a picture."""
    file = path_of(path, "out")
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        raise ConfigError(f"cannot write {file}: unknown file extension {file.suffix!r}; use .png or .jpg")
    return kind


def rgb_image(pixels: np.ndarray) -> Image.Image:
    """Convert (C, h, w) uint8 to an RGB image."""
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, 0)
    return Image.fromarray(np.ascontiguousarray(shown.transpose(1, 2, 0)))


def resampling(zoom: float) -> Image.Resampling:
    """Return the resampling filter; enlarged pixels stay visible."""
    return Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.BOX


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None, None]


@isolated
@with_own_parts
def draw_views(
    data: Any, out: str | Path, method: str | None = None, *, count: int = 8, seed: int = 0,
    settings: Mapping[str, Any] | None = None, **fields: Any,
) -> Part:  # fmt: skip
    """Draw some images with their views into an image file; return the name and options of the views."""
    check_picture(out)
    merged = merged_settings(method, None, settings, fields)
    data = requested_data(data, merged)
    check_place(out, data)
    recipe, source = resolve_recipe(data, merged)
    chosen = Subset(source, permutation(seed, 0, len(source))[:count], "drawn by the seed")
    mean, std = (0.5,) * source.channels, (0.25,) * source.channels  # undone when the grid is drawn
    views = views_of(recipe, mean, std)
    held = decode_all(chosen, canvas=2 * max(view.size for view in views.views))
    number, label = torch.arange(len(held.source)), held.source.labels
    drawn = views(Batch(number, label, seed, 0, images=held.images, size=held.size))
    images = [image[:, :h, :w] for image, (h, w) in zip(held.images, held.size.tolist(), strict=True)]
    save_grid(out, images, drawn, mean, std)
    return recipe.views
