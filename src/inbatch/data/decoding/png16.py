"""PNG of more than 8 bits a channel, of which Pillow gives the upper 8."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile

from inbatch.data.pixels import Levels, to_bytes


def deep(image: Image.Image, again: Callable[[], Image.Image], levels: Levels) -> Image.Image:
    """A colour PNG with its 16 bits brought to 8 by the levels; any other as it is.

    Pillow unpacks the upper bytes of every value, or if the bytes are said to stand the other way around, the lower.
    """
    assert isinstance(image, ImageFile.ImageFile)
    kind = str(image.tile[0].args)
    if kind == "LA;16B":
        raise ValueError("16-bit grey with transparency cannot be read by levels: save it without transparency")
    if kind not in ("RGB;16B", "RGBA;16B"):
        return image
    with again() as lower:
        assert isinstance(lower, ImageFile.ImageFile)
        lower.tile = [tile._replace(args=kind.replace(";16B", ";16L")) for tile in lower.tile]
        lower.load()
        image.load()
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    pixels = to_bytes(values, levels)
    pixels[..., 3:] = values[..., 3:] >> 8
    out = Image.fromarray(pixels)
    out.info = image.info
    return out
