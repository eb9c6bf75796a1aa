"""Spatial relation of the two crops of an image: one inside the other, apart, or overlapping in part.

Welle, Poklukar and Kragic, Batch Curation for Unsupervised Contrastive Representation Learning, 2021, section 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.errors import ConfigError

GLOBAL_LOCAL, ADJACENT, INTERSECTION = range(3)
CONFIGURATIONS = ("global-local", "adjacent", "intersection")
"""Names of the configuration codes."""

Range = tuple[float, float]
CANDIDATES, _STRIDE = 34, 21
"""Number of candidate sizes per box: points of a Fibonacci lattice over area and aspect ratio."""

_GAP, _CROSS, _WITHIN = range(3)
"""Relations along one axis: a gap of at least one pixel; neither apart nor inside; one strictly inside the other."""
_ALLOWED = torch.tensor(
    [
        [[0, 0, 0], [0, 0, 0], [0, 0, 1]],  # global-local: inside along both axes
        [[1, 1, 1], [1, 0, 0], [1, 0, 0]],  # adjacent: a gap along at least one axis
        [[0, 0, 0], [0, 1, 1], [0, 1, 0]],  # intersection: a gap along neither axis, inside along at most one
    ]
)
"""[configuration, relation along y, relation along x]: 1 if they are compatible."""


def configuration(boxes: Int[Tensor, "2 b 4"]) -> Int[Tensor, "b"]:
    """Return the configuration of each pair of boxes (top, left, height, width in pixels), section 2.1 and Figure 2.

    GLOBAL_LOCAL: all four edges of one box are strictly inside the other. ADJACENT: at least one row or column of
    pixels lies between the boxes. INTERSECTION: everything else, including touching edges. Of the interpretations that
    were tried, this one reproduces the shares of Figure 3.
    """
    (start1, start2), (end1, end2) = boxes[..., :2], boxes[..., :2] + boxes[..., 2:]
    inside = ((start1 < start2) & (end2 < end1)).all(1) | ((start2 < start1) & (end1 < end2)).all(1)
    apart = ((end1 < start2) | (end2 < start1)).any(1)
    return torch.full_like(boxes[0, :, 0], INTERSECTION).masked_fill(apart, ADJACENT).masked_fill(inside, GLOBAL_LOCAL)


@dataclass(frozen=True)
class Geometry:
    """Crop geometry of one name in `CROPS`.

    Attributes:
        configurations: Allowed configurations of the two crops, each equally often; empty for no restriction.
        scale: Range of the area of every crop as a fraction of the image; None for that of the view.
    """

    configurations: tuple[int, ...] = ()
    scale: Range | None = None


CROPS = {
    "default": Geometry(),
    "global-local": Geometry((GLOBAL_LOCAL,)),
    "adjacent": Geometry((ADJACENT,)),
    "intersection": Geometry((INTERSECTION,)),
    "equal": Geometry((GLOBAL_LOCAL, ADJACENT, INTERSECTION)),
    "big": Geometry(scale=(0.5, 1.0)),
    "small": Geometry(scale=(0.08, 0.5)),
    "global-local-big": Geometry((GLOBAL_LOCAL,), scale=(0.5, 1.0)),
}
"""Rows of Table 1, by name."""


@dataclass(frozen=True)
class CropPairs:
    """Draw the boxes of both views jointly, so that each pair has one of `configurations`, each equally often.

    The result resembles rejection sampling of pairs of random resized crops, but takes one pass of bounded cost and is
    a pure function of the uniform numbers. Every box has `CANDIDATES` sizes, a randomly shifted lattice over area
    (uniform) and logarithm of width / height (uniform). One pair of sizes is chosen with probability proportional to
    the probability of the configuration given the sizes, which is a count of positions. One of these positions is then
    chosen uniformly. Positions are exact, sizes approximate (figures in docs/context/crops.md).

    Attributes:
        configurations: Codes of the allowed configurations.
        scale: Range of the area for each of the two views, as in torchvision's RandomResizedCrop.
        ratio: Range of width / height for each of the two views, as there.
    """

    configurations: tuple[int, ...]
    scale: tuple[Range, Range]
    ratio: tuple[Range, Range]
    draws = 11
    """Random numbers per pair.

    Configuration, sizes of the first box (2) and the second (2), pair of sizes, relations, position along y (2) and x
    (2).
    """

    def __call__(self, u: Float[Tensor, "b draws"], size: Int[Tensor, "b 2"]) -> Int[Tensor, "2 b 4"]:
        """Draw pairs of boxes for images of the given sizes (height, width).

        Returns:
            Top, left, height and width in pixels. Both boxes of a pair are 0 if no sizes admit the configuration (an
            image of a few pixels).
        """
        u = u.double()
        wanted = torch.tensor(self.configurations, device=u.device)[(u[:, 0] * len(self.configurations)).long()]
        first, second = (
            sizes(numbers, size, scale, ratio)
            for numbers, scale, ratio in zip((u[:, 1:3], u[:, 3:5]), self.scale, self.ratio, strict=True)
        )
        a, b, possible = _pick(u[:, 5], wanted, size, first, second)
        kind = _cell(u[:, 6], wanted, size, a, b)
        fine = u[:, 7:9] + u[:, 9:11] * 2**-24  # draws have 24 bits, large images have more positions
        start1, start2 = _place(fine, size, a, b, kind)
        boxes = torch.stack([torch.cat([start1, a], 1), torch.cat([start2, b], 1)])
        return boxes * possible[:, None]


def arrange(name: str, views: Sequence[Any]) -> tuple[tuple[Any, ...], CropPairs | None]:
    """Return the views and the joint sampler of boxes for a name in `CROPS`.

    Args:
        name: Key of `CROPS`.
        views: Views (`view.View`).

    Returns:
        The views, with their scale replaced if the name sets one; and the sampler, None if each view draws its own box.

    Raises:
        ConfigError: If the name is unknown, if a view has no random crop, or if pairs are requested for other than two
            views.
    """
    if name not in CROPS:
        raise ConfigError(f"There are no crops {name!r}. Choose one of {', '.join(CROPS)}.")
    geometry, views = CROPS[name], tuple(views)
    if geometry == Geometry():
        return views, None
    if any(view.scale is None for view in views):
        raise ConfigError(
            f"The crops {name!r} need views that are cut at random, and these are not (scale is None, as in the views "
            "digits and plain). Leave out --crops, or choose other views (simclr, mocov2, ...)."
        )
    if geometry.configurations and len(views) != 2:
        raise ConfigError(
            f"The crops {name!r} are a pair, but there are {len(views)} views of every image. Choose views that are "
            "two (simclr, mocov2, byol, ...), or the crops default, big or small."
        )
    if geometry.scale is not None:
        views = tuple(replace(view, scale=geometry.scale) for view in views)
    if not geometry.configurations:
        return views, None
    first, second = views
    return views, CropPairs(geometry.configurations, (first.scale, second.scale), (first.ratio, second.ratio))


def sizes(
    u: Float[Tensor, "b 2"], image: Int[Tensor, "b 2"], scale: Range, ratio: Range
) -> Int[Tensor, "b candidates 2"]:
    """Return heights and widths of boxes as in random resized crops; 0 if a candidate does not fit the image.

    Each candidate alone is distributed as one try of torchvision; all together cover area and aspect ratio evenly.
    """
    number = torch.arange(CANDIDATES, device=u.device)
    lattice = torch.stack([number, number * _STRIDE], -1).double() / CANDIDATES
    share, turn = (u[:, None] + lattice).frac().unbind(-1)
    height, width = image.split(1, 1)
    # No box with a larger area fits into a narrow image, so no candidate is spent there.
    fits = torch.minimum((width + 0.5) ** 2 / ratio[0], (height + 0.5) ** 2 * ratio[1])
    least = scale[0] * (height * width).double()
    most = torch.maximum(torch.minimum(scale[1] * (height * width).double(), fits), least)
    area = least + (most - least) * share
    shape = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * turn)
    h, w = (area / shape).sqrt().round().long(), (area * shape).sqrt().round().long()
    return torch.stack([h, w], -1) * ((h > 0) & (h <= height) & (w > 0) & (w <= width))[..., None]


def chances(
    wanted: Int[Tensor, "b"], image: Int[Tensor, "b 2"], first: Int[Tensor, "b k 2"], second: Int[Tensor, "b m 2"]
) -> Float[Tensor, "b k m"]:
    """Compute the probability of the wanted configuration of two boxes at random positions; 0 for sizes of 0."""
    a, b, extent = (x.float().mT.contiguous() for x in (first, second, image[:, None]))
    (gap_y, in_y, longer_y), (gap_x, in_x, longer_x) = (
        _shares(extent[:, i, :, None], a[:, i, :, None], b[:, i, None]) for i in (0, 1)
    )
    inside = in_y.mul_(in_x).mul_(longer_y.mul_(longer_x) > 0)  # containment needs the longer box on both axes
    apart = gap_y + gap_x - gap_y * gap_x
    code = wanted[:, None, None]
    chance = torch.where(code == GLOBAL_LOCAL, inside, torch.where(code == ADJACENT, apart, 1 - apart - inside))
    return chance.clamp_(min=0).mul_(first[:, :, :1] > 0).mul_(second[:, None, :, 0] > 0)


def _shares(extent: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, along one axis, the probabilities of a gap and of the shorter strictly inside the longer; and a - b."""
    slack, longer = (extent - a - b).clamp_(min=0), a - b
    gap = (slack + 1).mul_(slack).div_(extent - a + 1).div_(extent - b + 1)
    return gap, (longer.abs() - 1).clamp_(min=0).div_(extent + 1 - torch.minimum(a, b)), longer


