"""JPEG decoding by libjpeg-turbo through simplejpeg; unusual and damaged files are left to Pillow."""

from functools import cache
from struct import Struct, error
from typing import Any, NamedTuple

import numpy as np

_SEGMENT = Struct(">HH")  # a marker and the length of its segment
_FRAME = Struct(">BHHB")  # bits per sample, height, width, components
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive; others are arithmetic or lossless
# Huffman and quantisation tables, restart intervals, comments and application segments
_TABLES = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)}
_NOTES = 0xFFE1  # EXIF or XMP
_SCAN = 0xFFDA


class Header(NamedTuple):
    """JPEG header as stored: height and width in pixels, 1 or 3 components, and whether EXIF or XMP is present."""

    height: int
    width: int
    components: int
    notes: bool


_UNUSUAL = {
    0xFFC3: "lossless", 0xFFC5: "hierarchical", 0xFFC6: "hierarchical", 0xFFC7: "hierarchical and lossless",
    0xFFCB: "lossless arithmetic", 0xFFF7: "JPEG-LS",
}  # fmt: skip
"""Frames of other kinds than baseline, extended, progressive and arithmetic."""

_last: tuple[bytes, Header | None] = (b"\0", None)  # no JPEG starts with this byte


def header(data: bytes) -> Header | None:
    """Parse the header of a JPEG before its first scan; return None for other files and unusual kinds of JPEG."""
    global _last
    start, known = _last
    if data.startswith(start):  # images from the same encoder often share all tables
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
    except error:  # the file ends before its pixel data
        return None
    bits, height, width, components = frame
    if bits != 8 or not height or not width or components not in (1, 3):
        return None
    parsed = Header(height, width, components, notes)
    _last = (data[: at + 2 + segment[1]], parsed)
    return parsed


def unusual(data: bytes) -> str | None:
    """Return what distinguishes a JPEG from those of 8 bits that every library reads; None for an ordinary one."""
    at = 2
    try:
        while (segment := _SEGMENT.unpack_from(data, at))[0] != _SCAN and segment[1] >= 2:
            marker, length = segment
            if marker == 0xFFF7 or (0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC)):
                bits, name = data[at + 4], _UNUSUAL.get(marker)
                parts = ([f"{bits} bits per value"] if bits != 8 else []) + ([f"the kind {name}"] if name else [])
                return f"a JPEG of {' and '.join(parts)}" if parts else None
            at += 2 + length
    except (error, IndexError):
        return None
    return None


def decode(data: bytes, stored: Header, divisor: int, grey: bool) -> np.ndarray | None:
    """Decode pixels (h, w, 3), or (h, w, 1) if grey, at 1/divisor of the stored size.

    Args:
        data: Contents of the file.
        stored: Its header.
        divisor: 1, 2, 4 or 8.
        grey: Decode to one channel.

    Returns:
        The pixels, or None if decoding fails in any way.
    """
    height, width = -(-stored.height // divisor), -(-stored.width // divisor)
    size = {} if divisor == 1 else {"min_height": height, "min_width": width}
    try:
        pixels = _simplejpeg().decode_jpeg(data, "GRAY" if grey else "RGB", **size)
    except Exception:  # Pillow decides what can be read and reports what cannot
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def fast_jpeg() -> bool:
    """Return whether simplejpeg is installed; otherwise Pillow decodes JPEG as well."""
    return _simplejpeg() is not None


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
