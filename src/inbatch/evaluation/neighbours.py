"""Exact nearest neighbours of features by cosine similarity, in tiles: memory does not grow with the number of rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import ConfigError, DataError, check_whole
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime.isolation import usual_numerics

_QUERIES, _BANK = 512, 1 << 15  # similarities in memory at a time: 64 MB


def unit_rows(vectors: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    """Return the rows divided by their length; rows of zeros stay zero.

    Raises:
        DataError: If a value is not finite.
    """
    rows = vectors.float()
    if not rows.sum().isfinite() and not rows.isfinite().all():
        raise DataError("the features hold NaN or infinity: the encoder has diverged")
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-12)


@usual_numerics()
@torch.no_grad()
def nearest(
    query: Float[Tensor, "q f"], bank: Float[Tensor, "m f"], k: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return the similarities and positions of the k rows of the bank that are nearest to each query, nearest first.

    Of rows with equal similarity, those at lower positions come first.

    Args:
        query: Vectors of any length.
        bank: Vectors of any length, for example memory-mapped.
        k: Number of neighbours, 1 to M.

    Raises:
        ConfigError: If k is not in 1 to M.
        DataError: If the vectors have different widths, or if a value is not finite.
    """
    _check(k, len(bank), query, bank)
    return _search(query, bank, k, excluded=None)


@usual_numerics()
@torch.no_grad()
def nearest_others(vectors: Float[Tensor, "n f"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return the similarities and positions of the k other rows that are nearest to each row, as `nearest`.

    Raises:
        ConfigError: If k is not in 1 to N - 1.
        DataError: If a value is not finite.
    """
    _check(k, len(vectors) - 1, vectors, vectors)
    return _search(vectors, vectors, k, excluded=torch.arange(len(vectors)))


def _check(k: int, most: int, query: Tensor, bank: Tensor) -> None:
    check_whole("k", k)
    if query.shape[1] != bank.shape[1]:
        raise DataError(
            f"the features have {query.shape[1]} and {bank.shape[1]} numbers per image: use features of one encoder"
        )
    if not 0 < k <= most:
        raise ConfigError(f"k = {k} neighbours cannot be taken from {most} images: choose 1 to {most}")


def _search(query: Tensor, bank: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor]:
    similarity = torch.full((len(query), k), -torch.inf)
    place = torch.zeros(len(query), k, dtype=torch.long)
    with fast_products():
        for start in range(0, len(bank), _BANK):  # each row of a mapped bank is read once
            tile = unit_rows(bank[start : start + _BANK])
            for at in torch.arange(len(query)).split(_QUERIES):
                products = unit_rows(query[at[0] : at[-1] + 1]) @ tile.T
                if excluded is not None:
                    own = excluded[at] - start
                    here = (own >= 0) & (own < len(tile))
                    products[here.nonzero()[:, 0], own[here]] = -torch.inf
                near, where = products.topk(min(k, len(tile)), dim=1)
                merged = torch.cat([similarity[at], near], 1)
                places = torch.cat([place[at], where + start], 1)
                order = _ordered(merged, places)[:, :k]
                similarity[at], place[at] = merged.gather(1, order), places.gather(1, order)
    return similarity, place


def _ordered(similarity: Tensor, place: Tensor) -> Tensor:
    """Return the order by falling similarity, then by rising position."""
    first = place.argsort(dim=1, stable=True)
    return first.gather(1, similarity.gather(1, first).argsort(dim=1, descending=True, stable=True))
