"""Conversion of pixels to uint8: levels for more than 8 bits, transparency on white. For files, arrays and encoders."""

import numpy as np
from PIL import Image

Levels = tuple[float, float]
"""The two values that are mapped to 0 and 255."""

_CHUNK = 2**22  # values converted at once: the input may already fill half of the memory


def stored_bits(image: Image.Image, head: bytes) -> int:
    """Return the bits per value of an image file that starts with `head`; Pillow modes show it for some files only."""
    if image.format == "PNG":
        return head[24]
    return max(image.tag_v2.get(258, (1,))) if image.format == "TIFF" else 8  # type: ignore[attr-defined]


def to_bytes(values: np.ndarray, levels: Levels | None) -> np.ndarray:
    """Convert values to uint8 of the same shape; uint8 is returned unchanged.

    Args:
        values: Integer or floating-point values of any shape.
        levels: Values mapped to 0 and 255; values outside are clipped, NaN becomes 0. None keeps the upper 8 bits of
            uint16.

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
            f"{values.dtype} values have no known range: say which two become 0 and 255, such as --set levels=[0,1], "
            "or give uint8"
        )
    out = np.empty(values.shape, np.uint8)
    step = max(1, _CHUNK // max(1, values[0].size)) if len(values) else 1
    for at in range(0, len(values), step):
        part = values[at : at + step]
        out[at : at + step] = part >> 8 if levels is None else _scaled(part, *levels)
    return out


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    x = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.nan_to_num(x, copy=False, nan=0).clip(0, 255)).astype(np.uint8)


def from_pillow(image: Image.Image, channels: int, levels: Levels | None) -> np.ndarray:
    """Convert a Pillow image to uint8 pixels (h, w, channels): grey (1) or RGB (3), on a white background."""
    if image.mode.startswith("I;16"):  # convert() clips at 255
        image = Image.fromarray(to_bytes(np.asarray(image), levels))
    elif image.mode in ("I", "F"):
        if levels is None:
            raise ValueError(
                "32-bit pixels have no known range: say which two values become 0 and 255, such as "
                "--set levels=[0,1], or save them with 8 or 16 bits"
            )
        image = Image.fromarray(to_bytes(np.asarray(image), levels))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels
