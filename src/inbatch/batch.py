"""What travels: a batch of images, the rows made of it, the losses made of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Head name -> (V, N, D): one row per view per sample."""

Losses = dict[str, Tensor]
"""Scalars by name; "loss" is the one to minimise, the others are its parts, for the log."""


@dataclass(frozen=True)
class Batch:
    """B samples. Every random draw made for them is a pure function of (seed, epoch, index, view, attempt).

    index: (B,) int64, the sample's number in its data set.
    label: (B,) int64, -1 where unknown.
    images: (B, C, H, W) uint8; image i fills the top left `size[i]` pixels, the rest is padding. None when
        the images do not travel (after the seam) or the workers have cropped already.
    at: (B,) int64, where in `images` each sample's image lies: then they are those of the whole data set, of which a
        batch need not be copied. None: in the order of the samples.
    size: (B, 2) int64, height and width of each image in pixels.
    crops: one (B, C, h, w) uint8 tensor per view, when the workers cropped; `boxes` are where.
    boxes: (V, B, 4) int64, top, left, height, width of each crop in pixels of its image.
    attempt: (B,) int64, which draw of its views each sample gets; None: the first, 0, of all.
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

    def __len__(self) -> int:
        return len(self.index)

    def take(self, places: Tensor | slice) -> "Batch":
        """The samples at these places of the batch; of a slice nothing is copied."""

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
        )

    def pictures(self) -> Tensor | None:
        """The samples' own images, (B, C, H, W), in their order."""
        return self.images if self.at is None or self.images is None else self.images[self.at]

    def split(self, size: int) -> list["Batch"]:
        """The samples in pieces of `size`, the last maybe smaller."""
        return [self.take(slice(first, first + size)) for first in range(0, len(self), size)]

    def to(self, device: torch.device | str, pixels: bool = True) -> "Batch":
        """The same batch on a device, with or without its images and crops; pinned memory is copied without waiting."""

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
        )
