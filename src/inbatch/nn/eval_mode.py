"""Evaluation mode, and encoding of images in pieces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

PIECE = 32
"""Images that pass through an encoder at a time on a processor, whose caches larger batches exceed (docs/speed.md).

The number does not depend on the number of threads, because the last bits of features depend on it.
"""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable gradients; on exit, restore the mode of every submodule."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def in_pieces(encode: Callable[[Tensor], Tensor], images: Float[Tensor, "n c h w"]) -> Tensor:
    """Return the rows of images whose rows do not depend on each other; on a processor for `PIECE` images at a time."""
    if images.device.type != "cpu":
        return encode(images)
    return torch.cat([encode(piece) for piece in images.split(PIECE)])
