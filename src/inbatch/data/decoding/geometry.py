"""Orientation, cutting and resizing of decoded pixels."""

from functools import cache
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GAP = 3.0  # `reducing_gap` from which Pillow's manual calls the result indistinguishable


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Rotate and mirror pixels by an EXIF orientation from 2 to 8."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)  # torch does not support negative strides


@cache
def _vectors() -> bool:
    """Return whether torch's uint8 resize uses AVX2: up to 7 times as fast as Pillow; without AVX2 it is slower."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def resized(
    pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], how: str
) -> UInt8[Tensor, "c s t"]:
    """Resize a box of (h, w, c) pixels to (height, width) with antialiasing.

    The box is cut out first, so that pixels outside it have no weight.

    Args:
        pixels: (h, w, c) uint8.
        box: (top, left, bottom, right) in pixels; may be fractional.
        size: (height, width) of the output.
        how: "bilinear" or "bicubic".
    """
    y0, x0, y1, x1 = int(box[0]), int(box[1]), ceil(box[2]), ceil(box[3])
    cut = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    if _vectors() and box == (y0, x0, y1, x1):
        image = torch.from_numpy(cut).permute(2, 0, 1)[None]
        return F.interpolate(image, size, mode=how, antialias=True)[0]
    within = (box[1] - x0, box[0] - y0, box[3] - x0, box[2] - y0)
    # Pillow would treat two or four channels as transparency, and does not support more.
    planes = [cut] if cut.shape[2] == 3 else [cut[..., c] for c in range(cut.shape[2])]
    out = [np.array(_by_pillow(Image.fromarray(plane), within, size, _FILTERS[how])) for plane in planes]
    return torch.from_numpy(np.dstack(out).transpose(2, 0, 1))


def _by_pillow(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], how: Image.Resampling
) -> Image.Image:
    """Resize a box (left, top, right, bottom) of an image, its rows first, as torch does.

    Pillow 13 chooses the order by the size. Bicubic values are limited to 0 to 255 between the passes, so that its
    pixels differ from those of Pillow 12 by up to 20. As with `reducing_gap`, blocks of a much larger image are
    averaged first.
    """
    height, width = size
    left, top, right, bottom = box
    x, y = int((right - left) / width / _GAP) or 1, int((bottom - top) / height / _GAP) or 1
    if (x, y) != (1, 1):
        image = image.reduce((x, y))
        left, top, right, bottom = left / x, top / y, right / x, bottom / y
    rows = image.resize((width, image.height), how, box=(left, 0, right, image.height))
    return rows.resize((width, height), how, box=(0, top, width, bottom))
