"""Embedded data: scikit-learn's 1,797 real handwritten digits, each placed once on a small canvas.

Plain digits are too easy (raw-pixel k-NN reaches 98.8 %). Position, size, rotation, gain and noise, which carry no
class information, make raw pixels poor features. Digits over photographs invite a shortcut, and so does a different hue
per image: with even a soft tint per image, SimCLR's loss fell while its k-NN accuracy stayed at chance (9 to 14 %). The
colour variant therefore uses one palette for all images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from inbatch import rng
from inbatch.data.source import Reading, Source
from inbatch.data.sources.arrays import ArraySource
from inbatch.errors import DataError

_SEED = 1797
_TRAIN = 1297  # the first digits; the last 500 (by other writers) are the test split


def find_digits(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of `digits-canvas` and `digits-canvas-colour`; return None for anything else."""
    if not isinstance(data, str) or data not in _MAKERS:
        return None
    make = _MAKERS[data]

    def opener(part: slice) -> Callable[[], Source]:
        def open_split() -> Source:
            images, labels = make()
            if reading.channels not in (None, images.shape[1]):
                has = images.shape[1]
                raise DataError(
                    f"{data} has {has} channels, {reading.channels} were requested "
                    f"(a run with --set channels={has} reads them)"
                )
            return ArraySource(images[part], labels[part], tuple("0123456789"), data)

        return open_split

    return {"train": opener(slice(None, _TRAIN)), "test": opener(slice(_TRAIN, None))}


def _grey() -> tuple[UInt8[Tensor, "n 1 20 20"], Tensor]:
    """Create grey digits on a 20x20 canvas: gain 0.5 to 1, background 0 to 0.3, noise of standard deviation 0.05."""
    digits, labels = _digits()
    u = rng.uniform(_SEED, 0, torch.arange(len(digits)), 1, 2).double()
    gain, offset = 0.5 + 0.5 * u[:, :1, None], 0.3 * u[:, 1:, None]
    return _finish((offset + gain * _placed(digits, 20))[:, None]), labels


def _colour() -> tuple[UInt8[Tensor, "n 3 32 32"], Tensor]:
    """Create warm digits on a cold 32x32 canvas; both colours vary between images in brightness only."""
    digits, labels = _digits()
    u = rng.uniform(_SEED, 0, torch.arange(len(digits)), 2, 2).double()[:, :, None, None]
    background = (0.05 + 0.2 * u[:, :1]) * torch.tensor([0.5, 0.7, 1.0], dtype=torch.float64)[:, None, None]
    ink = (0.65 + 0.35 * u[:, 1:]) * torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)[:, None, None]
    cover = _placed(digits, 32)[:, None]
    return _finish(background * (1 - cover) + ink * cover), labels


_MAKERS = {"digits-canvas": _grey, "digits-canvas-colour": _colour}


def _digits() -> tuple[Float[Tensor, "n 8 8"], Tensor]:
    from sklearn.datasets import load_digits  # importing it takes a second, and few commands need it

    bunch = load_digits()
    return torch.from_numpy(bunch.images) / 16, torch.from_numpy(bunch.target).long()


def _placed(digits: Float[Tensor, "n 8 8"], side: int) -> Float[Tensor, "n side side"]:
    """Scale each digit by 1.25 to 2 (on 20 pixels), rotate it by up to 0.2 rad and place it anywhere it fits.

    Bilinear in float64 without torch's sampler, which rounds differently on different machines.
    """
    n = len(digits)
    u = rng.uniform(_SEED, 0, torch.arange(n), 0, 4).double()[:, :, None, None]
    scale = (1.25 + 0.75 * u[:, 0]) * side / 20
    angle = 0.4 * u[:, 1] - 0.2
    reach = (side - 8 * scale) / 2
    grid = torch.arange(side, dtype=torch.float64) + 0.5 - side / 2
    y = grid[:, None] - reach * (2 * u[:, 2] - 1)
    x = grid[None, :] - reach * (2 * u[:, 3] - 1)
    # One ring of zeros around the digit (10x10), so that everything outside is 0 after clamping.
    row = ((y * angle.cos() - x * angle.sin()) / scale + 4.5).clamp(0, 8.999)
    column = ((y * angle.sin() + x * angle.cos()) / scale + 4.5).clamp(0, 8.999)
    top, left = row.long(), column.long()
    dy, dx = row - top, column - left
    flat = torch.nn.functional.pad(digits, (1, 1, 1, 1)).flatten(1)

    def at(down: int, right: int) -> Tensor:
        return flat.gather(1, ((top + down) * 10 + left + right).flatten(1)).view(n, side, side)

    upper = at(0, 0) * (1 - dx) + at(0, 1) * dx
    lower = at(1, 0) * (1 - dx) + at(1, 1) * dx
    return upper * (1 - dy) + lower * dy


def _finish(images: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Add uniform noise of standard deviation 0.05 and convert to uint8."""
    n, *shape = images.shape
    noise = rng.uniform(_SEED, 0, torch.arange(n), 3, images[0].numel()).double().view(n, *shape) - 0.5
    return ((images + 0.05 * 12**0.5 * noise).clamp(0, 1) * 255).round().byte()
