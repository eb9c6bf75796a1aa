"""Weights of pairs of rows, as functions of the indices of a tile: no matrix of all weights is held."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PairWeights(Protocol):
    """Weight w_ij >= 0 of every pair of a query i and a key j; 0 leaves the pair out."""

    def tile(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return the weights of some queries and keys, the same on every call and on every rank.

        Non-zero weights should lie between 1e-6 and 1e6: logits are checked for overflow without them.
        """
        ...


@runtime_checkable
class PassingWeights(PairWeights, Protocol):
    """Weights that follow from tensors with an entry for every query and every key, also for keys of other ranks."""

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """Return the tensors of the keys."""
        ...

    def among(self, rows: slice, keys: Sequence[Tensor]) -> PairWeights:
        """Return the weights of some queries and of the keys to which these tensors belong."""
        ...


@dataclass(frozen=True)
class SameGroup:
    """Weights of `weight` for pairs of the same group (frames of one video, crops of one slide) and of 1 for others.

    Attributes:
        q_ids: group of every query.
        k_ids: group of every key; the object `q_ids` itself if the keys are the queries, which halves the work.
        weight: of pairs in one group; 0 leaves them out.
    """

    q_ids: Int[Tensor, "n"]
    k_ids: Int[Tensor, "m"]
    weight: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for a weight below 0 or ids that are not integers."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"a weight of {self.weight:g} has no logarithm: it must be finite and at least 0")
        if any(x.is_floating_point() or x.is_complex() or x.ndim != 1 for x in (self.q_ids, self.k_ids)):
            raise ValueError("the ids of groups must be one integer per row")

    def check_rows(self, n: int, m: int) -> None:
        """Raise ValueError unless there is an id for each of n queries and m keys."""
        if (len(self.q_ids), len(self.k_ids)) != (n, m):
            raise ValueError(f"{n} queries and {m} keys need as many ids, got {len(self.q_ids)} and {len(self.k_ids)}")

    @property
    def symmetric(self) -> bool:
        """Return whether w_ij = w_ji by construction."""
        return self.k_ids is self.q_ids

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """Return the groups of the keys."""
        return (self.k_ids,)

    def among(self, rows: slice, keys: Sequence[Tensor]) -> "SameGroup":
        """Return the weights of some queries and of other keys, by their groups."""
        return SameGroup(self.q_ids[rows], keys[0], self.weight)

    def tile(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return the weights of these queries and keys, in float32."""
        same = self.q_ids[rows, None] == self.k_ids[columns]
        return same.float().mul_(self.weight - 1).add_(1)


def multiplier(weights: PairWeights, dtype: torch.dtype) -> Callable[[Tensor, slice, slice, Tensor], Tensor]:
    """Return a function that multiplies a tile by its weights in place: (tile, rows, columns, memory of a tile)."""
    if not isinstance(weights, SameGroup):
        return lambda e, rows, columns, spare: e.mul_(weights.tile(rows, columns).detach())
    return group_multiplier(weights, weights.weight, dtype)


def group_multiplier(
    groups: SameGroup, factor: float, dtype: torch.dtype
) -> Callable[[Tensor, slice, slice, Tensor], Tensor]:
    """Return a function as of `multiplier` that multiplies pairs of one group by a factor of any sign."""
    # Numbers of the groups, exact in floating point, of which torch compares tiles five times as fast as of integers.
    n = len(groups.q_ids)
    numbers = torch.cat([groups.q_ids, groups.k_ids]).unique(return_inverse=True)[1].to(dtype)
    mine, theirs = numbers[:n], numbers[n:]

    def multiply(e: Tensor, rows: slice, columns: slice, spare: Tensor) -> Tensor:
        torch.ne(mine[rows, None], theirs[columns], out=spare)
        if factor:
            spare.mul_(1 - factor).add_(factor)
        return e.mul_(spare)

    return multiply
