"""TIFF by its own tags: the samples that Pillow keeps as stored, and all others through tifffile."""

import io
import lzma
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from inbatch.data.pixels import Levels, flattened, from_pillow, to_bytes

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic TIFF and BigTIFF, little and big endian
_SPECIAL: Any = dict.fromkeys(
    ("is_lsm", "is_scanimage", "is_ndpi"), False
)  # microscopy formats, for which tifffile would read every page
_SUBFILE, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 254, 258, 262, 274, 277
_PLANAR, _EXTRA, _FORMAT = 284, 338, 339
_UNSIGNED, _SIGNED = 1, 2  # values of SampleFormat
_ASSOCIATED, _ALPHA = 1, (1, 2, 999)  # values of ExtraSamples: premultiplied, and all kinds (999: Corel Draw)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2  # values of PhotometricInterpretation
_OTHER_COLOURS = {3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIE L*a*b*", 9: "ICC L*a*b*", 10: "ITU L*a*b*"}
_NOT_A_PAGE = 0b101  # bits of NewSubfileType: a reduced copy of another page, a mask of another page
_UNPACK: dict[int, Any] = {
    8: zlib.decompressobj,
    32946: zlib.decompressobj,
    34925: lzma.LZMADecompressor,
}  # by TIFF compression tag


class Header(NamedTuple):
    """First page as stored, or all pages if they are read as channels.

    Attributes:
        height: In pixels.
        width: In pixels.
        channels: Number of channels.
        bytes: Size of its pixels, or of one tile if that is larger.
        bits: Bits per value.
        turn: EXIF orientation, 1 is upright.
        colours: Number of channels of a page that are not extra samples.
        alpha: Value of ExtraSamples if the only extra sample is an alpha, else None.
        photometric: Value of PhotometricInterpretation.
        pages: Number of pages that are read.
    """

    height: int
    width: int
    channels: int
    bytes: int
    bits: int
    turn: int
    colours: int
    alpha: int | None
    photometric: int
    pages: int = 1

    @property
    def white_is_zero(self) -> bool:
        """Whether zero is white, so that the colours are inverted."""
        return self.photometric == _WHITE_IS_ZERO

    def supports(self, channels: int) -> bool:
        """Return whether the page gives this number of channels: its own, or grey and RGB without alpha."""
        converts = {self.colours, channels} <= {1, 3} and (self.alpha or self.colours == self.channels)
        return channels == self.channels or bool(converts)


def is_tiff(head: bytes) -> bool:
    """Return whether a file that starts with `head` has a TIFF signature."""
    return head.startswith(_MAGIC)


def stored_bits(image: Image.Image) -> int:
    """Return the bits per value of a TIFF that Pillow opened."""
    return max(_tags(image).get(_BITS, (1,)))


def white_is_zero(image: Image.Image) -> bool:
    """Return whether a TIFF that Pillow opened states that zero is white."""
    return _tags(image).get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def has_orientation(image: Image.Image) -> bool:
    """Return whether a TIFF that Pillow opened states its orientation in a tag."""
    return _ORIENTATION in _tags(image)


def exact(image: Image.Image, levels: Levels | None) -> bool:
    """Return whether Pillow keeps all samples of a TIFF that it opened, as far as they are needed with these levels.

    Pillow leaves out bands without a stated meaning, reads signed bytes as unsigned ones, keeps the upper 8 bits of
    16-bit colours, and confuses the bytes of planar 16-bit ones.
    """
    tags = _tags(image)
    bits, kinds, extra = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (_UNSIGNED,))), tags.get(_EXTRA, ())
    if tags.get(_SAMPLES, 1) == 1:
        return (bits, kinds) != ({8}, {_SIGNED})
    planar = tags.get(_PLANAR, 1) == 2
    if len(extra) > 1 or not set(extra) <= set(_ALPHA) or image.mode == "La":
        return False
    if planar and (image.mode not in ("RGB", "RGBA", "CMYK") or _ASSOCIATED in extra):
        return False
    return bits == {8} or (not planar and levels is None)


