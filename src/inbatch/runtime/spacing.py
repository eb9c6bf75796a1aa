"""Evenly spaced positions in a list of any length."""

import torch
from jaxtyping import Int
from torch import Tensor

_EXACT = 2**24
"""Up to this length, float32 holds every position exactly."""


def spaced(length: int, most: int) -> Int[Tensor, "k"]:
    """Return at most `most` evenly spaced positions in a list, with the first and the last; all of them if they fit.

    They are computed in float32 as far as it is exact: recorded figures depend on these positions, of which float64 and
    integers give others for some lengths, such as 256 of 596.
    """
    count = min(most, length)
    if length <= _EXACT:
        return torch.linspace(0, length - 1, count, dtype=torch.float32).long()
    return torch.arange(count) * (length - 1) // max(1, count - 1)
