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

    They are the weights that the Triton kernels compute.

    Attributes:
        q_ids: group of every query.
        k_ids: group of every key; the object `q_ids` itself if the keys are the queries, which halves the work.
        weight: of pairs in one group; 0 leaves them out.
        q_class: class of every query: a pair of one group and one class has weight 1, too. None: without classes.
        k_class: class of every key.
    """

    q_ids: Int[Tensor, "n"]
    k_ids: Int[Tensor, "m"]
    weight: float = 0.0
    q_class: Int[Tensor, "n"] | None = None
    k_class: Int[Tensor, "m"] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a weight below 0 or ids that are not integers."""
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight {self.weight:g} must be finite and at least 0, because its logarithm is used")
        if (self.q_class is None) != (self.k_class is None):
            raise ValueError("classes are those of queries and keys, or of neither: pass both, or none")
        every = [x for x in (self.q_ids, self.k_ids, self.q_class, self.k_class) if x is not None]
        if any(x.is_floating_point() or x.is_complex() or x.ndim != 1 for x in every):
            raise ValueError("the ids of groups must be one integer per row")

    def check_rows(self, n: int, m: int) -> None:
        """Raise ValueError unless there is an id for each of n queries and m keys."""
        if (len(self.q_ids), len(self.k_ids)) != (n, m):
            raise ValueError(f"{n} queries and {m} keys need as many ids, got {len(self.q_ids)} and {len(self.k_ids)}")
        if self.q_class is not None and self.k_class is not None and (len(self.q_class), len(self.k_class)) != (n, m):
            got = f"{len(self.q_class)} and {len(self.k_class)}"
            raise ValueError(f"{n} queries and {m} keys need as many classes, got {got}")

    @property
    def symmetric(self) -> bool:
        """Return whether w_ij = w_ji by construction."""
        return self.k_ids is self.q_ids and self.k_class is self.q_class

    @property
    def flipped(self) -> "SameGroup":
        """Return the weights w_ji: of the keys with the queries."""
        return SameGroup(self.k_ids, self.q_ids, self.weight, self.k_class, self.q_class)

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """Return the groups of the keys, and their classes, if any."""
        return (self.k_ids,) if self.k_class is None else (self.k_ids, self.k_class)

    def among(self, rows: slice, keys: Sequence[Tensor]) -> "SameGroup":
        """Return the weights of some queries and of other keys, by their groups and classes."""
        ids, kinds = keys[0], keys[1] if len(keys) > 1 else None
        return SameGroup(
            self.q_ids[rows], ids, self.weight, None if self.q_class is None else self.q_class[rows], kinds
        )

    def tile(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        """Return the weights of these queries and keys, in float32."""
        same = self.q_ids[rows, None] == self.k_ids[columns]
        if self.q_class is not None and self.k_class is not None:
            same &= self.q_class[rows, None] != self.k_class[columns]
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
    own, other = groups.q_class, groups.k_class

    def multiply(e: Tensor, rows: slice, columns: slice, spare: Tensor) -> Tensor:
        torch.ne(mine[rows, None], theirs[columns], out=spare)
        if own is not None and other is not None:
            spare.masked_fill_(own[rows, None] == other[columns], 1)
        if factor:
            spare.mul_(1 - factor).add_(factor)
        return e.mul_(spare)

    return multiply
