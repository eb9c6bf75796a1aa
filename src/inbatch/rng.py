"""Counter-based random numbers: a draw is a pure function of its key, so no random state is ever saved.

The same key gives the same numbers on every device, with any number of workers, ranks or resumes. The hash is
the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), applied once per part of the key.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(x: int) -> int:
    """Return the int64 with the same bits."""
    x &= _MASK
    return x - 2**64 if x >= 2**63 else x


def fold(*key: int) -> int:
    """Return one integer in [0, 2^63) for a key of integers: a seed for a generator, or the head of a longer key."""
    return _folded(*key) >> 1


def _folded(*key: int) -> int:
    state = 0
    for part in key:
        state = (state + part + 1) * _GOLDEN & _MASK
        state = (state ^ state >> 30) * _M1 & _MASK
        state = (state ^ state >> 27) * _M2 & _MASK
        state ^= state >> 31
    return state


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 to int64 bits (masks turn the arithmetic shift into a logical one)."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(_M1)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(_M2)
    return x ^ (x >> 31 & (1 << 33) - 1)


def head(seed: int, epoch: int, view: int, attempt: int | Int[Tensor, "*b"] = 0) -> int | Int[Tensor, "*b"]:
    """Return the hash of a key without its sample, for `uniform_from_hash`.

    Attempts on a device cause no synchronisation.
    """
    if isinstance(attempt, int):
        return fold(seed, epoch, view, attempt)
    state = _folded(seed, epoch, view)
    return _mix((attempt + _signed(state + 1)) * _signed(_GOLDEN)) >> 1 & (1 << 63) - 1


def uniform_from_hash(
    head: int | Int[Tensor, "..."], index: Int[Tensor, "..."], count: int
) -> Float[Tensor, "... count"]:
    """Return `count` float32 numbers in [0, 1) for every sample, given the hash of the rest of its key.

    Args:
        head: hash of the key without its sample, from `head`.
        index: number of each sample. The leading shape of the result is that of index + head.
        count: numbers per sample.
    """
    sample = _mix((index + 1) * _signed(_GOLDEN) + head)
    # 1, 2, ...; the shift keeps torch.compile from folding the product into an index that would not wrap around.
    place = (torch.arange(2, 2 * count + 2, 2, device=index.device) >> 1) * _signed(_GOLDEN)
    return (_mix(sample[..., None] + place) >> 40 & (1 << 24) - 1).float() * 2**-24


def uniform(
    seed: int, epoch: int, index: Int[Tensor, "b"], view: int, count: int, attempt: int | Int[Tensor, "b"] = 0
) -> Float[Tensor, "b count"]:
    """Return `count` float32 numbers in [0, 1) for every sample, keyed by (seed, epoch, sample, view, attempt)."""
    return uniform_from_hash(head(seed, epoch, view, attempt), index, count)


def permutation(seed: int, epoch: int, n: int) -> Int[Tensor, "n"]:
    """Return the order in which an epoch visits its n samples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold(seed, epoch)))
