"""Interface of view operations, and selection of images within a batch without branches on an accelerator."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "n c h w"]
PerImage = Float[Tensor, "n"]


class Operation(ABC):
    """Operation on n float32 images in [0, 1].

    `settings_of` converts uniform draws to settings, one row per image. A call applies the settings and may overwrite
    the images. The first setting, kind, states which images change (0: unchanged); images are sorted by it, so that
    images with the same treatment are adjacent.
    """

    draws: int
    """Random numbers per image."""

    @abstractmethod
    def settings_of(self, u: Float[Tensor, "n draws"]) -> tuple[Tensor, ...]: ...

    __call__: Callable[..., Tensor]
    """(images (n, C, h, w), *settings) -> images."""


def can_branch(x: Tensor) -> bool:
    """Return whether the program may branch on tensor values; an accelerator would have to synchronise."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def idle(kind: Tensor) -> bool:
    """Return True if it is known that no image is to be changed."""
    return can_branch(kind) and not bool(kind.any())


def select(on: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` for images with `on` (n,), else `old`."""
    if can_branch(on) and bool(on.all()):
        return new
    return torch.where(on.view(-1, *[1] * (new.ndim - 1)), new, old)


def per_image(x: Tensor) -> Tensor:
    """Reshape (n,) to (n, 1, 1, 1)."""
    return x[:, None, None, None]


def uniform_in(u: Tensor, low: float, high: float) -> Tensor:
    """Scale draws from [0, 1) to [low, high)."""
    return low + (high - low) * u
