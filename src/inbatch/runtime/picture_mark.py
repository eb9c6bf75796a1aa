"""Mark in the pictures that inbatch writes, by which they are recognised in a folder of images and left out."""

import os

from PIL.PngImagePlugin import PngInfo

MARK = {"Software": "inbatch"}
"""Metadata of a PNG that inbatch writes: the argument `metadata` of matplotlib's `savefig`."""

_TEXT = b"tEXtSoftware\0inbatch"
_HEAD = 512  # bytes; Pillow writes text in front of the pixels, behind the header of 33 bytes
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def png_mark() -> PngInfo:
    """Return the mark as the argument `pnginfo` of Pillow's `save`."""
    info = PngInfo()
    for key, text in MARK.items():
        info.add_text(key, text)
    return info


def is_marked(path: bytes | str) -> bool:
    """Return whether a file begins as a PNG with the mark; False if it cannot be read."""
    try:
        file = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        return _TEXT in os.read(file, _HEAD)
    except OSError:
        return False
    finally:
        os.close(file)
