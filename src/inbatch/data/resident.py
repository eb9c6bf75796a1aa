"""Small sets live decoded on the device; this decides which are small, and decodes them once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.source import Source, Subset
from inbatch.errors import DataError
from inbatch.machine import cores

SHARE = 0.25
"""Of the free memory, at most this much is given to the images."""

_CHUNK = 64  # images a thread decodes in one go


@dataclass(frozen=True)
class Resident:
    """A decoded source.

    images: (N, C, H, W) uint8; where sizes differ, image i fills the top left `size[i]` pixels, the rest is 0.
    size: (N, 2) int64, height and width. source: the N images kept (unreadable ones are left out).
    dropped: one sentence per image left out. scaled: how many were scaled down to fit the canvas.
    """

    images: UInt8[Tensor, "n c h w"]
    size: Int[Tensor, "n 2"]
    source: Source
    dropped: tuple[str, ...] = ()
    scaled: int = 0


def decode_all(
    source: Source,
    device: torch.device | str = "cpu",
    *,
    canvas: int | None = None,
    max_bad: float = 0.01,
    threads: int | None = None,
) -> Resident:
    """Decode every image to uint8 on the device, those with a longer side over `canvas` pixels scaled down to it.

    Unreadable images are left out and named in `dropped`; DataError if they are more than the share `max_bad`.
    """

    def decode(numbers: range) -> list[tuple[Tensor, bool] | str]:
        out: list[tuple[Tensor, bool] | str] = []
        for i in numbers:
            try:
                with source.open(i) as picture:
                    large = canvas is not None and max(picture.size) > canvas
                    out.append((picture.tensor(canvas), large))
            except DataError as e:
                out.append(str(e))
        return out

    parts = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    with ThreadPoolExecutor(threads or cores()) as pool:
        decoded = list(chain.from_iterable(pool.map(decode, parts)))
    dropped = tuple(d for d in decoded if isinstance(d, str))
    if len(dropped) > max_bad * len(source) or len(dropped) == len(source):
        few = "; ".join(dropped[:3])
        raise DataError(
            f"{len(dropped):,} of {len(source):,} images of {source.name} cannot be read "
            f"(at most {max_bad:.0%} may be left out): {few}"
        )
    kept = source
    if dropped:
        numbers = torch.tensor([i for i, d in enumerate(decoded) if not isinstance(d, str)])
        kept = Subset(source, numbers, f"{len(dropped):,} cannot be read")
    good = [d for d in decoded if not isinstance(d, str)]
    size = torch.tensor([pixels.shape[1:] for pixels, _ in good])
    images = stack([pixels for pixels, _ in good], size)
    return Resident(images.to(device), size.to(device), kept, dropped, sum(large for _, large in good))


def estimate(source: Source, canvas: int, probes: int = 64) -> int:
    """Bytes the decoded source would fill, judged by the headers of a few evenly spaced images."""
    height = width = 1
    for i in range(0, len(source), max(1, len(source) // probes)):
        try:
            with source.open(i) as picture:
                scale = min(1.0, canvas / max(picture.size))
                height = max(height, round(picture.size[0] * scale))
                width = max(width, round(picture.size[1] * scale))
        except DataError:  # counted when the images are decoded
            continue
    return len(source) * source.channels * height * width


def stack(pixels: list[Tensor], size: Int[Tensor, "n 2"]) -> UInt8[Tensor, "n c h w"]:
    """Images of these sizes in one tensor, each in the top left corner."""
    if (size == size[0]).all():
        return torch.stack(pixels)
    height, width = size.amax(0).tolist()
    out = torch.zeros(len(pixels), pixels[0].shape[0], height, width, dtype=torch.uint8)
    for canvas, image in zip(out, pixels, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return out
