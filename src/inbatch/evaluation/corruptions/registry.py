"""Registry of all corruptions by name, with their parameters at each severity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.corruptions import blur, digital, noise, weather
from inbatch.evaluation.corruptions.image_rng import Chance

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64
"""Images with a longer side of at most this many pixels use the parameters of CIFAR-10-C, larger ones of ImageNet-C."""


@dataclass(frozen=True)
class Corruption:
    """A corruption of uint8 images (N, C, H, W) at a severity from 1 to 5, with the random numbers of the images.

    The input is not changed. Values are rounded, not truncated as in the published sets.
    kind: noise, blur, weather or digital. small, large: parameters per severity of CIFAR-10-C and of ImageNet-C.
    ConfigError for other images than uint8 with 1 or 3 channels, or another severity.
    """

    kind: str
    work: Callable[[Tensor, Any, Chance], Tensor]
    small: tuple[Any, ...]
    large: tuple[Any, ...]

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "n c h w"], severity: int, generator: Chance) -> UInt8[Tensor, "n c h w"]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ConfigError(
                "corruptions are of uint8 images (N, C, H, W) with 1 or 3 channels, not of "
                f"{images.dtype} {tuple(images.shape)}."
            )
        if severity not in SEVERITIES:
            raise ConfigError(f"a severity is a whole number from 1 to 5, not {severity!r}.")
        settings = self.small if max(images.shape[2:]) <= SMALL else self.large
        corrupted = self.work(images.float() / 255, settings[severity - 1], generator)
        return (corrupted.clamp(0, 1) * 255).round().to(torch.uint8)


_E = 244 / 224  # ImageNet-C's elastic parameters are multiples of 244 for images of 224 pixels

CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType({
    "gaussian_noise": Corruption(
        "noise", noise.gaussian, small=(0.04, 0.06, 0.08, 0.09, 0.10), large=(0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": Corruption(
        "noise", noise.shot, small=(500.0, 250.0, 100.0, 75.0, 50.0), large=(60.0, 25.0, 12.0, 5.0, 3.0)
    ),
    "impulse_noise": Corruption(
        "noise", noise.impulse, small=(0.01, 0.02, 0.03, 0.05, 0.07), large=(0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "defocus_blur": Corruption(
        "blur",
        blur.defocus,
        small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
        large=((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
    ),
    "glass_blur": Corruption(
        "blur",
        blur.glass,
        small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        large=((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        "blur",
        blur.motion,
        small=((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
        large=((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
    ),
    "zoom_blur": Corruption(
        "blur",
        blur.zoom,
        small=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        large=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        "weather",
        weather.snow,
        small=(
            (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
        ),
        large=(
            (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
            (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
            (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
        ),
    ),
    "frost": Corruption(
        "weather",
        weather.frost,
        small=((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        large=((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(
        "weather",
        weather.fog,
        small=((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
        large=((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ),
    "brightness": Corruption(
        "weather", weather.brightness, small=(0.05, 0.1, 0.15, 0.2, 0.3), large=(0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    "contrast": Corruption(
        "digital", digital.contrast, small=(0.75, 0.5, 0.4, 0.3, 0.15), large=(0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    "elastic_transform": Corruption(
        "digital",
        digital.elastic,
        small=((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        large=(
            (2 * _E, 0.7 * _E, 0.1 * _E),
            (2 * _E, 0.08 * _E, 0.2 * _E),
            (0.05 * _E, 0.01 * _E, 0.02 * _E),
            (0.07 * _E, 0.01 * _E, 0.02 * _E),
            (0.12 * _E, 0.01 * _E, 0.02 * _E),
        ),
    ),
    "pixelate": Corruption(
        "digital", digital.pixelate, small=(0.95, 0.9, 0.85, 0.75, 0.65), large=(0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    "jpeg_compression": Corruption(
        "digital", digital.jpeg, small=(80, 65, 58, 50, 40), large=(25, 18, 15, 10, 7)
    ),
})  # fmt: skip
"""The fifteen corruptions of Hendrycks and Dietterich 2019, with the parameters of its published code."""
