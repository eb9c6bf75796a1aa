"""Views by the compiled kernel: its availability, the operations it supports, and its distribution over threads."""

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

_SUPPORTED = (Jitter, Grey, Blur, Solarise)
"""Operations that the kernel applies after crop and flip, in this order."""
_MIN_THREADED = 2**16
"""Minimum number of output values for which threads pay off."""
_PIECES = 4
"""Pieces per thread, since some images take longer than others."""


@functools.cache
def available() -> bool:
    """Return whether the compiled kernel is available: it needs a numba version that supports the installed NumPy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def supports(steps: Sequence[Operation]) -> bool:
    """Return whether the kernel supports all these operations."""
    return all(isinstance(step, _SUPPORTED) for step in steps)


def draw_views(
    view: View,
    steps: Sequence[Operation],
    settings: Sequence[tuple[Tensor, ...]],
    pixels: UInt8[Tensor, "m c h w"],
    source: Int[Tensor, "n"] | None,
    boxes: Int[Tensor, "n 4"],
    flip: Bool[Tensor, "n"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "n c s s"]:
    """Draw views: box i of image source[i], or the ready crop i, mirrored if `flip`, then all steps, normalised.

    The view of an image depends neither on the other images nor on the number of threads.

    Args:
        view: Parameters of the view.
        steps: Operations after crop and flip.
        settings: Settings of each step.
        pixels: Images, or ready crops.
        source: Image numbers; None if `pixels` are ready crops.
        boxes: Top, left, height and width in pixels.
        flip: Whether to mirror left to right.
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel.

    Raises:
        DataError: If a box is outside its image.
    """
    from inbatch.data.views import numba_kernel

    n, channels = len(flip), pixels.shape[1]
    if source is None:
        source, boxes = torch.arange(n), torch.tensor([0, 0, view.size, view.size]).expand(n, 4)
    elif not pixels.is_contiguous():
        pixels, source = pixels.index_select(0, source), torch.arange(n)
    _check(pixels, source, boxes)
    off, none = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    by_step = {type(step): drawn for step, drawn in zip(steps, settings, strict=True)}
    kind, factors, turns, order = by_step.get(Jitter, (none, torch.ones(n, 3), torch.zeros(n), none.expand(3, n).T))
    (grey,), (solarised,) = by_step.get(Grey, (off,)), by_step.get(Solarise, (off,))
    blurred, sigma = by_step.get(Blur, (off, torch.ones(n)))
    luma = torch.tensor(LUMINANCE if channels == 3 else [1 / channels] * channels)

    out = torch.empty(n, channels, view.size, view.size)
    per_image = (source, boxes, flip, kind, factors, turns, order, grey, blurred, sigma, solarised)
    shift, scale = (torch.tensor(x, dtype=torch.float32) for x in (mean, std))
    arrays = [x.contiguous().numpy() for x in (pixels, *per_image, luma, shift, scale)]
    plain = view.threshold, view.taps if Blur in by_step else 0, view.interpolation == "bicubic"

    def work(start: int) -> None:
        numba_kernel.draw(*arrays, *plain, start, min(start + piece, n), out.numpy())

    threads = torch.get_num_threads() if out.numel() >= _MIN_THREADED else 1
    piece = max(1, n if threads == 1 else -(-n // (threads * _PIECES)))
    starts = range(0, n, piece)
    list(map(work, starts) if threads == 1 else _pool(os.getpid(), threads).map(work, starts))
    return out


def _check(pixels: Tensor, source: Tensor, boxes: Tensor) -> None:
    """Raise DataError if a box is outside its image; the kernel does not check bounds."""
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
    """Return the thread pool of this process; a fork has no threads, and a changed thread count replaces the pool."""
    return ThreadPoolExecutor(threads, "views")