def _pick(
    u: Tensor, wanted: Tensor, extent: Tensor, first: Tensor, second: Tensor
) -> tuple[Int[Tensor, "b 2"], Int[Tensor, "b 2"], Bool[Tensor, "b"]]:
    """Choose one pair of sizes per image by its probability; return the sizes and whether any pair is possible."""
    # integers, so that the sum does not depend on the order
    weight = (chances(wanted, extent, first, second) * 2**40).long().flatten(1)
    which, possible = _by_count(u, weight)
    take = torch.stack([which // CANDIDATES, which % CANDIDATES])[..., None, None].expand(-1, -1, 1, 2)
    # If no pair is possible, a size of 1 keeps the arithmetic defined.
    a, b = (
        torch.where(possible[:, None], x.gather(1, i).squeeze(1), 1) for x, i in zip((first, second), take, strict=True)
    )
    return a, b, possible


def relations(
    extent: Int[Tensor, "b 2"], a: Int[Tensor, "b 2"], b: Int[Tensor, "b 2"]
) -> tuple[Int[Tensor, "b 2"], Int[Tensor, "b 2"], Int[Tensor, "b 2"]]:
    """Count the relative positions of boxes of sizes a and b along y and x: with a gap, across, inside."""
    last1, last2 = extent - a, extent - b
    low, high = _inside(a, b)
    touching = _before(a + 1, last1, last2) - _before(-b, last1, last2)  # offsets -b to a leave no gap
    within = _before(high, last1, last2) - _before(low, last1, last2)
    return (last1 + 1) * (last2 + 1) - touching, touching - within, within


def _cell(u: Tensor, wanted: Tensor, extent: Tensor, a: Tensor, b: Tensor) -> Int[Tensor, "b 2"]:
    """Choose the relations along y and x among those of the configuration, weighted by the number of positions."""
    y, x = torch.stack(relations(extent, a, b), -1).unbind(1)
    ways = y[:, :, None] * x[:, None] * _ALLOWED.to(u.device)[wanted]
    which, _ = _by_count(u, ways.flatten(1))
    return torch.stack([which // 3, which % 3], 1)


def _by_count(u: Tensor, count: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b"], Bool[Tensor, "b"]]:
    """Choose one of n with probability proportional to its count; also return whether any count is above 0."""
    below = count.cumsum(1)
    total = below[:, -1]
    which = torch.searchsorted(below, (u * total).long()[:, None], right=True)[:, 0]
    return which.clamp(max=count.shape[1] - 1), total > 0


def _place(
    u: Float[Tensor, "b 2"], extent: Int[Tensor, "b 2"], a: Tensor, b: Tensor, kind: Tensor
) -> tuple[Int[Tensor, "b 2"], Int[Tensor, "b 2"]]:
    """Return the starts of the two boxes along y and x, uniform over all positions of the given relation.

    All positions are numbered in the order of their offset, second start minus first. A relation is one or two ranges
    of offsets, so a number within the relation becomes a number among all positions by skipping what lies in between.
    """
    last1, last2 = extent - a, extent - b
    overlap_start, overlap_end = _before(-b, last1, last2), _before(a + 1, last1, last2)
    low, high = _inside(a, b)
    inside_start, inside_end = _before(low, last1, last2), _before(high, last1, last2)
    count = torch.stack(relations(extent, a, b)).gather(0, kind[None])[0]
    number = (u * count).long()
    gap = number + (overlap_end - overlap_start) * (number >= overlap_start)
    cross = number + overlap_start + (inside_end - inside_start) * (number + overlap_start >= inside_start)
    number = torch.where(kind == _GAP, gap, torch.where(kind == _CROSS, cross, number + inside_start))
    offset = _offset(number, last1, last2)
    start = number - _before(offset, last1, last2) + (-offset).clamp(min=0)
    return start, start + offset


def _inside(a: Int[Tensor, "b 2"], b: Int[Tensor, "b 2"]) -> tuple[Int[Tensor, "b 2"], Int[Tensor, "b 2"]]:
    """Return the offsets [low, high) that put the shorter box strictly inside the other.

    Empty if neither box can be.
    """
    longer = a - b
    low, high = torch.where(longer > 0, 1, longer + 1), torch.where(longer > 0, longer, 0)
    return low, torch.where(longer.prod(1, keepdim=True) > 0, torch.maximum(low, high), low)


def _before(offset: Tensor, last1: Tensor, last2: Tensor) -> Tensor:
    """Count the positions, 0 to last1 and 0 to last2, with a smaller offset."""
    right, far = last1 + offset, last2 + 1
    return _triangle(right) - _triangle(offset - 1) - _triangle(right - far) + _triangle(offset - 1 - far)


def _offset(number: Tensor, last1: Tensor, last2: Tensor) -> Tensor:
    """Return the offset of a position by its number: 1, 2, 3, ... positions per offset, then constant, then fewer."""
    short, long = torch.minimum(last1, last2), torch.maximum(last1, last2)
    rise, mirrored = _triangle(short), (last1 + 1) * (last2 + 1) - 1 - number
    place = short + (number - rise) // (short + 1)
    place = torch.where(number < rise, _row(number), place)
    return torch.where(mirrored < rise, short + long - _row(mirrored), place) - last1


def _triangle(n: Tensor) -> Tensor:
    """Return 1 + 2 + ... + n, or 0 for negative n."""
    n = n.clamp(min=0)
    return n * (n + 1) // 2


def _row(number: Tensor) -> Tensor:
    """Return the row that contains a number in the triangle 1, 2, 3, ...; exact, as the root is below 2^50."""
    return (((8 * number + 1).double().sqrt() - 1) / 2).long()
