"""PGM and PPM with more than 8 bits per value; Pillow scales their values to 16 or 8 bits."""

import math

import numpy as np
from PIL import Image, ImageFile


def white(image: Image.Image) -> int:
    """Return the largest value that an opened PBM, PGM or PPM states, which is white."""
    assert isinstance(image, ImageFile.ImageFile)
    args = image.tile[0].args
    return args[1] if isinstance(args, tuple) and isinstance(args[1], int) else 65535 if args == "I;16B" else 255


def values(image: Image.Image, white: int) -> np.ndarray:
    """Return the values (h, w) or (h, w, 3) of an opened PGM or PPM of more than 8 bits, as stored.

    Args:
        image: Image whose pixels are not loaded.
        white: Largest value that it states.

    Raises:
        ValueError: If the file is truncated, or contains another value.
    """
    assert isinstance(image, ImageFile.ImageFile) and image.fp is not None
    decoder, _, offset, _ = image.tile[0]
    shape = (*image.size[::-1], *([3] if image.mode == "RGB" else []))
    count = math.prod(shape)
    image.fp.seek(offset)
    if decoder == "ppm_plain":
        lines = (line.partition(b"#")[0] for line in image.fp.read().splitlines())
        samples = np.fromiter(map(int, b" ".join(lines).split()), np.int64)[:count]
    else:
        samples = np.frombuffer(image.fp.read(2 * count), ">u2")
    if len(samples) < count:
        raise ValueError(f"truncated: {len(samples):,} of {count:,} values")
    if samples.min() < 0 or samples.max() > white:
        raise ValueError(f"it contains a value outside of 0 to {white}, the range that its header states")
    return samples.astype(np.uint16).reshape(shape)
