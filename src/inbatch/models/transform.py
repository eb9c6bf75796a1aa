"""The preparation of single images for an encoder, as a transform for data sets of PyTorch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from inbatch.data.pixels import Levels, from_pillow, to_bytes
from inbatch.errors import DataError
from inbatch.models.prepare import Prepare


@dataclass(frozen=True)
class Transform:
    """Converts one image to the tensor that an encoder takes: the values of `Encoder.preprocess`, bit for bit.

    It can be pickled into data workers, such as `ImageFolder(folder, transform=inbatch.load(RUN).transform)`.

    Attributes:
        prepare: resizes, crops and normalises.
        levels: the two values that become 0 and 255 in images of more than 8 bits.
    """

    prepare: Prepare
    levels: Levels | None = None

    def __call__(self, image: Any) -> Float[Tensor, "c s s"]:
        """Return the tensor of a Pillow image, a (h, w) or (h, w, C) array, or a (C, h, w) tensor.

        Raises:
            DataError: if it is none of these, or cannot be converted.
        """
        if not isinstance(image, Image.Image | np.ndarray | Tensor):
            raise DataError(f"the transform takes one Pillow image, array or tensor, not {type(image).__name__}")
        return self.prepare([self.pixels(image)])[0]

    def pixels(self, image: Any) -> UInt8[Tensor, "c h w"]:
        """Return one image as uint8, before resizing."""
        if isinstance(image, Tensor):
            _check_shape(image.shape, (3,), "(C, h, w)")
            if image.dtype == torch.uint8:
                return image
            image = (
                (image.float() if image.dtype == torch.bfloat16 else image.detach()).cpu().numpy().transpose(1, 2, 0)
            )
        if isinstance(image, str | bytes | os.PathLike):
            raise DataError(f"An image cannot be embedded: {image!r} is a path; open it with PIL.Image.open")
        try:
            if isinstance(image, Image.Image):
                image = from_pillow(ImageOps.exif_transpose(image), self.prepare.channels, self.levels)
            array = np.asarray(image)
            _check_shape(array.shape, (2, 3), "(h, w[, C])")
            pixels = torch.from_numpy(np.array(to_bytes(array, self.levels)))
        except ValueError as e:
            text = str(e).replace("a run with --set levels=[0,1] reads them", "encoder.levels = (0, 1)")
            raise DataError(f"An image cannot be embedded: {text}") from e
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _check_shape(shape: Sequence[int], sides: Sequence[int], expected: str) -> None:
    """Raise DataError unless an image has one of these numbers of sides."""
    if len(shape) not in sides:
        raise DataError(f"An image cannot be embedded: it has the shape {tuple(shape)}, not {expected}")
