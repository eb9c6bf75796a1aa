"""Data that passes between stages: a batch of images, the rows computed from it, and the losses of the rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Head name -> (V, N, D): one row per view per sample; MIXED + head name -> rows of mixed images."""
MIXED = "mixed."
"""Start of the names of rows of mixed images."""

Losses = dict[str, Tensor]
"""Scalars by name: "loss" is minimised, the others are its terms, for the log.

"state.NAME" is the next value of the method's buffer NAME, of its shape and without gradient: for a loss that uses the
updated value. The step stores it after the optimiser and does not log it.
"""

STATE = "state."


def loss_fault(losses: object, buffers: Mapping[str, Tensor]) -> str | None:
    """Return a sentence on what a method's `loss` returned if it is not `Losses` with a gradient; None if it is.

    buffers: The buffers of the method, for which it may return next values.
    """
    if not isinstance(losses, dict):
        return f"loss returns {type(losses).__name__}: return a dict with the scalar 'loss'"
    if "loss" not in losses:
        return f"loss returns a dict of {', '.join(map(repr, losses)) or 'nothing'}: the scalar 'loss' is missing"
    for name, x in losses.items():
        if not isinstance(name, str):
            return f"loss returns a value under {name!r}: names of terms are text"
        if name.startswith(STATE):
            buffer = buffers.get(name.removeprefix(STATE))
            if buffer is None or not isinstance(x, Tensor) or (x.shape, x.dtype) != (buffer.shape, buffer.dtype):
                return (
                    f"loss returns {name!r}, which is not the next value of a buffer: it must have the name, shape and "
                    "type of a buffer of the method"
                )
            if x.requires_grad:
                return f"loss returns {name!r} with its graph, which a buffer would keep: return it with detach()"
        elif not isinstance(x, Tensor) or x.shape != ():
            kind = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"loss returns {kind} for {name!r}: return scalar tensors, for example means"
    if not losses["loss"].requires_grad:
        return "the loss carries no gradient: compute it from the rows of the online network, without detach or no_grad"
    return None


def split_state(losses: Losses) -> tuple[Losses, dict[str, Tensor]]:
    """Return the scalars of a loss, and the next values of the method's buffers by the names of the buffers."""
    scalars = {name: x for name, x in losses.items() if not name.startswith(STATE)}
    return scalars, {name.removeprefix(STATE): x for name, x in losses.items() if name.startswith(STATE)}


@dataclass(frozen=True)
class BankGroups:
    """Near duplicates of the samples of a batch among the rows of a memory bank; equal on all ranks.

    Attributes:
        same: (L,) int64; a row of the bank is not a negative of the samples whose `Batch.same` is equal to its number.
        tags: (N,) or (N, F), what the bank keeps of the samples of the whole batch to find theirs in later steps.
    """

    same: Tensor
    tags: Tensor


REPEATED = 2**20
"""What each occurrence of an image in an epoch adds to the number of the draw of its views."""


