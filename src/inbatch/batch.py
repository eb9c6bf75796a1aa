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
    """B samples. Every random draw made for them is a pure function of (seed, epoch, index, view).

    index: (B,) int64, the sample's number in its data set.
    label: (B,) int64, -1 where unknown.
    images: (B, C, H, W) uint8; image i fills the top left `size[i]` pixels, the rest is padding. None when
        the images do not travel (after the seam) or the workers have cropped already.
    size: (B, 2) int64, height and width of each image in pixels.
    crops: one (B, C, h, w) uint8 tensor per view, when the workers cropped; `boxes` are where.
    boxes: (V, B, 4) int64, top, left, height, width of each crop in pixels of its image.
    """

    index: Tensor
    label: Tensor
    seed: int = 0
    epoch: int = 0
    images: Tensor | None = None
    size: Tensor | None = None
    crops: tuple[Tensor, ...] | None = None
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, places: Tensor) -> "Batch":
        """The samples at these places of the batch."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[places]

        return replace(
            self,
            index=self.index[places],
            label=self.label[places],
            images=pick(self.images),
            size=pick(self.size),
            crops=None if self.crops is None else tuple(crop[places] for crop in self.crops),
            boxes=None if self.boxes is None else self.boxes[:, places],
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; pinned memory is copied without waiting."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            index=self.index.to(device, non_blocking=True),
            label=self.label.to(device, non_blocking=True),
            images=move(self.images),
            size=move(self.size),
            crops=None if self.crops is None else tuple(c.to(device, non_blocking=True) for c in self.crops),
            boxes=move(self.boxes),
        )
