"""Random numbers per image: the same in any batch, on any device."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.rng import uniform


@dataclass(frozen=True)
class Chance:
    """Draws for N images, keyed by (seed, index of the image, stream); different streams are independent.

    Attributes:
        seed: seed of all draws.
        index: (N,) int64, each image's number in its data set.
    """

    seed: int
    index: Int[Tensor, "n"]

    def uniform(self, stream: int, *shape: int) -> Float[Tensor, "n ..."]:
        """Return numbers in [0, 1), (N, *shape) float32."""
        drawn = uniform(self.seed, 0, self.index, stream, math.prod(shape))
        return drawn.view(len(self.index), *shape)

    def normal(self, stream: int, *shape: int) -> Float[Tensor, "n ..."]:
        """Return standard normal numbers, (N, *shape) float32 (Box and Muller, 1958)."""
        length, turn = self.uniform(stream, 2, *shape).unbind(1)
        return (-2 * (1 - length).log()).sqrt() * torch.cos(2 * math.pi * turn)
