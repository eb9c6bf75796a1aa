"""Gaussian noise, shot noise and impulse noise. Images are float32 in [0, 1], (N, C, H, W)."""

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.evaluation.corruptions.image_rng import Chance

Image = Float[Tensor, "n c h w"]


def gaussian(x: Image, scale: float, chance: Chance) -> Image:
    """Add normal noise of this standard deviation to every value."""
    return x + scale * chance.normal(0, *x.shape[1:])


def shot(x: Image, rate: float, chance: Chance) -> Image:
    """Apply Poisson noise: a value v, one of 256 levels, becomes a Poisson count of mean v rate, over the rate."""
    most = int(rate + 8 * rate**0.5) + 20
    count = torch.arange(most, device=x.device, dtype=torch.float64)
    mean = torch.arange(256, device=x.device, dtype=torch.float64)[:, None] * (rate / 255)
    chances = (torch.xlogy(count, mean) - mean - torch.lgamma(count + 1)).exp()
    # The distribution functions of all levels on one line, level l in [l, l + 1]: one search inverts them all.
    line = torch.arange(256, device=x.device)[:, None] + chances.cumsum(1).clamp(max=1)
    level = (x * 255).round()
    drawn = level.double() + chance.uniform(0, *x.shape[1:])
    return (torch.searchsorted(line.flatten(), drawn, right=True) - level * most) / rate


def impulse(x: Image, share: float, chance: Chance) -> Image:
    """Apply salt and pepper: this share of the values becomes 0 or 1, with equal probability."""
    hit, salt = chance.uniform(0, 2, *x.shape[1:]).unbind(1)
    return torch.where(hit < share, (salt < 0.5).to(x.dtype), x)
