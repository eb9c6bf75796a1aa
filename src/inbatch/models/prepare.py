"""The preparation of images for an encoder: resize, crop and normalise."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.errors import DataError


@dataclass(frozen=True)
class Prepare:
    """Converts uint8 images of any size to the normalised float32 square that an encoder takes, without randomness."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor | Iterable[Tensor]) -> Float[Tensor, "n c s s"]:
        """Prepare images (N, C, H, W) uint8, or any iterable of (C, h, w) uint8, processed one at a time.

        The shorter side is resized (bilinear, antialiased) to `size`, from 128 pixels on to size * 256 / 224,
        then the centre is cropped; an image of the target size is unchanged. DataError for other input.
        """
        x = self.squares(images)
        mean = torch.tensor(self.mean, device=x.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(-1, 1, 1)
        return (x / 255 - mean) / std

    def squares(self, images: Tensor | Iterable[Tensor]) -> Float[Tensor, "n c s s"]:
        """Return the images before normalisation, with values from 0 to 255."""
        return self._fit(images) if isinstance(images, Tensor) else torch.stack([self._fit(i) for i in images])

    def _fit(self, image: Tensor) -> Tensor:
        if image.dtype != torch.uint8 or image.ndim < 3 or image.shape[-3] != self.channels or 0 in image.shape[-2:]:
            raise DataError(
                f"the encoder takes uint8 images of {self.channels} channels, (C, H, W), but was given "
                f"{image.dtype} of shape {tuple(image.shape)}: convert them, or create another encoder."
            )
        x, (h, w), size = image.float(), image.shape[-2:], self.size
        if (h, w) == (size, size):
            return x
        short = round(size * 256 / 224) if size >= 128 else size
        if min(h, w) != short:
            h, w = (short, short * w // h) if h <= w else (short * h // w, short)
            batch = x if x.ndim == 4 else x[None]
            x = nn.functional.interpolate(batch, (h, w), mode="bilinear", antialias=True).view(*x.shape[:-2], h, w)
        top, left = round((h - size) / 2), round((w - size) / 2)
        return x[..., top : top + size, left : left + size]
