"""Decoding of image files to uint8 pixels: the header is read first, pixels on demand and only as many as needed.

JPEG is decoded by simplejpeg. Pillow decodes all other formats and every JPEG that simplejpeg reports a problem with;
tifffile decodes TIFF files that Pillow does not support.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from inbatch.data.decoding import jpeg, png16, tiff
from inbatch.data.decoding.jpeg import fast_jpeg
from inbatch.data.pixels import Levels, from_pillow, stored_bits, to_bytes
from inbatch.data.source import CropSpec
from inbatch.errors import DataError
from inbatch.runtime.files import open_regular

MAX_PIXELS = 64_000_000
"""Maximum number of pixels; larger images are refused before decoding, since a 110 kB PNG can hold 900 Mpx."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
"""Formats that Pillow may try, regardless of the file extension.

Its other readers stay disabled (EPS runs Ghostscript).
"""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GAP = 3.0  # Pillow's `reducing_gap` from which its manual calls the result indistinguishable
_ORIENTATION = 0x0112
_HEAD = 2**18  # bytes read when a file is opened: most files entirely; a worker holds 32 opened files at once


@contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """Convert any exception that Pillow raises on a damaged file to a DataError with its name."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, MemoryError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        if isinstance(e, Image.UnidentifiedImageError):
            reason = f"not one of {', '.join(FORMATS)}"
        raise DataError(f"{name()!r} cannot be read: {reason}; repair or remove it") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(f"{name()!r} cannot be read: {e}; shrink or remove it") from e


def file_channels(channels: int | None) -> int:
    """Return the number of channels to decode files to, by default 3 (RGB); raise DataError if it is less than 1."""
    if channels is not None and channels < 1:
        raise DataError(f"Images have 1 channel (grey), 3 (RGB) or more, not {channels}")
    return channels or 3


def decoders() -> str:
    """Return the names and versions of all libraries that decoded pixels depend on."""
    names = [*(["simplejpeg"] if fast_jpeg() else []), "pillow", "torch", "tifffile"]
    return ", ".join([*(f"{name} {_version(name)}" for name in names), torch.backends.cpu.get_cpu_capability()])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


class ImageFile:
    """Opened image file with known size; its pixels are decoded on demand and once.

    Args:
        file: Contents of the file, or its path.
        name: Function that returns the name used in errors.
        channels: 1 (grey) or 3 (RGB) for any file; another number for a TIFF with exactly that many channels.
        levels: See `pixels.to_bytes`, for more than 8 bits.

    Attributes:
        size: Height and width in pixels, upright (EXIF orientation applied).
        bits: Bits per value, as stored.

    Raises:
        DataError: If the file cannot be read or has more than `MAX_PIXELS` pixels.
    """

    bits = 8

    def __init__(self, file: bytes | str, name: Callable[[], str], channels: int, levels: Levels | None = None):
        self._name, self.channels, self._levels = name, channels, levels
        self._image: Image.Image | None = None
        self._tiff: tiff.Header | None = None
        self._turn = 1  # EXIF orientation
        if isinstance(file, bytes):
            head = file
        else:
            with _naming(name), open_regular(file) as opened:
                head = opened.read(_HEAD)
        self._file = head if len(head) < _HEAD else file
        self._jpeg = jpeg.header(head) if fast_jpeg() and channels in (1, 3) else None
        if self._jpeg is not None:
            self._stored = self._jpeg[:2]
        elif channels not in (1, 3):
            self._stored = self._many(head)
        else:
            self._stored = self._few(head)
        height, width = self.size = self._stored
        if height * width > MAX_PIXELS or (self._tiff and self._tiff.bytes > 3 * MAX_PIXELS):
            self.close()
            depth = f" of {self._tiff.bytes / 1e6:,.0f} MB" if self._tiff else ""
            raise DataError(
                f"{name()!r} cannot be read: {width}x{height} pixels{depth} are over the limit of "
                f"{MAX_PIXELS / 1e6:.0f} million{', 3 bytes each' if self._tiff else ''}; shrink or remove it"
            )
        if self._tiff is not None:
            self._turn = self._tiff.turn
        elif self._jpeg is None or self._jpeg.notes:
            self._turn = self._orientation()
        if self._turn >= 5:
            self.size = (width, height)

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that Pillow holds open."""
        if self._image is not None:
            self._image.close()

    def contents(self) -> bytes:
        """Return the bytes of the file; raise DataError if it can no longer be read."""
        return self._contents()

    def tensor(self, longest: int | None = None) -> UInt8[Tensor, "c h w"]:
        """Return the pixels, scaled down if the longer side exceeds `longest`.

        Raise DataError if the file is damaged.
        """
        if longest is None or max(self.size) <= longest:
            return torch.from_numpy(self._decode(1.0).transpose(2, 0, 1))
        height, width = self.size
        scale = longest / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = self._decode(scale)
        return _resized(pixels, (0, 0, *pixels.shape[:2]), size, "bilinear")

    def crops(self, boxes: Int[Tensor, "v 4"], wanted: Sequence[CropSpec]) -> tuple[UInt8[Tensor, "c s s"], ...]:
        """Return one crop per view: the box (top, left, height, width), resized with antialiasing to the view size."""
        places = boxes.tolist()
        need = max(side / min(h, w) for (_, _, h, w), (side, _) in zip(places, wanted, strict=True))
        pixels = self._decode(min(1.0, need))
        height, width = pixels.shape[:2]
        fy, fx = height / self.size[0], width / self.size[1]
        out = []
        for (top, left, h, w), (side, how) in zip(places, wanted, strict=True):
            box = (top * fy, left * fx, min((top + h) * fy, height), min((left + w) * fx, width))
            out.append(_resized(pixels, box, (side, side), how))
        return tuple(out)

    def _few(self, head: bytes) -> tuple[int, int]:
        """Return the stored size of a file to be decoded to 1 or 3 channels."""
        try:
            self._image = image = self._open()
        except DataError as e:
            if isinstance(e.__cause__, Image.UnidentifiedImageError) and tiff.is_tiff(head):
                return self._many(head)
            raise
        with _naming(self._name):
            self.bits = stored_bits(image, head)
        if self._levels is not None and self.bits > 8 and image.format == "TIFF" and image.mode.startswith("RGB"):
            image.close()  # Pillow keeps only the upper 8 bits of such a file
            return self._many(head)
        return image.size[::-1]

    def _many(self, head: bytes) -> tuple[int, int]:
        """Return the stored size of a TIFF to be decoded by tifffile; raise ValueError if its channels differ."""
        with _naming(self._name):
            if not tiff.is_tiff(head):
                raise ValueError(f"only TIFF files give {self.channels} channels, others 1 (grey) or 3 (RGB)")
            self._tiff = found = tiff.header(self._file)
            if found.channels != self.channels and {found.channels, self.channels} != {1, 3}:
                raise ValueError(
                    f"it has {found.channels} channels, {self.channels} were requested "
                    f"(--set channels={found.channels} reads them)"
                )
            self.bits = found.bits
        return found.height, found.width

    def _open(self) -> Image.Image:
        """Read the header with Pillow."""
        file = io.BytesIO(self._file) if isinstance(self._file, bytes) else self._file
        with _naming(self._name), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)

    def _orientation(self) -> int:
        """Return the orientation by EXIF, else by XMP, that the stored size does not show yet; 1 is upright."""
        self._image = image = self._image or self._open()
        if image.format == "TIFF":  # Pillow swaps the size of a TIFF itself
            return 1
        if image.format == "PNG" and "exif" not in image.info:  # reading EXIF would decode the image
            return 1
        with _naming(self._name):
            turn = image.getexif().get(_ORIENTATION, 1)
        return turn if turn in range(1, 9) else 1

    def _decode(self, scale: float) -> np.ndarray:
        """Return upright pixels (h, w, c), at no less than twice `scale` if the file is larger than that."""
        if self._tiff is not None:
            return self._by_tifffile()
        if self._jpeg is None:
            return self._by_pillow(scale)
        grey = self.channels == 1
        pixels = jpeg.decode(
            self._contents(), self._jpeg, 1 if scale >= 0.5 else _divisor(*self._stored, scale),
            grey and self._jpeg.components == 1,
        )  # fmt: skip
        if pixels is None:
            return self._by_pillow(scale)
        if pixels.shape[2] != self.channels:  # libjpeg rounds grey values differently from Pillow
            pixels = np.array(Image.fromarray(pixels).convert("L"))[..., None]
        return pixels if self._turn == 1 else _upright(pixels, self._turn)

    def _contents(self) -> bytes:
        if isinstance(self._file, bytes):
            return self._file
        with _naming(self._name), open_regular(self._file) as file:
            return file.read()

    def _by_pillow(self, scale: float) -> np.ndarray:
        image = self._image or self._open()
        with _naming(self._name), image:
            if scale < 0.5:  # JPEG decoding at 1/2, 1/4 and 1/8 costs almost nothing
                image.draft(image.mode, _at_least(*self._stored, scale)[::-1])
            if self._levels is not None and image.format == "PNG":
                image = png16.deep(image, self._open, self._levels)
            image.load()
            return from_pillow(ImageOps.exif_transpose(image), self.channels, self._levels)

    def _by_tifffile(self) -> np.ndarray:
        with _naming(self._name):
            pixels = to_bytes(tiff.decode(self._file), self._levels)
        if pixels.shape[2] != self.channels:
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            pixels = from_pillow(picture, self.channels, None)
        return np.ascontiguousarray(pixels) if self._turn == 1 else _upright(pixels, self._turn)


