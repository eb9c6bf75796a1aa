"""PNG with other than 8 bits per channel, of which Pillow keeps the upper 8 and misreads a transparent colour."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

from inbatch.data.pixels import Levels, to_bytes


def to_8_bits(
    image: Image.Image, bits: int, reopen: Callable[[], Image.Image], levels: Levels | None, alpha: bool
) -> Image.Image:
    """Convert a PNG that Pillow would not convert correctly to 8 bits; return any other image unchanged.

    These are colours of 16 bits that are read by levels, and images with a transparent colour (tRNS), which Pillow
    compares with values of 8 bits.

    Args:
        image: Opened PNG.
        bits: Bits per value, as stored.
        reopen: Function that opens the same file a second time.
        levels: The two values that are mapped to 0 and 255; None for the upper 8 bits.
        alpha: Apply the levels to alpha as well, since it is a channel of the data; else its full range is used.

    Raises:
        ValueError: If the image is 16-bit grey with an alpha channel, and levels are given.
    """
    assert isinstance(image, ImageFile.ImageFile)
    kind, clear = str(image.tile[0].args) if image.tile else "", image.info.get("transparency")
    if bits < 8 and image.mode in ("1", "L") and clear is not None and clear < 2**bits:
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if kind == "LA;16B" and levels is not None:
        raise ValueError("16-bit grey with transparency cannot be read by levels: save it without transparency")
    by_levels = levels is not None and kind in ("RGB;16B", "RGBA;16B")
    if not by_levels and (clear is None or kind not in ("I;16B", "RGB;16B")):
        return image
    values = np.atleast_3d(np.asarray(image)) if kind == "I;16B" else _colours(image, kind, reopen)
    pixels = to_bytes(values, levels)
    if clear is not None:
        opaque = (values != clear).any(2, keepdims=True)
        pixels = np.concatenate([pixels, np.where(opaque, np.uint8(255), np.uint8(0))], 2)
    elif not alpha:
        pixels[..., 3:] = values[..., 3:] >> 8
    return Image.fromarray(pixels)


def _colours(image: ImageFile.ImageFile, kind: str, reopen: Callable[[], Image.Image]) -> np.ndarray:
    """Return all 16 bits of colours.

    Pillow unpacks the upper byte of every value, or the lower byte if the byte order is declared reversed.
    """
    with reopen() as lower:
        assert isinstance(lower, ImageFile.ImageFile)
        lower.tile = [tile._replace(args=kind.replace(";16B", ";16L")) for tile in lower.tile]
        lower.load()
        image.load()
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
