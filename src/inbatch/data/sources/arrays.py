"""In-memory images: an array or tensor of uint8, or of other numbers with levels, with or without labels.

Arrays of other libraries (h5py, zarr, JAX, ...) are read into memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.pixels import Levels, to_bytes
from inbatch.data.source import CropSpec, Reading, Source, unlabelled
from inbatch.data.sources.labels import Labels, from_array
from inbatch.errors import DataError, type_name
from inbatch.runtime.memory import free_bytes

LABELS = "The labels given with the array"
"""Name of labels in messages."""


class Pixels:
    """One image that is already decoded."""

    def __init__(self, pixels: UInt8[Tensor, "c h w"]):
        self._pixels, self.size = pixels, (pixels.shape[1], pixels.shape[2])

    def __enter__(self) -> "Pixels":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tensor(self, longest: int | None = None) -> UInt8[Tensor, "c h w"]:
        """Return the pixels, scaled down if the longer side exceeds `longest`."""
        scale = 1.0 if longest is None else min(1.0, longest / max(self.size))
        if scale == 1:
            return self._pixels
        height, width = (max(1, round(side * scale)) for side in self.size)
        return _resize(self._pixels, height, width, "bilinear")

    def crops(self, boxes: Int[Tensor, "v 4"], wanted: Sequence[CropSpec]) -> tuple[UInt8[Tensor, "c s s"], ...]:
        """Return one crop per view: the box (top, left, height, width), resized with antialiasing to the view size."""
        return tuple(
            _resize(self._pixels[:, top : top + h, left : left + w], side, side, how)
            for (top, left, h, w), (side, how) in zip(boxes.tolist(), wanted, strict=True)
        )


class GreyAsRGB(Source):
    """Grey source repeated to three equal channels, for an encoder trained on colour images."""

    def __init__(self, source: Source):
        super().__init__(source.name, 3, source.labels, source.classes)
        self.source, self.levels, self.ids, self.label_note = source, source.levels, source.ids, source.label_note

    def open(self, i: int) -> Pixels:
        return Pixels(self.source.image(i).expand(3, -1, -1))

    def identity(self, i: int) -> str:
        return self.source.identity(i)

    def file_of(self, i: int) -> str | None:
        return self.source.file_of(i)


class ArraySource(Source):
    """Images (N, C, H, W) uint8 in memory."""

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int[Tensor, "n"],
        classes: tuple[str, ...],
        name: str = "array",
    ):
        super().__init__(name, images.shape[1], labels, classes)
        self.images = images

    def open(self, i: int) -> Pixels:
        return Pixels(self.images[i])

    def identity(self, i: int) -> str:
        return str(i)


def find_arrays(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the split of an array or tensor, or of a pair (images, labels); return None for anything else."""
    images, labels = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if not is_array(images):
        return None
    return {"train": lambda: open_arrays(images, labels, reading)}


def open_arrays(images: Any, labels: Any, reading: Reading, like: Labels | None = None) -> ArraySource:
    """Return the source of an array, with labels if there are any; raise DataError if they cannot be used.

    like: See `labels.number`.
    """
    pixels = channels_first(_bytes(_in_memory(images), reading.levels))
    if not len(pixels):
        raise DataError("The array holds no image (its first side is 0)")
    if reading.channels not in (None, pixels.shape[1]):
        has = pixels.shape[1]
        raise DataError(
            f"The array's images have {has} channels, {reading.channels} were requested "
            f"(a run with --set channels={has} reads them)"
        )
    if labels is None:
        return ArraySource(pixels, unlabelled(len(pixels)), ())
    known = from_array(_in_memory(labels), len(pixels), LABELS, like=like)
    source = ArraySource(pixels, known.numbers, known.classes)
    source.ids, source.label_note = known.ids, known.note
    return source


def is_array(data: object) -> bool:
    """Return whether an object is an array of any library: it has a shape and a type, and can be indexed."""
    return not isinstance(data, type) and all(hasattr(data, name) for name in ("shape", "dtype", "__getitem__"))


def _in_memory(data: Any) -> Any:
    """Return NumPy arrays, tensors and sequences unchanged, and arrays of other libraries as NumPy arrays.

    Raises:
        DataError: If the array does not fit in memory, or cannot be converted.
    """
    if isinstance(data, np.ndarray | Tensor) or not is_array(data):
        return data
    what = f"The {type_name(data)}"
    try:
        needed, free = math.prod(data.shape) * np.dtype(data.dtype).itemsize, free_bytes(torch.device("cpu"))
    except TypeError:  # a type that NumPy lacks, which the conversion reports
        needed = free = 0
    if needed > free:
        raise DataError(
            f"{what} would take {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free: "
            "save the images as .npy, of which no more is read than is used"
        )
    try:
        return np.asarray(data[:])
    except Exception as e:  # of any library
        raise DataError(f"{what} cannot be converted to a NumPy array: {e}; pass a NumPy array") from e


def _bytes(images: Any, levels: Levels | None) -> UInt8[Tensor, "..."]:
    """Convert images of any type to uint8, by the levels if they have more than 8 bits."""
    if isinstance(images, Tensor):
        if images.dtype == torch.uint8:
            return images
        images = (images.float() if images.dtype == torch.bfloat16 else images.detach()).cpu().numpy()
    try:
        pixels = to_bytes(images, levels)
        return torch.as_tensor(pixels.copy() if min(pixels.strides, default=0) < 0 else pixels)  # mirrored, or BGR
    except ValueError as e:
        raise DataError(f"The array cannot be used: {e}") from e


def channels_first(images: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Convert (N,C,H,W), (N,H,W,C) or (N,H,W) to (N,C,H,W); the smaller of the two candidate sides is the channels."""
    shape = tuple(images.shape)
    check_shape(shape)
    if len(shape) == 3:
        return images[:, None].cpu()
    return (images if shape[1] < shape[3] else images.permute(0, 3, 1, 2)).contiguous().cpu()


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise DataError if arrays of this shape are not images."""
    if len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) > 4:
        raise DataError(
            f"The array's shape {shape} is that of one image (H, W, C), not of images (N, H, W): "
            "pass array[None] for one image"
        )
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] == shape[3]):
        raise DataError(f"The array's shape {shape} is none of (N,C,H,W), (N,H,W,C) and (N,H,W)")


def _resize(pixels: UInt8[Tensor, "c h w"], height: int, width: int, how: str) -> UInt8[Tensor, "c s t"]:
    if pixels.shape[1:] == (height, width):  # the filters have weight 1 at each pixel then
        return pixels.clone(memory_format=torch.contiguous_format)
    image = pixels[None].float()
    image = F.interpolate(image, (height, width), mode=how, antialias=True, align_corners=False)
    return image[0].round().clamp(0, 255).byte()