def to_8_bits(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Convert a TIFF of one sample with more than 8 bits, opened by Pillow, to 8 bits; return any other unchanged."""
    if not image.mode.startswith(("I", "F")):
        return image
    tags = _tags(image)
    bits, kind = tags.get(_BITS, (1,))[0], tags.get(_FORMAT, (_UNSIGNED,))[0]
    turned = white_is_zero(image)
    values = np.asarray(image)
    if image.mode == "I":  # Pillow has one type for all integers of more than 16 bits, and for signed ones
        values = values.view(np.uint32) if kind == _UNSIGNED else values.astype(f"i{bits // 8}")
    pixels = to_bytes(values, levels, 2**bits - 1)
    return Image.fromarray(255 - pixels if turned else pixels)


def pages(image: Image.Image) -> int:
    """Return the number of pages of a TIFF that Pillow opened, without reduced copies and masks of other pages."""
    assert isinstance(image, ImageFile.ImageFile)
    if not getattr(image, "is_animated", False):
        return 1
    count = 0
    try:
        for number in range(image.n_frames):  # type: ignore[attr-defined] # set by the plug-ins
            image.seek(number)
            count += not _tags(image).get(_SUBFILE, 0) & _NOT_A_PAGE
    except Exception:  # a damaged page, which is not read, can raise any exception
        pass
    image.seek(0)
    return max(1, count)


def header(file: bytes | str, channels: int) -> Header:
    """Read the header of the page, or of the pages of one size, that give this number of channels.

    Raises:
        ValueError: If the file is damaged or not supported, or has another number of channels.
    """
    with _opened(file) as stored:
        first = _described(stored.first)
        if first.supports(channels):
            if channels in (1, 3) and first.photometric in _OTHER_COLOURS:
                name = _OTHER_COLOURS[first.photometric]
                raise ValueError(f"its colours are {name} of {first.bits} bits per value: save it as RGB")
            return first
        planes = [_described(page) for page in _whole(stored)] if channels not in (1, 3) and len(stored) > 1 else []
    many, total = len(planes), len(planes) * first.channels
    equal = all(plane == first for plane in planes)
    if many > 1 and equal and total == channels:
        return first._replace(channels=total, bytes=many * first.bytes, pages=many)
    has = f"it has {first.channels} channels"
    if many > 1 and not equal:
        raise ValueError(f"{has}, {channels} were requested, and its {many} pages differ in size or type")
    if many > 1:
        has, first = f"{has} on each of {many} pages", first._replace(channels=total)
    raise ValueError(f"{has}, {channels} were requested (a run with --set channels={first.channels} reads them)")


def count_pages(file: bytes | str) -> int:
    """Return the number of pages as `pages` does, for files that Pillow does not open."""
    with _opened(file) as stored:
        return 1 if len(stored) == 1 else max(1, len(_whole(stored)))


def decode(file: bytes | str, header: Header, channels: int, levels: Levels | None) -> tuple[np.ndarray, float | None]:
    """Decode a file to uint8 pixels (h, w, channels), and the fraction of them that is not opaque, None without alpha.

    Raises:
        ValueError: If the file is damaged, or its values have no known range.
    """
    with _opened(file) as stored:
        planes = [_values(page) for page in (_whole(stored) if header.pages > 1 else [stored.first])]
    values = planes[0] if len(planes) == 1 else np.concatenate(planes, -1)
    white = 2**header.bits - 1 if values.dtype.kind == "u" else 65535
    if channels == header.channels:
        alpha = values[..., -1:] if header.alpha and header.pages == 1 else None
        share = None if alpha is None else float(np.mean(alpha != _opaque(alpha.dtype, header.bits)))
        return _turned(to_bytes(values, levels, white), header), share
    pixels = _turned(to_bytes(values[..., : header.colours], levels, white), header)
    if header.alpha is None:
        image, share = Image.fromarray(pixels[..., 0] if header.colours == 1 else pixels), None
    else:
        alpha = values[..., header.colours :]
        covering = to_bytes(alpha, (0, _opaque(alpha.dtype, header.bits)))
        image, share = flattened(_with_alpha(np.concatenate([pixels, covering], -1), header.alpha))
    return from_pillow(image, channels, None), share


def _tags(image: Image.Image) -> Any:
    return image.tag_v2  # type: ignore[attr-defined] # only TIFF has tags


def _described(page: Any) -> Header:
    apart, depth, height, width, together = page.shaped
    if page.dtype is None or depth != 1 or min(apart, together) != 1:
        raise ValueError("not a TIFF of flat images")
    if not all(isinstance(n, int) and n > 0 for n in (apart, height, width, together)):  # tags can hold anything
        raise ValueError(f"its header says {width}x{height} pixels")
    turn, channels = page.tags.valueof(_ORIENTATION, 1), apart * together
    size = max(channels * height * width, math.prod(page.chunks)) * page.dtype.itemsize
    photometric = int(page.photometric) if _PHOTOMETRIC in page.tags else _BLACK_IS_ZERO
    extra = tuple(map(int, page.extrasamples))
    if photometric == _RGB and channels == 4 and not extra:  # as libtiff and Pillow read a missing tag
        extra = (2,)
    return Header(
        height, width, channels, size, _bits(page), turn if turn in range(1, 9) else 1,
        colours=max(1, channels - len(extra)),
        alpha=extra[0] if len(extra) == 1 and extra[0] in _ALPHA and channels > 1 else None,
        photometric=photometric,
    )  # fmt: skip


def _bits(page: Any) -> int:
    bits = page.bitspersample
    return bits if isinstance(bits, int) and 0 < bits <= 8 * page.dtype.itemsize else 8 * page.dtype.itemsize


def _whole(stored: Any) -> list[Any]:
    """Return the pages that are neither reduced copies nor masks of others."""
    return [page for page in stored if not int(page.tags.valueof(_SUBFILE, 0)) & _NOT_A_PAGE]


def _values(page: Any) -> np.ndarray:
    """Decode a page (h, w, channels) in its stored type; values of fewer than 8 bits become uint8 from 0 to 255."""
    _check_packed(page)
    values = page.asarray(maxworkers=1).reshape(page.shaped)[:, 0]
    values = np.moveaxis(values[..., 0], 0, -1) if len(values) > 1 else values[0]
    if values.dtype.kind == "b" or (values.dtype == np.uint8 and _bits(page) < 8):
        most = 2 ** (1 if values.dtype.kind == "b" else _bits(page)) - 1
        return np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)[values.astype(np.uint8)]
    return values


def _opaque(dtype: np.dtype, bits: int) -> float:
    """Return the value of an opaque alpha."""
    return 1.0 if dtype.kind == "f" else 255 if bits < 8 else 2 ** (bits - (dtype.kind == "i")) - 1


def _turned(pixels: np.ndarray, header: Header) -> np.ndarray:
    """Turn the colours of a page on which zero is white, so that 0 is black; extra samples have no colour."""
    if not header.white_is_zero:
        return pixels
    of_page = pixels.reshape(*pixels.shape[:2], header.pages, -1).copy()
    of_page[..., : header.colours] = 255 - of_page[..., : header.colours]
    return of_page.reshape(pixels.shape)


def _with_alpha(pixels: np.ndarray, alpha: int) -> Image.Image:
    """Return a Pillow image of pixels (h, w, 2 or 4) whose last channel is alpha."""
    mode = "LA" if pixels.shape[2] == 2 else "RGBA"
    stored = mode[:-1] + "a" if alpha == _ASSOCIATED else mode
    image = Image.frombytes(stored, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())
    return image if stored == mode else image.convert(mode)


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
def _opened(file: bytes | str) -> Iterator[Any]:
    """Open the pages of a file with tifffile."""
    try:
        import tifffile
    except ImportError as e:
        raise ValueError('TIFF files of this kind need tifffile: python -m pip install "inbatch[tiff]"') from e
    try:
        source = io.BytesIO(file) if isinstance(file, bytes) else file
        with tifffile.TiffFile(source, **_SPECIAL) as opened:
            yield opened.pages
    except Exception as e:  # a damaged file can raise any exception
        if "imagecodecs" in str(e):
            raise ValueError(f"{e}: python -m pip install imagecodecs") from e
        raise ValueError(str(e) or type(e).__name__) from e
