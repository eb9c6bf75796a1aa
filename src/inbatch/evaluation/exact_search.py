"""Exact search for the nearest rows by cosine similarity, in tiles: memory does not grow with the number of rows.

The result does not depend on tiles, threads or libraries. Unit rows are rounded to multiples of 2^-26, so that products
of two numbers are multiples of 2^-52 and sums of them, up to 2, are exact in float64 in any order. Products in float32
select candidates, products in float64 order them. If the rounding of float32 could have excluded a neighbour, the query
is repeated in float64.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import DIVERGED, ConfigError, DataError, check_whole
from inbatch.evaluation.knn import largest
from inbatch.evaluation.selected_rows import AnyRows
from inbatch.nn.cpu_matmul import fast_products

_QUERIES, _BANK = 512, 1 << 15  # similarities in memory at a time: 64 MB
_MORE = 16  # candidates in addition to k
_EXACT = 1 << 23  # numbers of candidates in memory at a time: 96 MB in both precisions
_GRID = 2.0**26
_NORMED = 256  # rows whose lengths are computed at a time: float64 doubles their memory


@torch.no_grad()
def unit_rows(vectors: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    """Return the rows divided by their length, rounded to multiples of 2^-26; rows of zeros stay zero.

    Raises:
        DataError: If a value is not finite.
    """
    rows = vectors.float()
    if not rows.sum().isfinite() and not rows.isfinite().all():
        raise DataError(f"the features hold NaN or infinity: {DIVERGED}")
    units = torch.empty_like(rows)
    for part, out in zip(rows.split(_NORMED), units.split(_NORMED), strict=True):
        length = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64).clamp_(min=1e-12)
        torch.div(part, length.float(), out=out).mul_(_GRID).round_().div_(_GRID)
    return units


def check(k: int, most: int, query: AnyRows, bank: AnyRows) -> None:
    """Raise ConfigError unless k is in 1 to `most`, and DataError if the rows have different widths."""
    check_whole("k", k)
    if query.shape[1] != bank.shape[1]:
        raise DataError(
            f"the features have {query.shape[1]} and {bank.shape[1]} numbers per image: use features of one encoder"
        )
    if not 0 < k <= most:
        raise ConfigError(f"k = {k} neighbours cannot be taken from {most} images: choose 1 to {most}")


def search(
    query: AnyRows, bank: AnyRows, k: int, own: Int[Tensor, "q"] | None = None
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return the exact neighbours of `nearest`; `own` is the row of each query in the bank, which is left out."""
    available = len(bank) - (own is not None)
    least, place = _candidates(query, bank, min(k + _MORE, available), own)
    similarity, place = ordered(query, bank, place, k)
    if k + _MORE >= available:
        return similarity, place
    rounding = (query.shape[1] + 8) * 2.0**-24  # bound of the error of a product in float32, in any order of its sum
    doubt = (similarity[:, -1] <= least + rounding).nonzero()[:, 0]
    for at in doubt.split(_QUERIES):
        similarity[at], place[at] = _in_float64(query[at], bank, k, None if own is None else own[at])
    return similarity, place


def _tiles(bank: AnyRows) -> Iterator[tuple[int, Tensor]]:
    """Yield the first position and the unit rows of each part of the bank: each row of a mapped bank is read once."""
    for start in range(0, len(bank), _BANK):
        yield start, unit_rows(bank[start : start + _BANK])


def _products(rows: Tensor, tile: Tensor, start: int, own: Tensor | None) -> Tensor:
    """Return the similarities to a part of the bank, -inf to the own row."""
    with fast_products():
        products = rows @ tile.T
    if own is not None:
        column = own - start
        here = ((column >= 0) & (column < len(tile))).nonzero()[:, 0]
        products[here, column[here]] = -torch.inf
    return products


def _candidates(query: AnyRows, bank: AnyRows, count: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the positions of the `count` nearest rows of each query in float32, in no order, and their smallest."""
    near = torch.full((len(query), count), -torch.inf)
    place = torch.zeros(len(query), count, dtype=torch.long)
    for start, tile in _tiles(bank):
        for first in range(0, len(query), _QUERIES):
            at = slice(first, first + _QUERIES)
            products = _products(unit_rows(query[at]), tile, start, None if own is None else own[at])
            values, places = largest(products, min(count, len(tile)))
            values, places = torch.cat([near[at], values], 1), torch.cat([place[at], places + start], 1)
            near[at], chosen = values.topk(count, sorted=False)
            place[at] = places.gather(1, chosen)
    return near.amin(1), place


def ordered(
    query: AnyRows, bank: AnyRows, place: Int[Tensor, "q n"], k: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return the similarities and positions of the k nearest of the rows at `place`, in the order of `nearest`.

    Negative positions stand for no row: their similarity is -inf.
    """
    similarity, chosen = torch.empty(len(query), k), torch.empty(len(query), k, dtype=torch.long)
    for at in torch.arange(len(query)).split(max(1, _EXACT // (place.shape[1] * query.shape[1]))):
        places = place[at].sort(dim=1).values
        rows = unit_rows(bank[places.clamp(min=0).flatten()]).view(*places.shape, -1)
        exact = (rows.double() @ unit_rows(query[at]).double()[:, :, None])[:, :, 0].float()
        exact.masked_fill_(places < 0, -torch.inf)
        values, order = exact.sort(dim=1, descending=True, stable=True)
        similarity[at], chosen[at] = values[:, :k], places.gather(1, order[:, :k])
    return similarity, chosen


def _in_float64(query: Tensor, bank: AnyRows, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the neighbours from exact products with all rows."""
    rows = unit_rows(query).double()
    near, place = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
    for start, tile in _tiles(bank):
        products = _products(rows, tile.double(), start, own).float()
        places = torch.arange(start, start + len(tile)).expand(len(query), -1)
        near, place = torch.cat([near, products], 1), torch.cat([place, places], 1)
        chosen = _first_largest(near, min(k, near.shape[1]))
        near, place = near.gather(1, chosen), place.gather(1, chosen)
    near, order = near.sort(dim=1, descending=True, stable=True)
    return near, place.gather(1, order)


def _first_largest(x: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest numbers of each row, from left to right; of equal ones the first."""
    least = x.topk(k, dim=1).values[:, -1:]
    above, equal = x > least, x == least
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(len(x), k)
