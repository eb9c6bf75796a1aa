"""What an operation on views is, and how it changes some images of a batch without asking which."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "n c h w"]
PerImage = Float[Tensor, "n"]


class Operation(ABC):
    """An operation on n float32 images in [0, 1]: `settle` turns uniform draws into its settings, one row per image;
    a call applies these and may overwrite the images. The first setting, kind, says which images change (0: not this
    one) and orders the images that want the same done next to each other."""

    draws: int
    """Random numbers per image."""

    @abstractmethod
    def settle(self, u: Float[Tensor, "n draws"]) -> tuple[Tensor, ...]: ...

    __call__: Callable[..., Tensor]
    """(images (n, C, h, w), *settings) -> images."""


def can_ask(x: Tensor) -> bool:
    """Whether the program may branch on values: an accelerator would have to wait for them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def idle(kind: Tensor) -> bool:
    """True if it is known that no image is to be changed."""
    return can_ask(kind) and not bool(kind.any())


def select(on: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new where `on` (n,), else old."""
    if can_ask(on) and bool(on.all()):
        return new
    return torch.where(on.view(-1, *[1] * (new.ndim - 1)), new, old)


def per_image(x: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return x[:, None, None, None]


def uniform_in(u: Tensor, low: float, high: float) -> Tensor:
    """Draws from [0, 1) moved to [low, high)."""
    return low + (high - low) * u