@dataclass(frozen=True)
class Batch:
    """A batch of B samples.

    Every random draw made for the samples is a pure function of (seed, epoch, index, view, attempt).

    Attributes:
        index: (B,) int64, number of each sample in its data set.
        label: (B,) int64, -1 if unknown.
        seed: seed of the run.
        epoch: epoch of the batch.
        images: (B, C, H, W) uint8; image i fills the top left `size[i]` pixels, the rest is padding. None if the
            images are not needed any more (after the forward pass) or the workers have already cropped them.
        at: (B,) int64, position of each sample's image in `images`, which then holds the images of the whole data set,
            so that a batch need not be copied. None: `images` is in the order of the samples.
        size: (B, 2) int64, height and width of each image in pixels.
        crops: one (B, C, h, w) uint8 tensor per view if the workers cropped the images; `boxes` holds the positions.
        boxes: (V, B, 4) int64, top, left, height, width of each crop in pixels of its image.
        group: (B,) int64, known group of each sample (frames of one video), -1 if it has none. None: the data have no
            groups.
        same: (B,) int64; samples with equal numbers are never negatives of each other (the recipe's `negatives`). None:
            every other sample is a negative.
        bank: near duplicates among the rows of the method's memory bank. None: every row of it is a negative.
        attempt: (B,) int64, number of the draw of each sample's views: `REPEATED` for every earlier occurrence of its
            image in the epoch, and the number of redraws. None: 0, the first draw, for all samples.
    """

    index: Tensor
    label: Tensor
    seed: int = 0
    epoch: int = 0
    images: Tensor | None = None
    at: Tensor | None = None
    size: Tensor | None = None
    crops: tuple[Tensor, ...] | None = None
    boxes: Tensor | None = None
    attempt: Tensor | None = None
    group: Tensor | None = None
    same: Tensor | None = None
    bank: BankGroups | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, places: Tensor | slice) -> "Batch":
        """Return the samples at these positions of the batch; a slice copies nothing."""

        def where(x: Tensor) -> Tensor | slice:
            return places if isinstance(places, slice) else places.to(x.device)

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[where(x)]

        return replace(
            self,
            index=self.index[places],
            label=self.label[places],
            images=pick(self.images) if self.at is None else self.images,
            at=pick(self.at),
            size=pick(self.size),
            crops=None if self.crops is None else tuple(crop[where(crop)] for crop in self.crops),
            boxes=None if self.boxes is None else self.boxes[:, places],
            attempt=pick(self.attempt),
            group=pick(self.group),
            same=pick(self.same),
        )

    def pictures(self) -> Tensor | None:
        """Return the images of the samples, (B, C, H, W), in the order of the samples."""
        return self.images if self.at is None or self.images is None else self.images[self.at]

    def split(self, size: int) -> list["Batch"]:
        """Return the samples in pieces of `size`; the last piece may be smaller."""
        return [self.take(slice(first, first + size)) for first in range(0, len(self), size)]

    def to(self, device: torch.device | str, pixels: bool = True) -> "Batch":
        """Return the batch on a device, with or without images and crops; pinned memory is copied asynchronously."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            index=self.index.to(device, non_blocking=True),
            label=self.label.to(device, non_blocking=True),
            images=move(self.images) if pixels else self.images,
            at=move(self.at),
            size=move(self.size),
            crops=tuple(c.to(device, non_blocking=True) for c in self.crops) if self.crops and pixels else self.crops,
            boxes=move(self.boxes),
            attempt=move(self.attempt),
            group=move(self.group),
            same=move(self.same),
            bank=None if self.bank is None else BankGroups(self.bank.same.to(device), self.bank.tags.to(device)),
        )


@dataclass(frozen=True)
class Mixture:
    """The contents of M mixed images: each contains two samples of the batch.

    Attributes:
        positive: (2, M) int64, positions of the two samples in the batch.
        weight: (2, M), the share of each of them; the two sum to 1.
        candidates: "batch": a mixed row is compared with the keys of the whole batch; "own": with the key of one of its
            two samples at a time. Only a method with negatives from earlier batches knows the difference.
        temperature: that of the similarities of mixed rows; None is the method's.
    """

    positive: Tensor
    weight: Tensor
    candidates: Literal["batch", "own"] = "batch"
    temperature: float | None = None

    def blend(self, rows: Tensor) -> Tensor:
        """Return the weighted sum (M, D) of the rows of the two samples, for rows (N, D) of the batch."""
        return (self.weight[..., None] * rows[self.positive]).sum(0)

    def shared(self, losses: Tensor) -> Tensor:
        """Return the loss (M,) of each mixed image: of losses (2, M), those of its two samples by their shares."""
        return (self.weight * losses).sum(0)

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean over the mixed images of losses (2, M), one for each of the two samples, by their shares."""
        return self.shared(losses).mean()
