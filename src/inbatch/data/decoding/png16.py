"""PNG with more than 8 bits per channel; Pillow alone decodes only the upper 8 bits."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

from inbatch.data.pixels import Levels, to_bytes


def to_8_bits(image: Image.Image, reopen: Callable[[], Image.Image], levels: Levels, alpha: bool) -> Image.Image:
    """Convert a 16-bit colour PNG to 8 bits by the levels; return any other image unchanged.

    Pillow unpacks the upper byte of every value, or the lower byte if the byte order is declared reversed.

    Args:
        image: Opened PNG.
        reopen: Function that opens the same file a second time.
        levels: The two values that are mapped to 0 and 255.
        alpha: Apply the levels to alpha as well, since it is a channel of the data; else its full range is used.

    Raises:
        ValueError: If the image is 16-bit grey with transparency.
    """
    assert isinstance(image, ImageFile.ImageFile)
    kind = str(image.tile[0].args)
    if kind == "LA;16B":
        raise ValueError("16-bit grey with transparency cannot be read by levels: save it without transparency")
    if kind not in ("RGB;16B", "RGBA;16B"):
        return image
    with reopen() as lower:
        assert isinstance(lower, ImageFile.ImageFile)
        lower.tile = [tile._replace(args=kind.replace(";16B", ";16L")) for tile in lower.tile]
        lower.load()
        image.load()
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    pixels = to_bytes(values, levels)
    if not alpha:
        pixels[..., 3:] = values[..., 3:] >> 8
    out = Image.fromarray(pixels)
    out.info = image.info
    return out
