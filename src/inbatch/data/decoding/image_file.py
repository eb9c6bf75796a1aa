"""Decoding of image files to uint8 pixels: the header is read first, pixels on demand and only as many as needed.

JPEG is decoded by simplejpeg, HEIF by pillow-heif, TIFF that Pillow does not support by tifffile, everything else by
Pillow, also a JPEG that simplejpeg reports a problem with.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from inbatch.data.decoding import jpeg, netpbm, png, signatures, tiff
from inbatch.data.decoding.geometry import resized, upright
from inbatch.data.decoding.jpeg import fast_jpeg
from inbatch.data.decoding.pillow import collected, naming, open_image
from inbatch.data.pixels import Levels, check_alpha, flattened, from_pillow, to_bytes
from inbatch.data.source import CropSpec
from inbatch.errors import DataError
from inbatch.runtime.files import open_regular

MAX_PIXELS = 64_000_000
"""Maximum number of pixels; larger images are refused before decoding, since a 110 kB PNG can hold 900 Mpx."""

REMARKS = {
    "warned": "Pillow warned about {}: inbatch data counts the warnings and names the images",
    "veiled": "{} with alpha laid on white: inbatch data names them, and --set channels=4 keeps alpha that is data",
}
"""Sentences about a number of images, by the key of the remark."""

_RULES = 3
"""Incremented if the same file gives other pixels than before: what was decoded earlier is not used again."""

_ORIENTATION = 0x0112
_HEAD = 2**18  # bytes read when a file is opened: most files entirely; a worker holds 32 opened files at once


def file_channels(channels: int | None) -> int:
    """Return the number of channels to decode files to, by default 3 (RGB); raise DataError if it is less than 1."""
    if channels is not None and channels < 1:
        raise DataError(f"Images have 1 channel (grey), 3 (RGB) or more, not {channels}")
    return channels or 3


def decoders() -> str:
    """Return what decoded pixels depend on: our rules, and the names and versions of libraries."""
    names = [*(["simplejpeg"] if fast_jpeg() else []), "pillow", *(["pillow-heif"] if signatures.reads_heif() else [])]
    names += ["torch", "tifffile"]
    libraries = (f"{name} {_version(name)}" for name in names)
    return ", ".join([*libraries, torch.backends.cpu.get_cpu_capability(), f"rules {_RULES}"])


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
        channels: 1 (grey) or 3 (RGB) for any file; 2 or 4 for the same with alpha, of files that have it; another
            number for a TIFF with exactly that many channels, or as many on all its pages.
        levels: See `pixels.to_bytes`, for more than 8 bits.

    Attributes:
        size: Height and width in pixels, upright (EXIF orientation applied).
        bits: Bits per value, as stored.
        white: Largest value as stored; without levels it becomes 255.
        inverted: Whether the file states that zero is white.
        transparent: Fraction of the pixels that are not opaque, known after decoding; None without alpha.
        warnings: What Pillow warned about, each text once.

    Raises:
        DataError: If the file cannot be read or has more than `MAX_PIXELS` pixels.
    """

    bits = 8
    white = 255
    inverted = False
    transparent: float | None = None

    def __init__(self, file: bytes | str, name: Callable[[], str], channels: int, levels: Levels | None = None):
        self._name, self.channels, self._levels = name, channels, levels
        self.warnings: list[str] = []
        self._image: Image.Image | None = None
        self._tiff: tiff.Header | None = None
        self._turn = 1  # EXIF orientation
        if isinstance(file, bytes):
            head = file
        else:
            with naming(name), open_regular(file) as opened:
                head = opened.read(_HEAD)
        self._file = head if len(head) < _HEAD else file
        self._jpeg = jpeg.header(head) if fast_jpeg() and channels in (1, 3) else None
        if self._jpeg is not None:
            self._stored = self._jpeg[:2]
        elif channels not in (1, 3) and tiff.is_tiff(head):
            self._stored = self._by_tags()
        else:
            self._stored = self._by_mode(head)
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

    def remarks(self) -> list[str]:
        """Return keys of `REMARKS`: what the user should know about the image, after its pixels are decoded."""
        on_white = bool(self.transparent) and self.channels in (1, 3)
        return ["warned"] * bool(self.warnings) + ["veiled"] * on_white

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
        return resized(pixels, (0, 0, *pixels.shape[:2]), size, "bilinear")

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
            out.append(resized(pixels, box, (side, side), how))
        return tuple(out)

    def pages(self) -> int:
        """Return the number of pages or frames of the file, of which the first is read; call it before the pixels."""
        if self._tiff is not None:
            with naming(self._name):
                return 1 if self._tiff.pages > 1 else tiff.count_pages(self._file)
        if self._image is not None and self._image.format == "TIFF":
            with collected(self.warnings):
                return tiff.pages(self._image)
        return getattr(self._image, "n_frames", 1)

    def _by_mode(self, head: bytes) -> tuple[int, int]:
        """Return the stored size of a file that Pillow opens, or of a TIFF that it does not keep as stored."""
        try:
            self._image = image = self._open(head)
        except DataError as e:
            if isinstance(e.__cause__, Image.UnidentifiedImageError) and tiff.is_tiff(head):
                return self._by_tags()
            raise
        with naming(self._name):
            if image.format == "TIFF" and not tiff.exact(image, self._levels):
                image.close()
                return self._by_tags()
            self._describe(image, head)
        return image.size[::-1]

    def _describe(self, image: Image.Image, head: bytes) -> None:
        """Set the bits per value; raise ValueError if the image does not have the requested channels."""
        if self.channels not in (1, 3):
            if image.format not in ("PNG", "WEBP", "AVIF", "HEIF") or self.channels not in (2, 4):
                raise ValueError(
                    f"only TIFF files give {self.channels} channels, PNG, WebP, AVIF and HEIF with alpha 2 or 4, "
                    "others 1 (grey) or 3 (RGB)"
                )
            check_alpha(image, self.channels)
        if image.format == "PNG":
            self.bits = head[24]
        elif image.format == "TIFF":
            self.bits, self.inverted = tiff.stored_bits(image), tiff.white_is_zero(image)
        elif image.format == "PPM":
            self.white = netpbm.white(image)
            self.bits = max(8, self.white.bit_length())
        if image.format != "PPM" and self.bits > 8:
            self.white = 2**self.bits - 1

    def _by_tags(self) -> tuple[int, int]:
        """Return the stored size of a TIFF to be decoded by tifffile; raise DataError if its channels differ."""
        with naming(self._name):
            self._tiff = header = tiff.header(self._file, self.channels)
        self.bits, self.white = header.bits, max(255, 2**header.bits - 1)
        self._image, self.inverted = None, header.white_is_zero
        return header.height, header.width

    def _open(self, head: bytes = b"") -> Image.Image:
        """Read the header with Pillow."""
        with naming(self._name, lambda: signatures.unreadable_reason(head)), collected(self.warnings):
            return open_image(self._file)

    def _orientation(self) -> int:
        """Return the orientation by EXIF, else by XMP, that the stored size does not show yet; 1 is upright.

        Of a PNG, what follows the pixels is not read: it is not known before they are decoded.
        """
        self._image = image = self._image or self._open()
        if image.format == "TIFF" and tiff.has_orientation(image):  # Pillow has swapped the size
            return 1
        with naming(self._name), collected(self.warnings):
            turn = Image.Image.getexif(image).get(_ORIENTATION, 1)  # the method of a PNG would decode the image
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
        return pixels if self._turn == 1 else upright(pixels, self._turn)

    def _contents(self) -> bytes:
        if isinstance(self._file, bytes):
            return self._file
        with naming(self._name), open_regular(self._file) as file:
            return file.read()

    def _by_pillow(self, scale: float) -> np.ndarray:
        image = self._image or self._open()
        with naming(self._name), collected(self.warnings), image:
            if scale < 0.5:  # JPEG decoding at 1/2, 1/4 and 1/8 costs almost nothing
                image.draft(image.mode, _at_least(*self._stored, scale)[::-1])
            turned = image.format == "TIFF"  # by Pillow
            image = self._load_8_bits(image)
            flat, self.transparent = flattened(image)
            pixels = from_pillow(flat if self.channels in (1, 3) else image, self.channels, self._levels)
        return pixels if turned or self._turn == 1 else upright(pixels, self._turn)

    def _load_8_bits(self, image: Image.Image) -> Image.Image:
        """Load the pixels; return an image of more than 8 bits per value with 8, if Pillow would not convert it so."""
        if image.format == "PNG":
            image = png.to_8_bits(image, self.bits, self._open, self._levels, self.channels == 4)
        elif image.format == "TIFF":
            image = tiff.to_8_bits(image, self._levels)
        elif image.format == "PPM" and self.white > 255:
            image = Image.fromarray(to_bytes(netpbm.values(image, self.white), self._levels, self.white))
        image.load()
        if image.format == "HEIF" and image.size[::-1] != self._stored:
            raise ValueError(f"its pixels are {image.width}x{image.height}, and its header states another size")
        return image

    def _by_tifffile(self) -> np.ndarray:
        assert self._tiff is not None
        with naming(self._name):
            pixels, self.transparent = tiff.decode(self._file, self._tiff, self.channels, self._levels)
        return np.ascontiguousarray(pixels) if self._turn == 1 else upright(pixels, self._turn)


def _at_least(height: int, width: int, scale: float) -> tuple[int, int]:
    return int(height * scale * 2) + 1, int(width * scale * 2) + 1


def _divisor(height: int, width: int, scale: float) -> int:
    """Return the divisor at which Pillow's `draft` also decodes: 1, 2, 4 or 8."""
    h, w = _at_least(height, width, scale)
    most = min(height // h, width // w)
    return next((d for d in (8, 4, 2) if d <= most), 1)
