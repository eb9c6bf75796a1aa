"""Conversion of pixels to uint8: levels for more than 8 bits, transparency on white. For files, arrays and encoders."""

import math
from typing import Any

import numpy as np
from PIL import Image

from inbatch.errors import ConfigError

Levels = tuple[float, float]
"""The two values that are mapped to 0 and 255."""

_CHUNK = 2**22  # values converted at once: the input may already fill half of the memory


def checked_levels(value: Any) -> Levels:
    """Return levels as numbers; ConfigError unless they are two finite ones, the lower one first."""
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"levels = {value!r:.60}: give two numbers, the lower one first, such as [0, 4095]")
    return low, high


def to_bytes(values: np.ndarray, levels: Levels | None, white: int = 65535) -> np.ndarray:
    """Convert values to uint8 of the same shape; uint8 is returned unchanged.

    Args:
        values: Integer or floating-point values of any shape.
        levels: Values mapped to 0 and 255; values outside are clipped, NaN becomes 0. None keeps the upper 8 bits of
            uint16.
        white: Largest value of uint16 pixels, if the file states a smaller one: the upper 8 of its bits are kept.

    Raises:
        ValueError: If `levels` is None and the type is neither uint8 nor uint16, or if the type is not numeric.
    """
    kind = values.dtype.kind, values.dtype.itemsize
    if kind == ("u", 1):
        return values
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{values.dtype} values are not pixels: pass uint8, 0 (black) to 255")
    if levels is None and kind != ("u", 2):
        raise ValueError(
            f"{values.dtype} values have no known range: give uint8, or name those that become 0 and 255 "
            "(a run with --set levels=[0,1] reads them)"
        )
    out = np.empty(values.shape, np.uint8)
    step = max(1, _CHUNK // max(1, values[0].size)) if len(values) else 1
    for at in range(0, len(values), step):
        part = values[at : at + step]
        out[at : at + step] = _upper(part, white) if levels is None else _scaled(part, *levels)
    return out


def _upper(values: np.ndarray, white: int) -> np.ndarray:
    if white == 65535:
        return values >> 8
    return np.minimum((values.astype(np.uint32) << 8) // (white + 1), 255)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    x = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(x, copy=False, nan=0).clip(0, 255)).astype(np.uint8)


def flattened(image: Image.Image) -> tuple[Image.Image, float | None]:
    """Lay an image on white; return it with the fraction of pixels that are not opaque, None without transparency."""
    if not image.has_transparency_data:
        return image, None
    image = image.convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    covered = np.count_nonzero(alpha == 255)
    if covered < alpha.size:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), 1 - covered / alpha.size


def from_pillow(image: Image.Image, channels: int, levels: Levels | None) -> np.ndarray:
    """Convert a Pillow image to uint8 pixels (h, w, channels).

    Args:
        image: Image of any mode.
        channels: 1 (grey) or 3 (RGB), on a white background; 2 or 4: the same with the alpha of the image.
        levels: See `to_bytes`.

    Raises:
        ValueError: If 32-bit values have no levels, or an alpha is requested that the image does not have.
    """
    if image.mode.startswith("I;16"):  # convert() clips at 255
        image = Image.fromarray(to_bytes(np.asarray(image), levels))
    elif image.mode in ("I", "F"):
        if levels is None:
            raise ValueError(
                "32-bit pixels have no known range: save them with 8 or 16 bits, or name the two values that become 0 "
                "and 255 (a run with --set levels=[0,1] reads them)"
            )
        image = Image.fromarray(to_bytes(np.asarray(image), levels))
    if channels in (2, 4):
        check_alpha(image, channels)
    else:
        image, _ = flattened(image)
    mode = {1: "L", 2: "LA", 4: "RGBA"}.get(channels, "RGB")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def check_alpha(image: Image.Image, channels: int) -> None:
    """Raise ValueError unless the image gives 2 (grey) or 4 (RGB) channels with alpha, by its header."""
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))
    stored = (1 if grey else 3) + image.has_transparency_data
    if stored != channels and (stored, channels) != (2, 4):
        raise ValueError(
            f"it has {'' if stored in (2, 4) else 'no alpha: '}{stored} channels, {channels} were requested "
            f"(a run with --set channels={stored} reads them)"
        )
