"""In-memory images: an array or tensor of uint8, or of other numbers with levels, with or without labels."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.pixels import Levels, to_bytes
from inbatch.data.source import CropSpec, Reading, Source, unlabelled
from inbatch.errors import DataError

MOST_CLASSES = 1_000_000
"""Upper limit of labels: a larger one is a mistake and would allocate memory for as many class names."""


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
        self.source, self.levels = source, source.levels

    def open(self, i: int) -> Pixels:
        return Pixels(self.source.image(i).expand(3, -1, -1))

    def identity(self, i: int) -> str:
        return self.source.identity(i)


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
    if not isinstance(images, np.ndarray | Tensor):
        return None

    def open_train() -> Source:
        pixels = _channels_first(_bytes(images, reading.levels))
        if not len(pixels):
            raise DataError("The array holds no image (its first side is 0)")
        if reading.channels not in (None, pixels.shape[1]):
            raise DataError(f"The array's images have {pixels.shape[1]} channels, {reading.channels} were requested")
        if labels is None:
            return ArraySource(pixels, unlabelled(len(pixels)), ())
        known = check_labels(torch.as_tensor(labels), len(pixels), "The labels given with the array")
        return ArraySource(pixels, known, tuple(str(c) for c in range(int(known.max()) + 1)))

    return {"train": open_train}


def check_labels(labels: Tensor, n: int, what: str) -> Int[Tensor, "n"]:
    """Return labels as (n,) int64 with -1 for unknown; raise DataError for any other shape, type or range."""
    if labels.shape != (n,):
        raise DataError(f"{what} have shape {tuple(labels.shape)}, but there are {n:,} images: one label each")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{what} are {labels.dtype}: use integers, 0 for the first class, -1 for unknown")
    if n and labels.min() < -1:
        raise DataError(f"{what} go down to {int(labels.min())}: use 0 for the first class, -1 for unknown")
    if n and labels.max() >= MOST_CLASSES:
        raise DataError(f"{what} go up to {int(labels.max())}: number the classes from 0, at most {MOST_CLASSES:,}")
    return labels.long().cpu()


def _bytes(images: np.ndarray | Tensor, levels: Levels | None) -> UInt8[Tensor, "..."]:
    """Convert images of any type to uint8, by the levels if they have more than 8 bits."""
    if isinstance(images, Tensor):
        if images.dtype == torch.uint8:
            return images
        images = (images.float() if images.dtype == torch.bfloat16 else images.detach()).cpu().numpy()
    try:
        return torch.as_tensor(to_bytes(images, levels))
    except ValueError as e:
        raise DataError(f"The array cannot be used: {e}") from e


def _channels_first(images: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Convert (N,C,H,W), (N,H,W,C) or (N,H,W) to (N,C,H,W); the smaller of the two candidate sides is the channels."""
    if images.ndim == 3:
        return images[:, None].cpu()
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] == shape[3]:
        raise DataError(f"The array's shape {shape} is none of (N,C,H,W), (N,H,W,C) and (N,H,W)")
    return (images if shape[1] < shape[3] else images.permute(0, 3, 1, 2)).contiguous().cpu()


def _resize(pixels: UInt8[Tensor, "c h w"], height: int, width: int, how: str) -> UInt8[Tensor, "c s t"]:
    image = pixels[None].float()
    image = F.interpolate(image, (height, width), mode=how, antialias=True, align_corners=False)
    return image[0].round().clamp(0, 255).byte()
