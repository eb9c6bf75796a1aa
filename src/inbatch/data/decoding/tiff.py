"""TIFF decoding by tifffile for files that Pillow cannot read: any number of channels of any type, first page only."""

import io
import lzma
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic TIFF and BigTIFF, little and big endian
_SPECIAL: Any = dict.fromkeys(
    ("is_lsm", "is_scanimage", "is_ndpi"), False
)  # microscopy formats, for which tifffile would read every page
_ORIENTATION = 274
_UNPACK: dict[int, Any] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}  # by TIFF compression tag


class Header(NamedTuple):
    """First page as stored.

    Attributes:
        height: In pixels.
        width: In pixels.
        channels: Number of channels.
        bytes: Size of its pixels, or of one tile if that is larger.
        bits: Bits per value.
        turn: EXIF orientation, 1 is upright.
    """

    height: int
    width: int
    channels: int
    bytes: int
    bits: int
    turn: int


def is_tiff(head: bytes) -> bool:
    """Return whether a file that starts with `head` has a TIFF signature."""
    return head.startswith(_MAGIC)


def header(file: bytes | str) -> Header:
    """Read the header of the first page; raise ValueError if the file is damaged or not supported."""
    with _page(file) as page:
        apart, depth, height, width, together = page.shaped
        if page.dtype is None or depth != 1 or min(apart, together) != 1:
            raise ValueError("not a TIFF of flat images")
        if not all(isinstance(n, int) and n > 0 for n in (apart, height, width, together)):  # tags can hold anything
            raise ValueError(f"its header says {width}x{height} pixels")
        turn = page.tags.valueof(_ORIENTATION, 1)
        size = max(apart * together * height * width, math.prod(page.chunks)) * page.dtype.itemsize
        return Header(
            height, width, apart * together, size, 8 * page.dtype.itemsize, turn if turn in range(1, 9) else 1
        )


def decode(file: bytes | str) -> np.ndarray:
    """Decode the first page (h, w, channels) in its stored type; raise ValueError if the file is damaged."""
    with _page(file) as page:
        _check_packed(page)
        values = page.asarray(maxworkers=1).reshape(page.shaped)[:, 0]
        return np.moveaxis(values[..., 0], 0, -1) if len(values) > 1 else values[0]


def _check_packed(page: Any) -> None:
    """Raise ValueError if a compressed part unpacks to more bytes than the size in its header.

    tifffile would unpack two million bytes to two billion.
    """
    if (unpack := _UNPACK.get(int(page.compression))) is None:
        return
    most, file = math.prod(page.chunks) * page.dtype.itemsize, page.parent.filehandle
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        file.seek(start)
        if len(unpack().decompress(file.read(size), most + 1)) > most:
            raise ValueError("its compressed pixels exceed the size in its header")


@contextmanager
def _page(file: bytes | str) -> Iterator[Any]:
    try:
        import tifffile
    except ImportError as e:
        raise ValueError('TIFF files of this kind need tifffile: python -m pip install "inbatch[tiff]"') from e
    try:
        given = io.BytesIO(file) if isinstance(file, bytes) else file
        with tifffile.TiffFile(given, **_SPECIAL) as opened:
            yield opened.pages.first
    except Exception as e:  # a damaged file can raise any exception
        if "imagecodecs" in str(e):
            raise ValueError(f"{e}: python -m pip install imagecodecs") from e
        raise ValueError(str(e) or type(e).__name__) from e
