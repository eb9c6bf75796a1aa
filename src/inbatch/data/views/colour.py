"""Colour operations: jitter, greyscale, solarise, exposure, noise.

All take float32 images in [0, 1] and may overwrite them. Brightness, contrast and saturation are one operation, a blend
of the image with its luminance and with the mean of its luminance: clamp(own x + luma L(x) + mean E[L(x)]). A random
order per image therefore needs no branch per image: three blends are done before the hue and three after it, and those
that an image does not need are the identity.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch import rng
from inbatch.data.views.operation import Image, Operation, PerImage, idle, per_image, select, uniform_in

LUMINANCE = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue as in torchvision and Pillow (ITU-R 601-2)."""


def luminance(x: Image) -> Float[Tensor, "n 1 h w"]:
    """Return the luminance of RGB images, or the mean over the channels for other numbers of channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    return (red * LUMINANCE[0]).add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2])


def blend(x: Image, own: PerImage, luma: PerImage, mean: PerImage) -> Image:
    """Compute clamp(own x + luma L(x) + mean E[L(x)], 0, 1) in place.

    With (own, luma, mean), a brightness factor f is (f, 0, 0), a saturation factor (f, 1 - f, 0), a contrast factor (f,
    0, 1 - f).
    """
    light = luminance(x)
    level = light.mean((2, 3), keepdim=True).mul_(per_image(mean))
    return x.mul_(per_image(own)).add_(light.mul_(per_image(luma)).add_(level)).clamp_(0, 1)


def rotate_hue(x: Float[Tensor, "n 3 h w"], turns: PerImage) -> Float[Tensor, "n 3 h w"]:
    """Rotate the hue by `turns` at equal saturation and value (HSV), in place.

    0 turns leave the image bit-identical.
    """
    red, green, blue = x.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    sixth = torch.where(
        red == high,
        green - blue,
        torch.where(green == high, torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)),
    )
    sixth = sixth.div_(chroma.clamp(min=1e-12)).add_(6 * turns[:, None, None])  # a turn has six sectors
    sixth = sixth.sub_(torch.floor(sixth / 6).mul_(6))
    moved = turns != 0
    for channel, mid, sign, base in ((red, 3, 1, -1), (green, 2, -1, 2), (blue, 4, -1, 2)):
        share = (sixth - mid).abs_().mul_(sign).add_(base).clamp_(0, 1)
        channel.copy_(select(moved, share.mul_(chroma).add_(low), channel))
    return x


class Jitter(Operation):
    """Colour jitter of torchvision (ColorJitter within RandomApply(p)): factors, hue, clamps and random order."""

    draws = 6

    def __init__(self, p: float, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        self.p, self.hue = p, hue
        self.strengths = (brightness, contrast, saturation)

    def settings_of(self, u: Float[Tensor, "n 6"]) -> tuple[Tensor, ...]:
        """Convert uniform draws to the settings of each image.

        Returns:
            kind (n,): 0 for no jitter, else 1 + the position of the hue in the order; factors (n, 3) of brightness,
            contrast and saturation; hue (n,) in turns; order (n, 3) of those three.
        """
        on = u[:, 0] < self.p
        factors = torch.stack(
            [uniform_in(u[:, 1 + i], max(0.0, 1 - s), 1 + s) for i, s in enumerate(self.strengths)], 1
        )
        turns = uniform_in(u[:, 4], -self.hue, self.hue)
        number = (u[:, 5] * 24).long()  # one of 4! orders: the position of the hue, then the other three
        place, rest = number % 4, number // 4
        first = rest % 3
        second = (first + 1 + rest // 3) % 3
        order = torch.stack([first, second, 3 - first - second], 1)
        return on * (1 + place), factors, turns * on, order

    def __call__(self, x: Image, kind: Tensor, factors: Tensor, turns: Tensor, order: Tensor) -> Image:
        place = (kind - 1 if self.hue else torch.where(kind > 0, 3, -1))[:, None]
        own, three = factors.gather(1, order), torch.arange(3, device=x.device)
        luma, mean = (1 - own) * (order == 2), (1 - own) * (order == 1)
        active = torch.cat([place > three, (place >= 0) & (place <= three)], 1)  # before the hue, after it
        steps = torch.where(active, own.repeat(1, 2), 1), luma.repeat(1, 2) * active, mean.repeat(1, 2) * active
        for i, (on, *settings) in enumerate(zip(*(t.unbind(1) for t in (active, *steps)), strict=True)):
            if i == 3 and self.hue and not idle(kind):
                rotate_hue(x, turns)
            if (i < 3 or self.hue) and not idle(on):
                blend(x, *settings)
        return x


class Grey(Operation):
    """Greyscale with probability p: every channel becomes the luminance."""

    draws = 1

    def __init__(self, p: float) -> None:
        self.p = p

    def settings_of(self, u: Float[Tensor, "n 1"]) -> tuple[Tensor]:
        return (u[:, 0] < self.p,)

    def __call__(self, x: Image, on: Tensor) -> Image:
        return select(on, luminance(x).expand_as(x).clone(), x)


class Solarise(Operation):
    """Inversion of the values from the threshold on, with probability p."""

    draws = 1

    def __init__(self, p: float, threshold: float) -> None:
        self.p, self.threshold = p, threshold

    def settings_of(self, u: Float[Tensor, "n 1"]) -> tuple[Tensor]:
        return (u[:, 0] < self.p,)

    def __call__(self, x: Image, on: Tensor) -> Image:
        return select(on, torch.where(x >= self.threshold, 1 - x, x), x)


class Exposure(Operation):
    """Exposure clamp(gain x + offset, 0, 1), with gain and offset drawn per image."""

    draws = 2

    def __init__(self, gain: tuple[float, float], offset: tuple[float, float]) -> None:
        self.gain, self.offset = gain, offset

    def settings_of(self, u: Float[Tensor, "n 2"]) -> tuple[Tensor, ...]:
        gain, offset = uniform_in(u[:, 0], *self.gain), uniform_in(u[:, 1], *self.offset)
        return torch.ones_like(gain, dtype=torch.bool), gain, offset

    def __call__(self, x: Image, on: Tensor, gain: Tensor, offset: Tensor) -> Image:
        return x.mul_(per_image(gain)).add_(per_image(offset)).clamp_(0, 1)


class Noise(Operation):
    """Additive normal noise with one standard deviation for all pixels, clamped to [0, 1]."""

    draws = 2

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def settings_of(self, u: Float[Tensor, "n 2"]) -> tuple[Tensor, Tensor]:
        """Return kind, and a 48-bit key per image from which its pixels' noise is drawn."""
        high, low = (u * 2**24).long().unbind(1)
        return torch.ones_like(high, dtype=torch.bool), high << 24 | low

    def __call__(self, x: Image, on: Tensor, key: Int[Tensor, "n"]) -> Image:
        u = rng.uniform(0, 0, key, 0, x[0].numel()).view_as(x).clamp_(min=2**-24)  # 0 would give an infinite value
        return x.add_(u.mul_(2).sub_(1).erfinv_(), alpha=self.deviation * 2**0.5).clamp_(0, 1)
