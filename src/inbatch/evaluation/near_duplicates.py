"""Near duplicates of images by their grey thumbnails: candidates, and a check of pairs after their alignment.

A thumbnail has 32 x 32 bytes: the whole image without its aspect ratio. The check aligns the two thumbnails of a pair
by mirroring and an affine map (Gauss-Newton on the grey values, Lucas and Kanade 1981), and correlates their detail
where they overlap. Correlation without alignment does not separate: it is low for crops, and high for pictures of one
layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import DataError
from inbatch.evaluation.neighbours import nearest
from inbatch.runtime.isolation import usual_numerics

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

SIDE = 32
"""Side of a thumbnail in pixels."""

ALIKE = 0.55
"""Least correlation of the descriptors of two images that are compared because of them."""

THRESHOLD = 0.9
"""Least value of the check for which a pair counts as near duplicates; the documentation has the measurement."""

_LUMA = (0.299, 0.587, 0.114)
_COARSE = 16  # side of the descriptors
_NOISE = 1.0  # grey values; detail below it, such as that of JPEG in a sky, does not count
_WIDE, _FINE = 3.0, 2.0  # pixels of the descriptor and of the thumbnail: standard deviation of what is not detail
_PAIRS = 512  # pairs in memory at a time: 60 MB
_QUERIES = 1 << 16  # images whose neighbours are searched at a time
_CHUNK = 4096  # thumbnails described at a time
_CROP = 0.85  # side of the crops from which an alignment starts
_START = 0.6  # least correlation of the descriptors of a pair that is aligned, with crops of either image
_HALF = 0.3  # least value of the check on 16 x 16 pixels of a pair that is aligned on 32 x 32
_STEPS = (8, 3)  # of Gauss-Newton, on 16 x 16 and on 32 x 32 pixels
_CELLS, _LEFT = 4, 3  # of 4 x 4 parts of the images, the three that differ most are left out: a text, a person
_SCALES, _STRETCH, _TURN = (0.7, 1.43), 1.33, 0.15  # of maps that keep an image recognisable
_OVERLAP = 0.5  # least part of both images


@dataclass(frozen=True)
class Comparison:
    """Result of the check of pairs.

    Attributes:
        check: (P,) correlation of detail after alignment, -1 to 1; -1 if the images cannot be aligned.
        mirrored: (P,) whether the second image is mirrored.
    """

    check: Float[Tensor, "p"]
    mirrored: Bool[Tensor, "p"]


def thumbnail(image: UInt8[Tensor, "c s s"]) -> UInt8[Tensor, "s s"]:
    """Return the grey values of an image; of images with other than three channels, their mean."""
    values = image.float()
    grey = (values * values.new_tensor(_LUMA)[:, None, None]).sum(0) if len(values) == 3 else values.mean(0)
    return grey.round_().clamp_(0, 255).byte()


def descriptors(
    thumbnails: UInt8[Tensor, "n s s"], part: float = 1.0, mirrored: bool = False
) -> Float[Tensor, "n 256"]:
    """Return vectors whose product is the correlation of the detail of two images that are not aligned.

    Args:
        thumbnails: Images.
        part: Side of the central part to describe, 1 for the whole image.
        mirrored: Describe the mirror images.
    """
    rows = []
    for images in thumbnails.split(_CHUNK):
        values = images.float()
        rows.append(_described(values.flip(-1) if mirrored else values, [((1 - part) / 2, part)])[:, 0])
    return torch.cat(rows)


@usual_numerics()
@torch.no_grad()
def similar_pairs(
    thumbnails: UInt8[Tensor, "n s s"], k: int, search: Search = nearest
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, "p"]]:
    """Return pairs of images that may be near duplicates, the lower position first, and their correlation.

    Each image, its mirror image, and the central parts of both name the k images nearest to them.

    Args:
        thumbnails: (N, 32, 32) grey values.
        k: Number of candidates of each image, at most N - 1.
        search: Returns similarities and positions of the nearest rows of a bank, as `neighbours.nearest`.
    """
    bank = descriptors(thumbnails)
    pairs, values = [torch.zeros(0, 2, dtype=torch.long)], [torch.zeros(0)]
    for start in range(0, len(thumbnails), _QUERIES):
        some = thumbnails[start : start + _QUERIES]
        for part in (1.0, _CROP):
            for mirrored in (False, True):
                near, place = search(descriptors(some, part, mirrored), bank, min(k + 1, len(bank)))
                own = torch.arange(start, start + len(some))[:, None].expand_as(place)
                alike = (near >= ALIKE) & (own != place)
                pairs.append(torch.stack([own[alike], place[alike]], 1))
                values.append(near[alike])
    return unique_pairs(torch.cat(pairs), torch.cat(values))


def unique_pairs(
    pairs: Int[Tensor, "p 2"], values: Float[Tensor, "p"]
) -> tuple[Int[Tensor, "q 2"], Float[Tensor, "q"]]:
    """Return each pair once, in order and with the lower position first, and the largest value of it."""
    each, place = pairs.sort(1).values.unique(dim=0, return_inverse=True)
    return each, torch.full((len(each),), -torch.inf).scatter_reduce_(0, place, values, "amax")


def open_pairs(count: int, pairs: Int[Tensor, "p 2"], most: int = 50) -> Int[Tensor, "q 2"]:
    """Return the other pairs of images that are connected by pairs, in order: they were not candidates.

    Args:
        count: Number of images.
        pairs: Confirmed pairs.
        most: Images that are connected to more than this number are left out: their pairs are too many.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = pairs.T.numpy()
    _, part = connected_components(coo_array((first * 0 + 1, (first, second)), (count, count)), directed=False)
    part = torch.from_numpy(part).long()
    order = part.argsort(stable=True)
    sizes = part.bincount()
    known = {tuple(pair) for pair in pairs.sort(1).values.tolist()}
    groups = [group.tolist() for group in order.split(sizes.tolist()) if 2 < len(group) <= most]
    more = [pair for group in groups for pair in combinations(group, 2) if pair not in known]
    return torch.tensor(sorted(more), dtype=torch.long).view(-1, 2)


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
    check, mirrored = torch.full((len(pairs),), -1.0), torch.zeros(len(pairs), dtype=torch.bool)
    for at in torch.arange(len(pairs)).split(_PAIRS):
        first, second = (thumbnails[pairs[at, side]].float() for side in (0, 1))
        start, maps, mirror = _started(first, second)
        mirrored[at] = mirror
        near = start >= _START
        if not near.any():
            continue
        first, second, maps = first[near], second[near], maps[near]
        second = torch.where(mirror[near, None, None], second.flip(-1), second)
        small = [F.avg_pool2d(images[:, None], 2)[:, 0] for images in (first, second)]
        maps = _aligned(*small, maps, _STEPS[0])
        values = _checked(*small, maps)
        near = values >= _HALF
        values[near] = _checked(first[near], second[near], _aligned(first[near], second[near], maps[near], _STEPS[1]))
        check[at[start >= _START]] = values
    return Comparison(check, mirrored)


