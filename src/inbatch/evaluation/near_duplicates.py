"""Candidates of near duplicates by grey thumbnails of 32 x 32 bytes, and groups of confirmed ones.

A thumbnail is the whole image without its aspect ratio. `thumbnail_alignment` confirms candidates.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from inbatch.evaluation.neighbours import nearest
from inbatch.evaluation.selected_rows import AnyRows
from inbatch.runtime.isolation import usual_numerics

SIDE = 32
"""Side of a thumbnail in pixels."""

COARSE = 16
"""Side of a descriptor in pixels."""

CROP = 0.85
"""Side of the crops from which candidates and alignments start, as a fraction of the image."""

NOISE = 1.0
"""Grey values: detail below it, such as that of JPEG in a sky, does not count."""

ALIKE = 0.65
"""Least correlation of the descriptors of two images that are compared because of them."""

_LUMA = (0.299, 0.587, 0.114)
_WIDE = 3.0  # pixels of a descriptor: standard deviation of what is not detail
_QUERIES = 1 << 16  # images whose neighbours are searched at a time
_CHUNK = 4096  # thumbnails described at a time
_CORNERS = tuple((row * (1 - CROP), column * (1 - CROP), CROP) for row in (0, 1) for column in (0, 1))
_QUERIED = ((0.0, 0.0, 1.0), ((1 - CROP) / 2, (1 - CROP) / 2, CROP), *_CORNERS)


def thumbnail(image: UInt8[Tensor, "*n c s s"]) -> UInt8[Tensor, "*n s s"]:
    """Return the grey values of images; of images with other than three channels, their mean."""
    values = image.float()
    colour = values.shape[-3] == 3
    grey = (values * values.new_tensor(_LUMA)[:, None, None]).sum(-3) if colour else values.mean(-3)
    return grey.round_().clamp_(0, 255).byte()


def descriptors(
    thumbnails: AnyRows, window: tuple[float, float, float] = (0.0, 0.0, 1.0), mirrored: bool = False
) -> Float[Tensor, "n 256"]:
    """Return vectors whose product is the correlation of the detail of two images that are not aligned.

    Args:
        thumbnails: Images.
        window: Top, left and side of the square part to describe, as fractions of the image.
        mirrored: Describe the mirror images.
    """
    top, left, side = window
    rows = torch.empty(len(thumbnails), COARSE**2)  # not a list of parts, which would take twice the memory
    for start, part in zip(range(0, len(rows), _CHUNK), rows.split(_CHUNK), strict=True):
        values = thumbnails[start : start + _CHUNK].float()
        part.copy_(described(values.flip(-1) if mirrored else values, [(top, side)], [(left, side)])[:, 0])
    return rows


@usual_numerics()
@torch.no_grad()
def similar_pairs(thumbnails: AnyRows, k: int, index: str = "exact") -> tuple[Int[Tensor, "p 2"], Float[Tensor, "p"]]:
    """Return pairs of images that may be near duplicates, the lower position first, and their correlation.

    The candidates of an image are the k images nearest to it, to its crops at the corners and in the middle, and to
    the mirror images of all of these.

    Args:
        thumbnails: (N, 32, 32) grey values.
        k: Number of candidates of each image, at most N - 1.
        index: As in `neighbours.nearest`.

    Raises:
        ConfigError: For another index, or if the library of the index is not installed.
    """
    bank = descriptors(thumbnails)
    search = _search(bank, index)
    pairs, values = [torch.zeros(0, 2, dtype=torch.long)], [torch.zeros(0)]
    for start in range(0, len(thumbnails), _QUERIES):
        queries = thumbnails[start : start + _QUERIES]
        for window in _QUERIED:
            for mirrored in (False, True):
                near, place = search(descriptors(queries, window, mirrored), min(k + 1, len(bank)))
                own = torch.arange(start, start + len(queries))[:, None].expand_as(place)
                alike = (near >= ALIKE) & (own != place)
                pairs.append(torch.stack([own[alike], place[alike]], 1))
                values.append(near[alike])
    return unique_pairs(torch.cat(pairs), torch.cat(values))


def _search(bank: Tensor, index: str) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Return the function that searches neighbours in a bank; an approximate index is built once."""
    if index == "approximate":
        from inbatch.evaluation.neighbour_index import NeighbourIndex

        return NeighbourIndex.build(bank).nearest
    return lambda query, k: nearest(query, bank, k, index=index)


def unique_pairs(
    pairs: Int[Tensor, "p 2"], values: Float[Tensor, "p"]
) -> tuple[Int[Tensor, "q 2"], Float[Tensor, "q"]]:
    """Return each pair once, in order and with the lower position first, and the largest value of it."""
    count = int(pairs.max()) + 1 if len(pairs) else 1
    keys, place = (pairs.amin(1) * count + pairs.amax(1)).unique(return_inverse=True)  # rows would take 8 times as long
    each = torch.stack([keys // count, keys % count], 1)
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
    sizes = part.bincount()
    images = ((sizes > 2) & (sizes <= most))[part].nonzero()[:, 0]
    images = images[part[images].argsort(stable=True)]
    groups = images.split(part[images].unique_consecutive(return_counts=True)[1].tolist())
    known = {tuple(pair) for pair in pairs.sort(1).values.tolist()}
    more = [pair for group in groups for pair in combinations(group.tolist(), 2) if pair not in known]
    return torch.tensor(sorted(more), dtype=torch.long).view(-1, 2)


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


def smoothing(side: int, deviation: float) -> Float[Tensor, "s s"]:
    """Return the matrix of a Gaussian filter of a line of pixels."""
    place = torch.arange(side).float()
    weights = torch.exp(-((place[:, None] - place).square()) / (2 * deviation**2))
    return weights / weights.sum(1, keepdim=True)


def _resampling(start: float, part: float) -> Float[Tensor, "o s"]:
    """Return the weights with which pixels between two places of a line, 0 to 1, are averaged to a descriptor's."""
    edges = torch.linspace(start * SIDE, (start + part) * SIDE, COARSE + 1)
    centre, width = (edges[1:] + edges[:-1]) / 2, max(1.0, part * SIDE / COARSE)
    weights = (1 - (torch.arange(SIDE) + 0.5 - centre[:, None]).abs() / width).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def described(
    images: Float[Tensor, "n s s"], rows: list[tuple[float, float]], columns: list[tuple[float, float]]
) -> Float[Tensor, "n w 256"]:
    """Return descriptors of the windows with one of the spans (start, part) of rows and one of columns each."""
    down, right = (torch.cat([_resampling(*span) for span in spans]) for spans in (rows, columns))
    across = (images.reshape(-1, SIDE) @ right.T).view(-1, SIDE, len(right))
    small = (across.transpose(1, 2).reshape(-1, SIDE) @ down.T).view(-1, len(columns), COARSE, len(rows), COARSE)
    small = small.permute(0, 3, 1, 4, 2).reshape(-1, COARSE)  # image, rows, columns, row, column
    smooth = smoothing(COARSE, _WIDE)
    low = (small @ smooth.T).view(-1, COARSE, COARSE).transpose(1, 2).reshape(-1, COARSE) @ smooth.T
    detail = small.reshape(-1, COARSE**2) - low.view(-1, COARSE, COARSE).transpose(1, 2).flatten(1)
    detail = detail - detail.mean(1, keepdim=True)
    detail = detail / (detail.square().sum(1, keepdim=True) + NOISE**2 * COARSE**2).sqrt()
    return detail.view(len(images), -1, COARSE**2)