def _at_least(height: int, width: int, scale: float) -> tuple[int, int]:
    return int(height * scale * 2) + 1, int(width * scale * 2) + 1


def _divisor(height: int, width: int, scale: float) -> int:
    """Return the divisor at which Pillow's `draft` also decodes: 1, 2, 4 or 8."""
    h, w = _at_least(height, width, scale)
    most = min(height // h, width // w)
    return next((d for d in (8, 4, 2) if d <= most), 1)


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Rotate and mirror pixels by an EXIF orientation from 2 to 8."""
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)  # torch does not support negative strides


@cache
def _vectors() -> bool:
    """Return whether torch's uint8 resize uses AVX2: up to 7 times as fast as Pillow; without AVX2 it is slower."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _resized(
    pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], how: str
) -> UInt8[Tensor, "c s t"]:
    """Resize a box of (h, w, c) pixels to (height, width) with antialiasing.

    The box is cut out first, so that pixels outside it have no weight.

    Args:
        pixels: (h, w, c) uint8.
        box: (top, left, bottom, right) in pixels; may be fractional.
        size: (height, width) of the output.
        how: "bilinear" or "bicubic".
    """
    y0, x0, y1, x1 = int(box[0]), int(box[1]), ceil(box[2]), ceil(box[3])
    cut = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    if _vectors() and box == (y0, x0, y1, x1):
        image = torch.from_numpy(cut).permute(2, 0, 1)[None]
        return F.interpolate(image, size, mode=how, antialias=True)[0]
    within = (box[1] - x0, box[0] - y0, box[3] - x0, box[2] - y0)
    # Pillow would treat two or four channels as transparency, and does not support more.
    planes = [cut] if cut.shape[2] == 3 else [cut[..., c] for c in range(cut.shape[2])]
    out = [
        np.array(Image.fromarray(plane).resize(size[::-1], _FILTERS[how], box=within, reducing_gap=_GAP))
        for plane in planes
    ]
    return torch.from_numpy(np.dstack(out).transpose(2, 0, 1))
