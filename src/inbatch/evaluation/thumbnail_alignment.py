"""Check whether two images are near duplicates: correlation of the detail of their thumbnails after an alignment.

The thumbnails of a pair are aligned by mirroring and an affine map (Gauss-Newton on the grey values, Lucas and Kanade
1981). Correlation without alignment does not separate: it is low for crops, and high for pictures of one layout.
"""

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import DataError
from inbatch.evaluation.near_duplicates import COARSE, CROP, NOISE, SIDE, described, smoothing
from inbatch.runtime.isolation import usual_numerics

THRESHOLD = 0.9
"""Least value of the check for which a pair counts as near duplicates; the documentation has the measurement."""

_FINE = 2.0  # pixels of a thumbnail: standard deviation of what is not detail
_PAIRS = 512  # pairs that are aligned at a time: 60 MB
_IMAGES = 512  # images whose crops are described at a time: 5 MB
_PRODUCTS = 1024  # pairs whose crops are compared at a time: 10 MB
_START = 0.6  # least correlation of the descriptors of a pair that is aligned, with crops of either image
_HALF = 0.3  # least value of the check on 16 x 16 pixels of a pair that is aligned on 32 x 32
_STEPS = (8, 3)  # of Gauss-Newton, on 16 x 16 and on 32 x 32 pixels
_CELLS, _LEFT = 4, 3  # of 4 x 4 parts of the images, the three that differ most are left out: a text, a person
_SCALES, _STRETCH, _TURN = (0.7, 1.43), 1.33, 0.15  # of maps that keep an image recognisable
_OVERLAP = 0.5  # least part of both images
_SPANS = [(0.0, 1.0), *((place * (1 - CROP), CROP) for place in (0, 0.5, 1))]  # of the rows or columns of a crop
_WINDOWS = [(0, 0), *product((1, 2, 3), repeat=2)]  # spans of the rows and the columns of each crop
_STARTS = list(product((False, True), _WINDOWS))  # whether one image is mirrored, and the crop of the other


@dataclass(frozen=True)
class Comparison:
    """Result of the check of pairs.

    Attributes:
        check: (P,) correlation of detail after alignment, -1 to 1; -1 if the images cannot be aligned.
        mirrored: (P,) whether the second image is mirrored.
    """

    check: Float[Tensor, "p"]
    mirrored: Bool[Tensor, "p"]


@usual_numerics()
@torch.no_grad()
def compare(thumbnails: UInt8[Tensor, "n s s"], pairs: Int[Tensor, "p 2"]) -> Comparison:
    """Check pairs of images.

    Args:
        thumbnails: (N, 32, 32) grey values.
        pairs: Positions of two images each.

    Raises:
        DataError: If the thumbnails have another size.
    """
    if thumbnails.shape[1:] != (SIDE, SIDE):
        raise DataError(f"thumbnails have {SIDE} x {SIDE} pixels, not {' x '.join(map(str, thumbnails.shape[1:]))}")
    check = torch.full((len(pairs),), -1.0)
    start, number = _started(thumbnails, pairs)
    mirrored, maps = number % len(_STARTS) // len(_WINDOWS) == 1, torch.tensor(_maps())
    started = (start >= _START).nonzero()[:, 0]
    for at in (started[i : i + _PAIRS] for i in range(0, len(started), _PAIRS)):
        first, second = (thumbnails[pairs[at, side]].float() for side in (0, 1))
        second = torch.where(mirrored[at, None, None], second.flip(-1), second)
        half, other_half = (F.avg_pool2d(images[:, None], 2)[:, 0] for images in (first, second))
        aligned = _aligned(half, other_half, maps[number[at]], _STEPS[0])
        values = _checked(half, other_half, aligned)
        near = values >= _HALF
        if near.any():
            first, second, aligned = first[near], second[near], aligned[near]
            values[near] = _checked(first, second, _aligned(first, second, aligned, _STEPS[1]))
        check[at] = values
    return Comparison(check, mirrored)


def _started(
    thumbnails: UInt8[Tensor, "n s s"], pairs: Int[Tensor, "p 2"]
) -> tuple[Float[Tensor, "p"], Int[Tensor, "p"]]:
    """Return the best correlation of each pair over crops of either image and mirroring, and the number of its map.

    The crops of an image are described once, and compared with all other images of its pairs: mirroring one image of a
    pair or the other gives the same correlation.
    """
    images, place = pairs.unique(return_inverse=True)
    own, other = place.flatten(), place.flip(1).flatten()
    starts, whole = range(0, len(images), _IMAGES), torch.empty(len(images), COARSE**2)
    for block in (slice(start, start + _IMAGES) for start in starts):
        whole[block] = described(thumbnails[images[block]].float(), _SPANS[:1], _SPANS[:1])[:, 0]
    best, number = torch.empty(2 * len(pairs)), torch.empty(2 * len(pairs), dtype=torch.uint8)
    order = own.argsort(stable=True)
    sizes = own.div(_IMAGES, rounding_mode="floor").bincount(minlength=len(starts)).tolist()
    for start, block in zip(starts, order.split(sizes), strict=True):
        values = thumbnails[images[start : start + _IMAGES]].float()
        crops = torch.cat([described(values, spans, spans) for spans in (_SPANS[:1], _SPANS[1:])], 1)
        for at in block.split(_PRODUCTS):
            theirs = whole[other[at]].view(-1, COARSE, COARSE)
            both = torch.stack([theirs, theirs.flip(-1)], 1).flatten(2)
            best[at], chosen = (both @ crops[own[at] - start].transpose(1, 2)).flatten(1).max(1)
            number[at] = chosen.byte()
    best, side = best.view(-1, 2).max(1)
    return best, side * len(_STARTS) + number.view(-1, 2).gather(1, side[:, None])[:, 0]


