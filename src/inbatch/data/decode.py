"""Image files to uint8 pixels, by Pillow: header first, pixels when asked, only as many as needed."""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from inbatch.data.source import Want
from inbatch.errors import DataError

MAX_PIXELS = 64_000_000
"""Larger images are refused before a pixel is decoded: a 110 kB PNG can hold 900 Mpx."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
"""What Pillow may try, whatever a file calls itself; its other readers (EPS runs Ghostscript) stay shut."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GAP = 3.0  # Pillow's `reducing_gap` at which its manual calls the result indistinguishable
_ORIENTATION = 0x0112


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever Pillow raises on a damaged file, as a DataError that names it."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, MemoryError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        if isinstance(e, Image.UnidentifiedImageError):
            reason = f"not one of {', '.join(FORMATS)}"
        raise DataError(f"{name!r} cannot be read: {reason}; repair or remove it") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise DataError(f"{name!r} cannot be read: {e}; shrink or remove it") from e


def file_channels(channels: int | None) -> int:
    """What files are decoded to: 3 (RGB) unless 1 (grey) is asked for. DataError for any other number."""
    if channels not in (None, 1, 3):
        raise DataError(f"Image files give 1 channel (grey) or 3 (RGB), not {channels}; others come as arrays")
    return channels or 3


class Picture:
    """One opened image file: its size is known, its pixels are decoded on demand and once.

    size: height and width in pixels, upright (EXIF orientation applied).
    """

    def __init__(self, file: str | bytes | os.PathLike | io.BytesIO, name: str, channels: int):
        self.name, self.channels = name, channels
        with _naming(name), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._image = Image.open(os.fsdecode(file) if isinstance(file, bytes) else file, formats=FORMATS)
        width, height = self._image.size
        if width * height > MAX_PIXELS:
            self.close()
            raise DataError(
                f"{name!r} cannot be read: {width}x{height} pixels are over the limit of "
                f"{MAX_PIXELS / 1e6:.0f} million; shrink or remove it"
            )
        with _naming(name):
            self.size = (width, height) if self._turned() else (height, width)

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._image.close()

    def tensor(self, longest: int | None = None) -> UInt8[Tensor, "c h w"]:
        """The pixels; scaled down where the longer side is over `longest`. DataError if damaged."""
        height, width = self.size
        scale = 1.0 if longest is None else min(1.0, longest / max(height, width))
        image = self._decode(scale)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = image.resize(size, _FILTERS["bilinear"], reducing_gap=_GAP)
        return _tensor(image)

    def crops(self, boxes: Int[Tensor, "v 4"], wanted: Sequence[Want]) -> tuple[UInt8[Tensor, "c s s"], ...]:
        """One crop per view: the box (top, left, height, width) resized, antialiased, as the view wants it."""
        places = boxes.tolist()
        need = max(side / min(h, w) for (_, _, h, w), (side, _) in zip(places, wanted, strict=True))
        image = self._decode(min(1.0, need))
        fy, fx = image.height / self.size[0], image.width / self.size[1]
        out = []
        for (top, left, h, w), (side, how) in zip(places, wanted, strict=True):
            x0, y0 = left * fx, top * fy
            x1, y1 = min((left + w) * fx, image.width), min((top + h) * fy, image.height)
            # Cut first: resize(box=) alone lets pixels beside the box weigh in.
            cut = image.crop((int(x0), int(y0), ceil(x1), ceil(y1)))
            box = (x0 - int(x0), y0 - int(y0), x1 - int(x0), y1 - int(y0))
            out.append(_tensor(cut.resize((side, side), _FILTERS[how], box=box, reducing_gap=_GAP)))
        return tuple(out)

    def _turned(self) -> bool:
        """Whether EXIF asks for a quarter turn that `Image.size` does not show yet."""
        if self._image.format == "TIFF":  # Pillow swaps a TIFF's size by itself
            return False
        if self._image.format == "PNG" and "exif" not in self._image.info:  # asking would decode the image
            return False
        return self._image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)

    def _decode(self, scale: float) -> Image.Image:
        """Upright pixels in RGB or grey, at no less than twice `scale` if the file is larger than that."""
        image: Image.Image = self._image
        with _naming(self.name), self._image:
            if scale < 0.5:  # a JPEG gives 1/2, 1/4 and 1/8 almost free
                image.draft(image.mode, (int(image.width * scale * 2) + 1, int(image.height * scale * 2) + 1))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("32-bit pixels have no known range, save them with 8 or 16 bits")
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("L" if self.channels == 1 else "RGB")


def _tensor(image: Image.Image) -> UInt8[Tensor, "c h w"]:
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).contiguous()
