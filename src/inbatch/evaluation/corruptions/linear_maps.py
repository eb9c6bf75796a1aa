"""Linear maps of the lines of an image as matrices: smoothing, zooming, boxes, for lines of any length."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Edge = Literal["edge", "mirror", "symmetric"]
"""Continuation of a b c beyond the edge: its pixel (a a), the mirror image without it (c b) or with it (b a)."""


def inside(place: Int[Tensor, "..."], side: int, edge: Edge) -> Int[Tensor, "..."]:
    """Return the pixel in [0, side) for each position on an endless line."""
    if edge == "edge" or side == 1:
        return place.clamp(0, side - 1)
    period = 2 * side - 2 if edge == "mirror" else 2 * side
    place = place % period
    return torch.where(place < side, place, period - place - int(edge == "symmetric"))


def along(x: Float[Tensor, "n c h w"], rows: Float[Tensor, "a h"], columns: Float[Tensor, "b w"]) -> Tensor:
    """Return (N, C, a, b): one map applied to the columns and one to the rows."""
    return rows @ x @ columns.mT


def smoothing(side: int, sigma: float, edge: Edge, truncate: float, device: torch.device) -> Float[Tensor, "side side"]:
    """Return a Gaussian of this deviation in pixels, truncated at `truncate` deviations (SciPy's gaussian_filter)."""
    radius = int(truncate * sigma + 0.5)
    tap = torch.arange(-radius, radius + 1, device=device)
    weight = torch.exp(-0.5 * (tap / sigma) ** 2)
    index = inside(torch.arange(side, device=device)[:, None] + tap, side, edge)
    return weight.new_zeros(side, side).scatter_add_(1, index, (weight / weight.sum()).expand(side, -1))


def zooming(side: int, factor: float, device: torch.device) -> Float[Tensor, "side side"]:
    """Return the map to the middle of a line, enlarged linearly (as SciPy's zoom) and cut to its length."""
    kept = math.ceil(side / factor)
    enlarged = round(kept * factor)
    place = torch.arange(side, device=device) + (enlarged - side) // 2
    at = (side - kept) // 2 + place * ((kept - 1) / max(1, enlarged - 1))
    low = at.floor().clamp(max=side - 1)
    share = (at - low)[:, None]
    matrix = at.new_zeros(side, side).scatter_(1, low.long()[:, None], 1 - share)
    return matrix.scatter_add_(1, (low.long()[:, None] + 1).clamp(max=side - 1), share)


def boxes(side: int, size: int, device: torch.device) -> Float[Tensor, "size side"]:
    """Return the map of `side` pixels to `size` means over boxes, selected by pixel centres (as Pillow's BOX)."""
    scale = side / size
    centre = (torch.arange(size, device=device)[:, None] + 0.5) * scale
    distance = (torch.arange(side, device=device) + 0.5 - centre) / max(scale, 1)
    within = ((distance > -0.5) & (distance <= 0.5)).float()
    return within / within.sum(1, keepdim=True)
