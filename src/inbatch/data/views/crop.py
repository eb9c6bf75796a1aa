"""Crop boxes and batched cropping: antialiased random resized crops as two matrix products per image."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from inbatch.data.views.operation import can_branch
from inbatch.data.views.view import Interpolation, Range

TRIES = 10
DRAWS = 2 * TRIES + 2
"""Random numbers per crop: an area and an aspect ratio for each try, then top and left."""

_LARGE = 96 * 96
"""Canvas size in pixels above which, on a CPU, it is faster to cut first and resize image by image."""


def random_boxes(
    u: Float[Tensor, "n draws"], size: Int[Tensor, "n 2"], scale: Range, ratio: Range
) -> Int[Tensor, "n 4"]:
    """Draw boxes of random resized crops, distributed exactly as in torchvision's RandomResizedCrop.

    A box is the first of ten tries that fits, else the largest centred box with an allowed aspect ratio.

    Args:
        u: Uniform draws, DRAWS columns.
        size: Height and width of the images in pixels.
        scale: Range of the area as a fraction of the image.
        ratio: Range of width / height.

    Returns:
        Top, left, height and width in pixels.
    """
    u, (height, width) = u.double(), size.split(1, 1)  # torchvision rounds in double precision
    area = (height * width) * (scale[0] + (scale[1] - scale[0]) * u[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shape = torch.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    w, h = (area * shape).sqrt().round().long(), (area / shape).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.long().argmax(1, keepdim=True)  # argmax returns the first of equal maxima
    w, h = w.gather(1, first), h.gather(1, first)
    top = (u[:, -2:-1] * (height - h + 1)).long()
    left = (u[:, -1:] * (width - w + 1)).long()

    aspect = width.double() / height
    w_back = torch.where(aspect > ratio[1], (height.double() * ratio[1]).round().long(), width)
    h_back = torch.where(aspect < ratio[0], (width.double() / ratio[0]).round().long(), height)
    back = torch.cat([(height - h_back) // 2, (width - w_back) // 2, h_back, w_back], 1)
    return torch.where(fits.any(1, keepdim=True), torch.cat([top, left, h, w], 1), back)


def centre_boxes(size: Int[Tensor, "n 2"], share: float) -> Int[Tensor, "n 4"]:
    """Return the centred squares with a side of `share` times the shorter side of the image."""
    side = (size.amin(1, keepdim=True) * share).round().long().clamp_(min=1)
    return torch.cat([(size - side) // 2, side, side], 1)


def weights(
    start: Int[Tensor, "n"], length: Int[Tensor, "n"], extent: int, size: int, how: Interpolation
) -> Float[Tensor, "n size extent"]:
    """Compute matrices that resample pixels [start, start + length) of a line of `extent` pixels to `size` pixels.

    They equal torch.nn.functional.interpolate(..., antialias=True) on the cut-out piece; pixels outside it have no
    weight.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    sharp = scale.reciprocal().clamp_(max=1)  # enlarging interpolates, shrinking averages
    centre = scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(extent, device=start.device) - start
    distance = ((pixel + 0.5) * sharp - centre * sharp).abs_()
    if how == "bilinear":
        w = distance.neg_().add_(1).clamp_(min=0)
    else:  # Keys 1981 with a = -1/2, as in the antialiased resizing of torch and Pillow
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        w = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    w = w.mul_((pixel >= 0) & (pixel < length))
    return w.div_(w.sum(-1, keepdim=True))


def resample(
    images: UInt8[Tensor, "m c h w"],
    source: Int[Tensor, "n"],
    boxes: Int[Tensor, "n 4"],
    flip: Bool[Tensor, "n"],
    size: int,
    how: Interpolation,
) -> Float[Tensor, "n c size size"]:
    """Return box i of image source[i], resized with antialiasing, mirrored if `flip`, with values in [0, 1]."""
    if can_branch(images) and images[0, 0].numel() > _LARGE:
        return _one_by_one(images, source, boxes, flip, size, how)
    top, left, height, width = boxes.unbind(1)
    down = weights(top, height, images.shape[2], size, how)
    along = weights(left, width, images.shape[3], size, how).div_(255)
    along = torch.where(flip[:, None, None], along.flip(1), along)
    x = images.index_select(0, source).float()
    x = (x.flatten(1, 2) @ along.mT).unflatten(1, x.shape[1:3])
    return (down[:, None] @ x).clamp_(0, 1)


def _one_by_one(images: Tensor, source: Tensor, boxes: Tensor, flip: Tensor, size: int, how: Interpolation) -> Tensor:
    out = images.new_empty(len(source), images.shape[1], size, size, dtype=torch.float32)
    rows = zip(source.tolist(), boxes.tolist(), flip.tolist(), strict=True)
    for into, (i, (top, left, height, width), mirrored) in zip(out, rows, strict=True):
        piece = images[i : i + 1, :, top : top + height, left : left + width].float()
        x = F.interpolate(piece, size=(size, size), mode=how, antialias=True)[0]
        torch.div(x.flip(-1) if mirrored else x, 255, out=into)
    return out.clamp_(0, 1)


def mirror(x: Float[Tensor, "n c h w"], flip: Bool[Tensor, "n"]) -> Float[Tensor, "n c h w"]:
    """Mirror the images left to right if `flip`."""
    return torch.where(flip[:, None, None, None], x.flip(-1), x)