def representatives(count: int, pairs: Int[Tensor, "p 2"], order: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """Return the representative of each image: itself, or the image to keep instead of it.

    The images are visited in `order`; one without a representative represents itself, and all images that form a pair
    with it and have none yet. So every image forms a pair with its representative: A ~ B and B ~ C do not join A and C.

    Args:
        count: Number of images, N.
        pairs: Confirmed pairs.
        order: All images, those to keep first.
    """
    both = torch.cat([pairs, pairs.flip(1)])
    both = both[both[:, 0].argsort(stable=True)]
    start = torch.searchsorted(both[:, 0].contiguous(), torch.arange(count + 1))
    chosen = torch.full((count,), -1)
    busy = torch.zeros(count, dtype=torch.bool)
    busy[pairs.flatten()] = True
    for i in order[busy[order]].tolist():
        if chosen[i] < 0:
            chosen[i] = i
            others = both[start[i] : start[i + 1], 1]
            chosen[others[chosen[others] < 0]] = i
    return torch.where(chosen < 0, torch.arange(count), chosen)


def _smoothing(side: int, deviation: float) -> Float[Tensor, "s s"]:
    place = torch.arange(side).float()
    weights = torch.exp(-((place[:, None] - place).square()) / (2 * deviation**2))
    return weights / weights.sum(1, keepdim=True)


def _resampling(start: float, part: float) -> Float[Tensor, "o s"]:
    """Return the weights with which pixels between two places of a line, 0 to 1, are averaged to a descriptor's."""
    edges = torch.linspace(start * SIDE, (start + part) * SIDE, _COARSE + 1)
    centre, width = (edges[1:] + edges[:-1]) / 2, max(1.0, part * SIDE / _COARSE)
    weights = (1 - (torch.arange(SIDE) + 0.5 - centre[:, None]).abs() / width).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _described(images: Float[Tensor, "n s s"], spans: list[tuple[float, float]]) -> Float[Tensor, "n w 256"]:
    """Return descriptors of all windows whose rows and whose columns are one of the spans (start, part) each."""
    count, weights = len(spans), torch.cat([_resampling(*span) for span in spans])
    across = (images.reshape(-1, SIDE) @ weights.T).view(-1, SIDE, count * _COARSE)
    small = (across.transpose(1, 2).reshape(-1, SIDE) @ weights.T).view(-1, count, _COARSE, count, _COARSE)
    small = small.permute(0, 3, 1, 4, 2).reshape(-1, _COARSE)  # image, rows, columns, row, column
    smooth = _smoothing(_COARSE, _WIDE)
    low = (small @ smooth.T).view(-1, _COARSE, _COARSE).transpose(1, 2).reshape(-1, _COARSE) @ smooth.T
    detail = small.view(-1, _COARSE**2) - low.view(-1, _COARSE, _COARSE).transpose(1, 2).flatten(1)
    detail = detail - detail.mean(1, keepdim=True)
    detail = detail / (detail.square().sum(1, keepdim=True) + _NOISE**2 * _COARSE**2).sqrt()
    return detail.view(len(images), count**2, _COARSE**2)


def _started(
    first: Float[Tensor, "p s s"], second: Float[Tensor, "p s s"]
) -> tuple[Float[Tensor, "p"], Float[Tensor, "p 2 3"], Bool[Tensor, "p"]]:
    """Return the best correlation over crops of either image and mirroring, the map, and whether it is mirrored."""
    spans = [(0.0, 1.0), *((place * (1 - _CROP), _CROP) for place in (0, 0.5, 1))]
    windows = [(0, 0), *((row, column) for row in (1, 2, 3) for column in (1, 2, 3))]
    mine, theirs = (_described(images, spans) for images in (first, second))
    near, maps = [], []
    for mirrored in (False, True):
        other = theirs.unflatten(2, (_COARSE, _COARSE)).flip(-1).flatten(2) if mirrored else theirs
        for row, column in windows:
            across = 4 - column if mirrored and column else column
            near += [(mine[:, row * 4 + column] * other[:, 0]).sum(1), (mine[:, 0] * other[:, row * 4 + across]).sum(1)]
            side, left, top = spans[column][1], *(2 * spans[at][0] + spans[at][1] - 1 for at in (column, row))
            maps.append([[1 / side, 0, -left / side], [0, 1 / side, -top / side]])  # the second is a crop of the first
            maps.append([[side, 0, left], [0, side, top]])
    best, at = torch.stack(near, 1).max(1)
    return best, torch.tensor(maps)[at], at >= len(near) // 2


def _aligned(
    first: Float[Tensor, "p s s"], second: Float[Tensor, "p s s"], maps: Float[Tensor, "p 2 3"], steps: int
) -> Float[Tensor, "p 2 3"]:
    """Return the maps for which the second image, with another contrast and brightness, is most like the first.

    Pixels that differ much weigh little (Cauchy's weights), so that a text laid over one image moves nothing.
    """
    side = first.shape[-1]
    smooth = _smoothing(side, 1.0)
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
    smooth = _smoothing(first.shape[-1], _FINE)
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
    noise_a, noise_b = (_NOISE**2 * area / x for x in sums)
    check = ab / ((aa + noise_a) * (bb + noise_b)).sqrt()
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    share = inside.mean((1, 2))
    overlap = torch.minimum(share, share * (width * height).abs())
    least, most = _SCALES
    plausible = (torch.minimum(width, height) >= least) & (torch.maximum(width, height) <= most)
    plausible &= torch.maximum(width / height, height / width) <= _STRETCH
    plausible &= (maps[:, 0, 1].abs() <= _TURN) & (maps[:, 1, 0].abs() <= _TURN)
    return torch.where(plausible & (overlap >= _OVERLAP), check, -1.0).nan_to_num(-1.0)
