"""Blur: defocus, frosted glass, motion, zoom. Images are float32 in [0, 1], (N, C, H, W)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.evaluation.corruptions.image_rng import Chance
from inbatch.evaluation.corruptions.linear_maps import along, inside, smoothing, zooming
from inbatch.evaluation.corruptions.noise import Image


def defocus(x: Image, setting: tuple[float, float], chance: Chance) -> Image:
    """Blur with a disk of this radius, softened by a small Gaussian (radius, sigma); edges are mirrored."""
    kernel = disk(*setting).to(x.device)
    half, (height, width) = len(kernel) // 2, x.shape[2:]
    rows, columns = (
        inside(torch.arange(-half, side + half, device=x.device), side, "mirror") for side in (height, width)
    )
    padded = x.index_select(2, rows).index_select(3, columns)
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view(x.shape)


def disk(radius: float, sigma: float) -> Float[Tensor, "k k"]:
    """Return the kernel of `defocus`; it sums to 1."""
    soft = 1 if radius <= 8 else 2
    half = int(radius) + 2 * soft  # margin, so that the Gaussian has nothing to reflect at the border
    place = torch.arange(-half, half + 1)
    flat = (place[:, None] ** 2 + place**2 <= radius**2).float()
    matrix = smoothing(len(place), sigma, "mirror", soft / sigma, flat.device)
    return along(flat[None, None] / flat.sum(), matrix, matrix)[0, 0]


def glass(x: Image, setting: tuple[float, int, int], chance: Chance) -> Image:
    """Blur, then swap pixels with near ones, then blur (sigma, reach, times).

    In each step, distant pixels are swapped together, each once, so that all swaps of a step are independent; the
    paper's code goes pixel by pixel from the lower right.
    """
    sigma, reach, times = setting
    height, width = x.shape[2:]
    maps = [smoothing(side, sigma, "edge", 4.0, x.device) for side in (height, width)]
    x = along(x, *maps)
    down, right = (torch.arange(side, device=x.device) for side in (height, width))
    place = torch.arange(height * width, device=x.device).repeat(len(x), 1)
    for time in range(times):
        drawn = (chance.uniform(time, 2, height, width) * 2 * reach).long() - reach
        partner = (drawn[:, 0] * width + drawn[:, 1]).flatten(1)
        for first in range(4 * reach * reach):
            top, left = divmod(first, 2 * reach)
            rows = down[reach + 1 + top : height - reach + 1 : 2 * reach]
            columns = right[reach + 1 + left : width - reach + 1 : 2 * reach]
            swap(place, (rows[:, None] * width + columns).flatten(), partner)
    return along(x.flatten(2).gather(2, place[:, None].expand(-1, x.shape[1], -1)).view(x.shape), *maps)


def swap(place: Int[Tensor, "n p"], these: Int[Tensor, "m"], partner: Int[Tensor, "n p"]) -> None:
    """Swap `these` of each row with the values at these offsets, in place; swaps must not overlap."""
    those = these + partner[:, these]
    mine, yours = place[:, these], place.gather(1, those)
    place[:, these] = yours
    place.scatter_(1, those, mine)


def motion(x: Image, setting: tuple[int, float], chance: Chance) -> Image:
    """Blur in a direction of up to 45 degrees from the horizontal, drawn per image (radius, sigma)."""
    return smear(x, setting, 90 * chance.uniform(0) - 45)


def smear(x: Image, setting: tuple[int, float], degrees: Float[Tensor, "n"]) -> Image:
    """Blur with half a Gaussian along a line of 2 radius + 1 pixels, as ImageMagick's motion blur (radius, sigma)."""
    radius, sigma = setting
    height, width = x.shape[2:]
    tap = torch.arange(2 * radius + 1, device=x.device)
    weight = torch.exp(-0.5 * (tap / sigma) ** 2)
    turn = (degrees.double() * (math.pi / 180))[:, None]
    down, right = ((tap * f(turn) - 0.5).ceil().long() for f in (torch.sin, torch.cos))
    rows = inside(torch.arange(height, device=x.device) + down[..., None], height, "edge")
    columns = inside(torch.arange(width, device=x.device) + right[..., None], width, "edge")
    flat, out = x.flatten(2), torch.zeros_like(x)
    for t, share in enumerate((weight / weight.sum()).tolist()):
        index = (rows[:, t, :, None] * width + columns[:, t, None]).flatten(1)[:, None]
        out.add_(flat.gather(2, index.expand(-1, x.shape[1], -1)).view(x.shape), alpha=share)
    return out


def zoom(x: Image, setting: tuple[float, float], chance: Chance) -> Image:
    """Return the mean of the image and of enlarged versions by factors from 1 on (end, step)."""
    out, factors = x.clone(), np.arange(1, *setting).tolist()
    for factor in factors:
        out += along(x, *(zooming(side, factor, x.device) for side in x.shape[2:]))
    return out / (len(factors) + 1)
