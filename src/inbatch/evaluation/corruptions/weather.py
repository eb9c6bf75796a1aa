"""Weather: snow, frost, fog, brightness. Images are float32 in [0, 1], (N, C, H, W)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.evaluation.corruptions.blur import smear
from inbatch.evaluation.corruptions.image_rng import Chance
from inbatch.evaluation.corruptions.linear_maps import along, zooming
from inbatch.evaluation.corruptions.noise import Image

LUMINANCE = (0.299, 0.587, 0.114)
ICE = (0.85, 0.93, 1.0)
"""Red, green and blue of the frost."""


def plasma(chance: Chance, shape: Sequence[int], decay: float, stream: int = 0) -> Float[Tensor, "n 1 h w"]:
    """Return cloudy fields in [0, 1] of this height and width: diamond-square on a torus (Fournier et al. 1982).

    decay: the noise decreases by its square from one scale to the next. Uses the streams from `stream` on.
    """
    size = 2 ** max(1, (max(shape) - 1).bit_length())
    field = torch.zeros(len(chance.index), size, size, device=chance.index.device)
    step, swing = size, 1.0
    while step >= 2:
        half = step // 2
        corner = field[:, ::step, ::step]
        noise = swing * (2 * chance.uniform(stream, 3, *corner.shape[1:]) - 1)
        beside = corner + corner.roll(-1, 1)
        middle = (beside + beside.roll(-1, 2)) / 4 + noise[:, 0]
        top = (corner + corner.roll(-1, 2) + middle + middle.roll(1, 1)) / 4 + noise[:, 1]
        left = (corner + corner.roll(-1, 1) + middle + middle.roll(1, 2)) / 4 + noise[:, 2]
        field[:, half::step, half::step], field[:, ::step, half::step], field[:, half::step, ::step] = middle, top, left
        step, swing, stream = half, swing / decay**2, stream + 1
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low))[:, None, : shape[0], : shape[1]]


def snow(x: Image, setting: tuple[float, float, float, float, int, float, float], chance: Chance) -> Image:
    """Add falling flakes, and the same rotated by 180 degrees, to a whitened image.

    setting: mean, deviation, zoom and threshold of the flakes, radius and sigma of their motion, share of the image
    kept.
    """
    mean, deviation, factor, threshold, radius, sigma, keep = setting
    flakes = mean + deviation * chance.normal(0, 1, *x.shape[2:])
    flakes = along(flakes, *(zooming(side, factor, x.device) for side in x.shape[2:]))
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = smear(flakes, (radius, sigma), 90 * chance.uniform(1) - 135)
    white = torch.maximum(x, grey(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


def frost(x: Image, setting: tuple[float, float], chance: Chance) -> Image:
    """Return the weighted sum of image and ice crystals (image, ice).

    The paper overlays crops of five photographs of frozen panes. Here the ice is computed, the ridges of
    a plasma field over a cloudy one, so figures for frost are not those of the published sets.
    """
    image, ice = setting
    size = x.shape[2:]
    ridges = 1 - (2 * plasma(chance, size, 1.4) - 1).abs()
    pane = 0.5 * plasma(chance, size, 1.6, stream=100) + 0.7 * ridges**4
    tint = x.new_tensor(ICE if x.shape[1] == 3 else (1.0,) * x.shape[1])
    return image * x + ice * pane.clamp(0, 1) * tint[:, None, None]


def fog(x: Image, setting: tuple[float, float], chance: Chance) -> Image:
    """Add a plasma field, and dim the sum to the image's brightest value (strength, decay)."""
    strength, decay = setting
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * plasma(chance, x.shape[2:], decay)) * brightest / (brightest + strength)


def brightness(x: Image, more: float, chance: Chance) -> Image:
    """Add this amount to the value (the largest channel) at equal hue and saturation."""
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


def grey(x: Image) -> Float[Tensor, "n 1 h w"]:
    """Return the luminance; the image itself if it has one channel."""
    return x if x.shape[1] == 1 else (x * x.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
