"""Views by the compiled kernel: where it can be had, what it knows, and how threads share its work."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from inbatch.data.views.colour import LUMINANCE, Grey, Jitter, Solarise
from inbatch.data.views.filters import Blur
from inbatch.data.views.operation import Operation
from inbatch.data.views.view import View
from inbatch.errors import DataError

_KNOWN = (Jitter, Grey, Blur, Solarise)
"""What the kernel does after crop and flip, in this order."""
_APART = 2**16
"""From so many values on, threads are worth waking."""
_PIECES = 4
"""Pieces per thread: some images take longer than others."""


@functools.cache
def available() -> bool:
    """Whether views can be drawn by the compiled kernel here: it needs numba, and a numba that takes this NumPy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def knows(steps: Sequence[Operation]) -> bool:
    """Whether the kernel can do all these operations."""
    return all(isinstance(step, _KNOWN) for step in steps)


def draw_views(
    view: View,
    steps: Sequence[Operation],
    settled: Sequence[tuple[Tensor, ...]],
    pixels: UInt8[Tensor, "m c h w"],
    source: Int[Tensor, "n"] | None,
    boxes: Int[Tensor, "n 4"],
    flip: Bool[Tensor, "n"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "n c s s"]:
    """Box i of image source[i], or (source None) the ready crop i, mirrored where `flip`, then every step with its
    settings, normalised. An image's view does not depend on the others, nor on how many threads there are.

    Raises DataError where a box lies outside of its image.
    """
    from inbatch.data.views import numba_kernel

    n, channels = len(flip), pixels.shape[1]
    if source is None:
        source, boxes = torch.arange(n), torch.tensor([0, 0, view.size, view.size]).expand(n, 4)
    elif not pixels.is_contiguous():
        pixels, source = pixels.index_select(0, source), torch.arange(n)
    _check(pixels, source, boxes)
    off, none = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    does = {type(step): drawn for step, drawn in zip(steps, settled, strict=True)}
    kind, factors, turns, order = does.get(Jitter, (none, torch.ones(n, 3), torch.zeros(n), none.expand(3, n).T))
    (grey,), (solarised,) = does.get(Grey, (off,)), does.get(Solarise, (off,))
    blurred, sigma = does.get(Blur, (off, torch.ones(n)))
    luma = torch.tensor(LUMINANCE if channels == 3 else [1 / channels] * channels)

    out = torch.empty(n, channels, view.size, view.size)
    per_image = (source, boxes, flip, kind, factors, turns, order, grey, blurred, sigma, solarised)
    shift, scale = (torch.tensor(x, dtype=torch.float32) for x in (mean, std))
    arrays = [x.contiguous().numpy() for x in (pixels, *per_image, luma, shift, scale)]
    plain = view.threshold, view.taps if Blur in does else 0, view.interpolation == "bicubic"

    def work(start: int) -> None:
        numba_kernel.draw(*arrays, *plain, start, min(start + piece, n), out.numpy())

    threads = torch.get_num_threads() if out.numel() >= _APART else 1
    piece = max(1, n if threads == 1 else -(-n // (threads * _PIECES)))
    starts = range(0, n, piece)
    list(map(work, starts) if threads == 1 else _pool(os.getpid(), threads).map(work, starts))
    return out


def _check(pixels: Tensor, source: Tensor, boxes: Tensor) -> None:
    """The kernel reads what it is told to."""
    top, left, height, width = boxes.unbind(1)
    rows, columns = pixels.shape[2:]
    inside = (torch.minimum(top, left) >= 0) & (torch.minimum(height, width) > 0)
    inside &= (top + height <= rows) & (left + width <= columns) & (source >= 0) & (source < len(pixels))
    if not inside.all():
        i = int(inside.long().argmin())
        raise DataError(
            f"View {i} is to be cut from image {int(source[i])} at (top, left, height, width) {boxes[i].tolist()}, but "
            f"there are {len(pixels)} images of at most {rows} x {columns} pixels. Check the batch's sizes and places."
        )


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The process's own, because a fork has no threads. A run may change their number: old pools end."""
    return ThreadPoolExecutor(threads, "views")
