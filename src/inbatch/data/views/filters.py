"""Spatial filters: Gaussian blur and affine maps of float32 images in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inbatch.data.views.operation import Image, Operation, PerImage, per_image, select, uniform_in


def gaussian_blur(x: Image, sigma: PerImage, taps: int) -> Image:
    """Blur each image with its own sigma (pixels), `taps` pixels wide, with reflected edges, as torchvision does."""
    half = taps // 2
    place = torch.arange(-half, half + 1, device=x.device) / sigma[:, None]
    kernel = torch.softmax(-0.5 * place.square(), 1)
    for dim, pad in ((2, (0, 0, half, half)), (3, (half, half, 0, 0))):
        padded = F.pad(x, pad, mode="reflect")
        side = x.shape[dim]
        x = padded.narrow(dim, half, side) * per_image(kernel[:, half])
        for i in range(half):  # the kernel is symmetric
            both = padded.narrow(dim, i, side) + padded.narrow(dim, taps - 1 - i, side)
            x.addcmul_(both, per_image(kernel[:, i]))
    return x


def affine(x: Image, inverse: Float[Tensor, "n 2 3"], padding: str) -> Image:
    """Apply an affine map given by its inverse, with bilinear interpolation.

    Args:
        x: Images.
        inverse: Maps output to input coordinates, in units of half a side about the centre.
        padding: Pixels outside the input: black ("zeros") or the pixel at the edge ("border").
    """
    grid = F.affine_grid(inverse, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding, align_corners=False)


class Blur(Operation):
    """Gaussian blur with probability p and sigma uniform in a range."""

    draws = 2

    def __init__(self, p: float, sigma: tuple[float, float], taps: int) -> None:
        self.p, self.sigma, self.taps = p, sigma, taps

    def settings_of(self, u: Float[Tensor, "n 2"]) -> tuple[Tensor, Tensor]:
        return u[:, 0] < self.p, uniform_in(u[:, 1], *self.sigma)

    def __call__(self, x: Image, on: Tensor, sigma: Tensor) -> Image:
        return select(on, gaussian_blur(x, sigma, self.taps), x)


class Affine(Operation):
    """Affine map about the centre: zoom, then shear, then rotation, then shift."""

    draws = 6

    def __init__(
        self, zoom: tuple[float, float], aspect: float, rotation: float, shear: float, shift: float, padding: str
    ) -> None:
        self.zoom, self.aspect, self.shift, self.padding = zoom, math.log(aspect), shift, padding
        self.rotation, self.shear = math.radians(rotation), math.radians(shear)

    def settings_of(self, u: Float[Tensor, "n 6"]) -> tuple[Tensor, Tensor]:
        """Return kind, and the inverse map (n, 2, 3); zoom and aspect are uniform in their logarithm."""
        zoom = torch.exp(uniform_in(u[:, 0], math.log(self.zoom[0]), math.log(self.zoom[1])))
        stretch = torch.exp(uniform_in(u[:, 1], -self.aspect, self.aspect) / 2)
        turn = uniform_in(u[:, 2], -self.rotation, self.rotation)
        shear = torch.tan(uniform_in(u[:, 3], -self.shear, self.shear))
        shift = uniform_in(u[:, 4:], -2 * self.shift, 2 * self.shift)  # a side is 2 units long
        inverse = inverse_map(zoom * stretch, zoom / stretch, turn, shear, shift)
        return torch.ones_like(turn, dtype=torch.bool), inverse

    def __call__(self, x: Image, on: Tensor, inverse: Tensor) -> Image:
        return affine(x, inverse, self.padding)


def inverse_map(
    wider: PerImage, taller: PerImage, turn: PerImage, shear: PerImage, shift: Float[Tensor, "n 2"]
) -> Float[Tensor, "n 2 3"]:
    """Return the inverse of y = R(turn) [[1, -shear], [0, 1]] diag(wider, taller) x + shift.

    Turn in radians, shear a slope.
    """
    cos, sin = torch.cos(turn), torch.sin(turn)
    rows = torch.stack(
        [(cos - shear * sin) / wider, (sin + shear * cos) / wider, -sin / taller, cos / taller], 1
    ).unflatten(1, (2, 2))
    return torch.cat([rows, -rows @ shift[:, :, None]], 2)
