"""Views as a module for pipelines of the user's own: uint8 images in, V augmented views out, on their device."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image, ImageOps
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.data.pixels import from_pillow
from inbatch.data.views.pipeline import Views
from inbatch.data.views.presets import PRESETS, make_views
from inbatch.data.views.view import View
from inbatch.errors import ConfigError, DataError, check_whole, closest, type_name

_COLOUR = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in `inbatch.models`


class ViewTransform(nn.Module):
    """Draw V random views of images; made by `inbatch.views`.

    Args:
        drawn: draws the views of a batch.
    """

    def __init__(self, drawn: Views) -> None:
        super().__init__()
        self.views = drawn

    def __len__(self) -> int:
        return len(self.views)

    def extra_repr(self) -> str:
        """Return the parameters of every view."""
        return "\n".join(map(repr, self.views.views))

    @torch.no_grad()
    def forward(
        self, images: Any, *, key: int | None = None, index: Int[Tensor, "n"] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the V views of images.

        Args:
            images: uint8 tensor (N, C, H, W), which is drawn on its device; a list of Pillow images or (C, h, w) uint8
                tensors of any sizes; or one of them.
            key: key of the random numbers, such as the epoch or the step: the same key gives the same views, on any
                device and rank. None draws a key from torch's generator, which `torch.manual_seed` seeds.
            index: (N,) number of each sample, the other part of the key, so that the views of a sample do not depend on
                the other samples of the batch; by default its position.

        Returns:
            V tensors (N, C, s, s) float32, normalised; (C, s, s) for one image.

        Raises:
            DataError: for images of another type, shape or number of channels.
        """
        one = isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3)
        pixels, size = self._pixels([images] if one else images)
        if key is not None:
            check_whole("key", key)
        seed = int(torch.randint(2**62, ())) if key is None else int(key)
        index = torch.arange(len(pixels)) if index is None else torch.as_tensor(index)
        if index.shape != (len(pixels),) or index.is_floating_point():
            raise DataError(f"index holds a whole number for each of {len(pixels)} images, not {tuple(index.shape)}")
        index = index.to(pixels.device, torch.int64)
        batch = Batch(index, torch.full_like(index, -1), seed=seed, images=pixels, size=size)
        drawn = self.views(batch).images
        return tuple(view[0] for view in drawn) if one else drawn

    def _pixels(self, images: Any) -> tuple[Tensor, Tensor | None]:
        """Return uint8 pixels (N, C, H, W), and the sizes of images that fill only a part of them."""
        if isinstance(images, Tensor):
            return images, None
        if not isinstance(images, Sequence) or isinstance(images, str | bytes) or not len(images):
            raise DataError(
                "views are drawn from a uint8 tensor (N, C, H, W), a Pillow image, or a list of images, not "
                f"{'an empty list' if isinstance(images, list) else type_name(images)}"
            )
        parts = [self._one(image) for image in images]
        size = torch.tensor([part.shape[1:] for part in parts], device=parts[0].device)
        height, width = size.amax(0).tolist()
        pixels = parts[0].new_zeros(len(parts), parts[0].shape[0], height, width)
        for canvas, part in zip(pixels, parts, strict=True):
            canvas[:, : part.shape[1], : part.shape[2]] = part
        return pixels, size

    def _one(self, image: Any) -> Tensor:
        channels = len(self.views.mean)
        if isinstance(image, Image.Image):
            try:
                array = from_pillow(ImageOps.exif_transpose(image), channels, None)
            except ValueError as error:
                raise DataError(f"views cannot be drawn from this image: {error}") from error
            return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != channels:
            kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type_name(image)
            raise DataError(f"views are drawn from Pillow images or uint8 tensors ({channels}, h, w), not {kind}")
        return image


def views(
    name: str | Sequence[View] = "simclr", *, channels: int = 3, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, **options: Any,
) -> ViewTransform:  # fmt: skip
    """Return a module that draws the augmented views of a paper, on the device of the images.

        transform = inbatch.views("simclr", size=96)
        first, second = transform(images, key=step)  # uint8 (N, C, H, W) -> float32 (N, C, 96, 96) each

    Args:
        name: a preset of `inbatch.data.views.PRESETS`, or the parameters of each view (`inbatch.data.views.View`).
        channels: channels of the images.
        mean: mean per channel of values in [0, 1]; by default that of ImageNet for 3 channels, otherwise 0.5.
        std: standard deviation per channel; by default that of ImageNet for 3 channels, otherwise 0.25.
        **options: options of the preset, such as `size` in pixels or `num_views`.

    Raises:
        ConfigError: for an unknown preset or option, or a wrong value.
    """
    check_whole("channels", channels, 1)
    mean, std = (
        (usual if channels == 3 else (other,) * channels) if values is None else _numbers(values)
        for values, usual, other in zip((mean, std), _COLOUR, (0.5, 0.25), strict=True)
    )
    if not len(mean) == len(std) == channels or not np.isfinite([mean, std]).all() or not min(std) > 0:
        raise ConfigError(f"mean and std hold a number per channel, {channels}, std above 0; got {mean} and {std}")
    if not isinstance(name, str):
        if options or not all(isinstance(view, View) for view in name):
            raise ConfigError(
                "views takes the name of a preset with its options, or the inbatch.data.views.View of each"
            )
        return ViewTransform(Views(tuple(name), mean, std))
    _check_options(name, options)
    return ViewTransform(Views(make_views(name, options, channels), mean, std))


def _numbers(values: Any) -> tuple[float, ...]:
    """Return a sequence or array of numbers as a tuple."""
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ConfigError(f"mean and std hold a number per channel, not {values!r:.40}") from None


def _check_options(name: str, options: dict[str, Any]) -> None:
    if name not in PRESETS:
        near = closest(name, PRESETS)
        hint = f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(PRESETS))}"
        raise ConfigError(f"views {name!r} are unknown{hint}")
    known = list(inspect.signature(PRESETS[name]).parameters)
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(f"views {name} have no option {unknown[0]!r}; there are {', '.join(known)}")
