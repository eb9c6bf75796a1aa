"""JPEG by libjpeg-turbo, through simplejpeg: what it is sure of. Whatever is unusual or damaged is left to Pillow."""

from functools import cache
from struct import Struct, error
from typing import Any, NamedTuple

import numpy as np

_SEGMENT = Struct(">HH")  # a marker and the length of what it opens
_FRAME = Struct(">BHHB")  # bits per sample, height, width, components
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive; others are arithmetic or lossless
_TABLES = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)}  # Huffman, quantisation, restarts, notes
_NOTES = 0xFFE1  # EXIF or XMP
_SCAN = 0xFFDA


class Header(NamedTuple):
    """A JPEG as stored: height and width in pixels, 1 or 3 components, and whether it holds EXIF or XMP."""

    height: int
    width: int
    components: int
    notes: bool


_last: tuple[bytes, Header | None] = (b"\0", None)  # no JPEG begins like this


def header(data: bytes) -> Header | None:
    """What stands before a JPEG's first scan; None where it is no JPEG, or not one of the usual kinds."""
    global _last
    start, known = _last
    if data.startswith(start):  # the images of one encoder often share all of their tables
        return known
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    at, frame, notes = 2, (0, 0, 0, 0), False
    try:
        while (segment := _SEGMENT.unpack_from(data, at))[0] != _SCAN:
            marker, length = segment
            if marker in _FRAMES and not frame[0]:
                frame = _FRAME.unpack_from(data, at + 4)
            elif marker not in _TABLES or length < 2:
                return None
            notes |= marker == _NOTES
            at += 2 + length
    except error:  # it ends before its pixels begin
        return None
    bits, height, width, components = frame
    if bits != 8 or not height or not width or components not in (1, 3):
        return None
    found = Header(height, width, components, notes)
    _last = (data[: at + 2 + segment[1]], found)
    return found


def decode(data: bytes, stored: Header, divisor: int, grey: bool) -> np.ndarray | None:
    """Pixels (h, w, 3), or (h, w, 1) if grey, at 1/divisor of their size (1, 2, 4, 8); None if anything is amiss."""
    height, width = -(-stored.height // divisor), -(-stored.width // divisor)
    size = {} if divisor == 1 else {"min_height": height, "min_width": width}
    try:
        pixels = _simplejpeg().decode_jpeg(data, "GRAY" if grey else "RGB", **size)
    except Exception:  # Pillow decides what can be read, and says what cannot
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def fast_jpeg() -> bool:
    """Whether simplejpeg is there; if not, Pillow decodes JPEG, too."""
    return _simplejpeg() is not None


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
