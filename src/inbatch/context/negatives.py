"""Negatives of contrastive methods: near duplicates are left out, or false and hard ones are weighted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.batch import BankGroups, Batch
from inbatch.errors import ConfigError

Gather = Callable[[Tensor, int], Tensor]
"""Join every rank's part of a tensor along a dimension."""


@runtime_checkable
class Bank(Protocol):
    """Memory bank that keeps tags (`nn.memory_bank.MemoryBank`); only the first `filled` rows have some."""

    tags: Tensor
    filled: Tensor


THRESHOLD = 0.95
"""Default cosine from which on samples are near duplicates."""
_HELD = 2**22
"""Maximum number of similarities in memory at once, for batches of any size."""


def similar_groups(
    rows: Float[Tensor, "n d"], threshold: float, samples: int | None = None
) -> tuple[Int[Tensor, "n"], int]:
    """Return the group of each row, and the number of pairs with a similarity of at least the threshold.

    Only the first `samples` rows are compared, with each other and with the rest, by default all. The similarity is the
    cosine of the rows after the mean of those is subtracted. Groups are the connected components of the
    similar pairs, each numbered by its first sample: if A ~ B and B ~ C, all three are one group, so that no similar
    pair is divided. No N x N matrix is held; the result does not depend on the size of the pieces.
    """
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        n = len(rows) if samples is None else samples
        unit = torch.nn.functional.normalize(rows - rows[:n].mean(0), dim=1)
        group, pairs, piece = torch.arange(len(unit), device=rows.device), 0, max(1, _HELD // max(1, len(unit)))
        for first in range(0, n, piece):
            near = (unit[first : min(first + piece, n)] @ unit[first:].T >= threshold).triu(1)
            a, b = near.nonzero().add_(first).unbind(1)
            pairs += len(a)
            group = _joined(group, a, b)
        return group, pairs


def _joined(group: Int[Tensor, "n"], a: Int[Tensor, "p"], b: Int[Tensor, "p"]) -> Int[Tensor, "n"]:
    """Return the groups after those of each pair (a, b) are united; a group is the number of its first sample."""
    while not torch.equal(one := group[a], other := group[b]):
        group = group.scatter_reduce(0, one.maximum(other), one.minimum(other), "amin")
        while not torch.equal(root := group[group], group):
            group = root
    return group


def pairs_within(group: Int[Tensor, "n"]) -> int:
    """Return the number of pairs of samples with the same group."""
    sizes = group.unique(return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def pairs_between(group: Int[Tensor, "n"], other: Int[Tensor, "m"]) -> int:
    """Return the number of pairs of a sample and a row of a memory bank with the same group."""
    values, sizes = other.unique(return_counts=True)
    place = torch.searchsorted(values, group).clamp(max=len(values) - 1)
    return int(sizes[place].where(values[place] == group, 0).sum())


class DropSimilar:
    """Near duplicates within a batch (frames of a video, copies of a photograph) are never negatives of each other.

    by: "group" uses the known groups of the data (`group_column`), "features" the encoder's features of the whole,
        unchanged images; "auto" the known groups if the data have them.
    threshold: cosine of two samples' features, centred over the batch, from which on they are near duplicates.
    """

    tau_plus: float | None = None
    beta = 0.0

    def __init__(self, by: Literal["auto", "group", "features"] = "auto", threshold: float = THRESHOLD) -> None:
        if not 0 < threshold <= 1:
            raise ConfigError(f"negatives.threshold = {threshold:g} is a cosine: choose a number above 0, at most 1")
        self.by, self.threshold = by, threshold

    def prepare(self, embed: Callable[[Batch], Tensor] | None, bank: Bank | None = None) -> None:
        """Set what finds near duplicates.

        Args:
            embed: Function that returns the features (B, F) of the samples; None to use known groups.
            bank: Memory bank whose rows are negatives, too, and which keeps their features or groups.
        """
        self._embed, self._bank = embed, bank

    def embeds(self) -> bool:
        """Return whether every step embeds the whole images of its batch."""
        return self._embed is not None

    @torch.no_grad()
    def __call__(self, batch: Batch, gather: Gather, first: int) -> tuple[Batch, dict[str, float]]:
        """Return this rank's samples with `same`, and statistics; `first` is their position in the whole batch.

        The statistics are dropped_pairs, the pairs of samples that are not negatives, and with features similar_pairs,
        those of them that are near duplicates themselves, not only by others between them. Pairs of a sample and a row
        of the memory bank count, too.
        """
        figures: dict[str, float] = {}
        if self._embed is None:
            assert batch.group is not None
            tags = gather(batch.group, 0)
            if self._bank is not None:  # without a group, a sample is a near duplicate of its own earlier rows
                tags = tags.where(tags >= 0, -2 - gather(batch.index, 0))
            same = tags.where((tags >= 0) | (tags < -1), -1 - torch.arange(len(tags), device=tags.device))
            of_bank = None if self._bank is None else self._bank.tags
        else:
            tags = gather(self._embed(batch), 0)
            same, of_bank, similar = self._similar(tags)
            figures["similar_pairs"] = float(similar)
        dropped = pairs_within(same) + (0 if of_bank is None else pairs_between(same, of_bank))
        figures["dropped_pairs"] = float(dropped)
        bank = None if of_bank is None else BankGroups(of_bank, tags)
        return replace(batch, same=same[first : first + len(batch)], bank=bank), figures

    def _similar(self, rows: Tensor) -> tuple[Tensor, Tensor | None, int]:
        """Return the groups of the samples of these features and of the rows of the bank, and the similar pairs."""
        if self._bank is None:
            group, similar = similar_groups(rows, self.threshold)
            return group, None, similar
        n, held = len(rows), self._bank.tags[: int(self._bank.filled)].to(rows)
        group, similar = similar_groups(torch.cat([rows, held]), self.threshold, n)
        rest = torch.arange(n + len(held), n + len(self._bank.tags), device=rows.device)
        return group[:n], torch.cat([group[n:], rest]), similar


class Hard:
    """Hard negatives count more, and the sum over negatives is corrected for false ones (Robinson et al. 2021).

    tau_plus: probability that another sample is of the same class.
    beta: weight of hard negatives; 0 is `debias`.
    """

    def __init__(self, tau_plus: float = 0.1, beta: float = 1.0) -> None:
        if not 0 <= tau_plus < 1:
            raise ConfigError(f"negatives.tau_plus = {tau_plus:g} is a probability: choose a number from 0 to below 1")
        if not 0 <= beta < float("inf"):
            raise ConfigError(f"negatives.beta = {beta:g} must be finite and at least 0")
        self.tau_plus, self.beta = tau_plus, beta


class Debias(Hard):
    """The sum over negatives is corrected for those of the same class (Chuang et al. 2020).

    tau_plus: probability that another sample is of the same class.
    """

    def __init__(self, tau_plus: float = 0.1) -> None:
        super().__init__(tau_plus, 0.0)


NEGATIVES: dict[str, Any] = {"drop-similar": DropSimilar, "debias": Debias, "hard": Hard}
"""Name -> plug-in."""