def _maps() -> list[list[list[float]]]:
    """Return the maps from which pairs are aligned: first those to crops of the first image, then of the second."""
    first, second = [], []
    for mirrored, (row, column) in _STARTS:
        side, top = _SPANS[row][1], 2 * _SPANS[row][0] + _SPANS[row][1] - 1
        left = 2 * _SPANS[column][0] + side - 1
        first.append([[1 / side, 0.0, -left / side], [0.0, 1 / side, -top / side]])
        second.append([[side, 0.0, -left if mirrored else left], [0.0, side, top]])
    return first + second


def _aligned(
    first: Float[Tensor, "p s s"], second: Float[Tensor, "p s s"], maps: Float[Tensor, "p 2 3"], steps: int
) -> Float[Tensor, "p 2 3"]:
    """Return the maps for which the second image, with another contrast and brightness, is most like the first.

    Pixels that differ much weigh little (Cauchy's weights), so that a text laid over one image moves nothing.
    """
    side = first.shape[-1]
    smooth = smoothing(side, 1.0)
    target, image = smooth @ first @ smooth.T, smooth @ second @ smooth.T
    across = F.pad((image[:, :, 2:] - image[:, :, :-2]) * (side / 4), (1, 1))  # per unit of a map, half a side
    down = F.pad((image[:, 2:] - image[:, :-2]) * (side / 4), (0, 0, 1, 1))
    planes = torch.stack([image, across, down], 1)
    line = (torch.arange(side) + 0.5) * 2 / side - 1
    y, x = (place.reshape(1, -1) for place in torch.meshgrid(line, line, indexing="ij"))
    wanted = target.flatten(1)[..., None]
    damping, trust = torch.tensor([1.0] * 6 + [1e-3] * 2) * 1e-3, torch.ones_like(wanted)
    for _ in range(steps):
        sampled, inside = _mapped(planes, maps)
        value, dx, dy = sampled.flatten(2).unbind(1)
        columns = torch.stack([dx * x, dx * y, dx, dy * x, dy * y, dy, value, torch.ones_like(value)], 2)
        inside = inside.flatten(1)[..., None]
        weighted = columns * (inside * trust)
        normal = weighted.transpose(1, 2) @ columns
        normal = normal + torch.diag_embed(damping * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-6)
        solution = torch.linalg.solve(normal, weighted.transpose(1, 2) @ wanted)
        error = (wanted - columns @ solution).abs() * inside
        usual = 1.5 * error.sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp(min=1) + 1
        trust = 1 / (1 + (error / usual).square())
        step = solution[..., 0]
        contrast = step[:, 6:7].clamp(min=0.2)  # an inverted image is another image
        maps = maps + (step[:, :6] / contrast).clamp(-0.1, 0.1).view(-1, 2, 3)
        maps = torch.cat([maps[..., :2].clamp(-1.6, 1.6), maps[..., 2:].clamp(-0.6, 0.6)], 2)
    return maps


def _mapped(
    planes: Float[Tensor, "p c s s"], maps: Float[Tensor, "p 2 3"]
) -> tuple[Float[Tensor, "p c s s"], Float[Tensor, "p s s"]]:
    """Return images under maps of [-1, 1] to [-1, 1], and 1 where the map leads into the image, else 0."""
    side = planes.shape[-1]
    grid = F.affine_grid(maps, [len(maps), 1, side, side], align_corners=False)
    sampled = F.grid_sample(planes, grid, align_corners=False, padding_mode="border")
    return sampled, (grid.abs() <= 1).all(-1).float()


def _checked(
    first: Float[Tensor, "p s s"], second: Float[Tensor, "p s s"], maps: Float[Tensor, "p 2 3"]
) -> Float[Tensor, "p"]:
    """Return the correlation of detail where the images overlap, -1 for maps that distort too much."""
    sampled, inside = _mapped(second[:, None], maps)
    smooth = smoothing(first.shape[-1], _FINE)
    weight = (smooth @ inside @ smooth.T).clamp(min=1e-3)
    a, b = ((x - (smooth @ (x * inside) @ smooth.T) / weight) * inside for x in (first, sampled[:, 0]))
    sums = [x.square().sum((1, 2)) + 1 for x in (a, b)]
    a, b = (x / energy.sqrt()[:, None, None] for x, energy in zip((a, b), sums, strict=True))
    cells = [
        x.unflatten(2, (_CELLS, -1)).unflatten(1, (_CELLS, -1)).sum((2, 4)).flatten(1)
        for x in ((a - b).square(), a * b, a.square(), b.square(), inside)
    ]
    kept = cells[0].argsort(1)[:, : _CELLS**2 - _LEFT]
    _, ab, aa, bb, area = (x.gather(1, kept).sum(1) for x in cells)
    noise_a, noise_b = (NOISE**2 * area / x for x in sums)
    check = ab / ((aa + noise_a) * (bb + noise_b)).sqrt()
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    share = inside.mean((1, 2))
    overlap = torch.minimum(share, share * (width * height).abs())
    least, most = _SCALES
    plausible = (torch.minimum(width, height) >= least) & (torch.maximum(width, height) <= most)
    plausible &= torch.maximum(width / height, height / width) <= _STRETCH
    plausible &= (maps[:, 0, 1].abs() <= _TURN) & (maps[:, 1, 0].abs() <= _TURN)
    return torch.where(plausible & (overlap >= _OVERLAP), check, -1.0).nan_to_num(-1.0)
