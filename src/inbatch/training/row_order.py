"""Rows and samples of a step between the order of its batch and that of its context groups, over all ranks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inbatch.batch import MIXED, Batch, Rows
from inbatch.runtime import distributed
from inbatch.training import grad_cache

Orders = Sequence[Tensor | None]
"""For each view, the permutation of the batch while its groups run; None is the batch's own order."""


def samples_of_all_ranks(batch: Batch) -> Batch | None:
    """Return the samples of all ranks if this rank has all their pixels (resident images, or one rank), else None."""
    if distributed.world() == 1:
        return batch
    if batch.crops is not None or (batch.images is not None and batch.at is None):
        return None

    whole = without_pixels(batch)
    return replace(whole, images=batch.images, at=gathered(batch.at), size=gathered(batch.size),
                   attempt=gathered(batch.attempt))  # fmt: skip


def gathered(x: Tensor | None) -> Tensor | None:
    """Return the entries of all ranks; None for None."""
    return None if x is None else distributed.gather(x)


def without_pixels(batch: Batch, own: bool = False) -> Batch:
    """Return the samples of all ranks, or own ones, without their images."""
    if own:
        return Batch(batch.index, batch.label, batch.seed, batch.epoch, group=batch.group, same=batch.same,
                     bank=batch.bank)  # fmt: skip
    index, label = distributed.gather(batch.index), distributed.gather(batch.label)
    group, same = gathered(batch.group), gathered(batch.same)
    return Batch(index, label, batch.seed, batch.epoch, group=group, same=same, bank=batch.bank)


def compared_rows(forward: grad_cache.GroupForward, orders: Orders, own: bool) -> Rows:
    """Return the rows that the loss reads, in the order of the batch: of all samples, or of own ones."""
    back = [None if order is None else order.argsort() for order in orders]
    return {name: moved_rows(x, orders_of(name, back), own) for name, x in forward.rows.items()}


def moved_rows(x: Tensor, orders: Orders, own: bool) -> Tensor:
    """Return own rows (V, B, D), or their gradients, permuted among all ranks; those of all ranks unless `own`."""
    if own and all(order is None for order in orders):
        return x
    whole = rearranged(distributed.gather(x, dim=1), orders)
    return distributed.local_shard(whole, 1) if own else whole


def returned_gradient(gradient: Tensor, orders: Orders, own: bool) -> Tensor:
    """Return the gradient of own rows in the order of their groups, times the number of ranks, for the wrapper's mean.

    The gradient of a loss of own rows has this factor already (`nn.batch_sums`).
    """
    if own:
        return moved_rows(gradient, orders, own)
    return distributed.local_shard(rearranged(gradient, orders), 1) * distributed.world()


def orders_of(name: str, orders: Orders) -> Orders:
    """Return the permutations of the views of these rows; the rows of mixed images have none."""
    return [] if name.startswith(MIXED) else orders


def rearranged(x: Tensor, orders: Orders) -> Tensor:
    """Reorder (V, N, D): apply to each view its permutation of the samples."""
    if all(order is None for order in orders):
        return x
    return torch.stack([view if order is None else view[order] for view, order in zip(x, orders, strict=True)])
