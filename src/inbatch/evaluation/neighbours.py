"""Nearest neighbours of features by cosine similarity: exact, or among the candidates of an index."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.exact_search import check, search, unit_rows
from inbatch.evaluation.neighbour_index import NeighbourIndex
from inbatch.evaluation.selected_rows import AnyRows
from inbatch.runtime.isolation import usual_numerics

__all__ = ["INDEXES", "NeighbourIndex", "check_index", "nearest", "nearest_others", "unit_rows"]

INDEXES = ("exact", "approximate")
"""How neighbours are searched: among all rows, or among the candidates of an index (extra `index`)."""


def check_index(index: str) -> str:
    """Return the name of an index; ConfigError if it is unknown."""
    if index not in INDEXES:
        raise ConfigError(f"unknown index {index!r}: choose {' or '.join(INDEXES)}")
    return index


@usual_numerics()
@torch.no_grad()
def nearest(
    query: Float[Tensor, "q f"], bank: Float[Tensor, "m g"], k: int, *, index: str = "exact"
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return the similarities and positions of the k rows of the bank that are nearest to each query, nearest first.

    Of rows with equal similarity, those at lower positions come first.

    Args:
        query: Vectors of any length.
        bank: Vectors of any length, for example memory-mapped.
        k: Number of neighbours, 1 to M.
        index: "exact", or "approximate" for `inbatch.evaluation.neighbour_index`: some neighbours are missed, the
            similarities of the others are exact.

    Raises:
        ConfigError: If k is not in 1 to M, for another index, or if the library of the index is not installed.
        DataError: If the vectors have different widths, or if a value is not finite.
    """
    check(k, len(bank), query, bank)
    if check_index(index) == "approximate":
        return NeighbourIndex.build(bank).nearest(query, k)
    return search(query, bank, k)


@usual_numerics()
@torch.no_grad()
def nearest_others(
    vectors: AnyRows, k: int, *, index: str = "exact"
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return the similarities and positions of the k other rows that are nearest to each row, as `nearest`.

    Raises:
        ConfigError: If k is not in 1 to N - 1, for another index, or if the library of the index is not installed.
        DataError: If a value is not finite.
    """
    check(k, len(vectors) - 1, vectors, vectors)
    if check_index(index) == "approximate":
        return NeighbourIndex.build(vectors).nearest_others(k)
    return search(vectors, vectors, k, own=torch.arange(len(vectors)))
