"""Small data sets kept decoded on the device; images are decoded once or read from the cache."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data import cache, decoded_cache
from inbatch.data.decoded_cache import Decoded
from inbatch.data.decoding.image_file import REMARKS, ImageFile
from inbatch.data.source import Readable, Source
from inbatch.errors import DataError, many
from inbatch.runtime.thread_map import thread_map

SHARE = 0.25
"""Maximum fraction of the free memory that resident images may use."""

_CHUNK = 64  # images per decoding task of a thread
_PROBES = 64  # images whose headers are read to estimate the largest size


@dataclass(frozen=True)
class Resident:
    """Decoded source.

    Attributes:
        images: (N, C, H, W) uint8. If sizes differ, image i fills the top left `size[i]` pixels and the rest is 0.
        size: (N, 2) int64, height and width in pixels.
        source: The N images kept, without unreadable ones.
        dropped: One sentence per image left out.
        scaled: Number of images that were scaled down to fit the canvas.
        notes: Sentences on the origin of the pixels, on whether they are cached for the next run, and remarks about
            some images.
    """

    images: UInt8[Tensor, "n c h w"]
    size: Int[Tensor, "n 2"]
    source: Source
    dropped: tuple[str, ...] = ()
    scaled: int = 0
    notes: tuple[str, ...] = ()


def hold(
    source: Source, device: torch.device | str = "cpu", *, canvas: int | None = None, max_bad: float = 0.01
) -> Resident:
    """Return `decode_all` of the source, cached; sets that took less than `WORTH` seconds are not written."""
    # before decoding, so that files changed meanwhile do not get the key of the decoded ones
    path = decoded_cache.place(source, canvas)
    if path is None:
        return decode_all(source, device, canvas=canvas, max_bad=max_bad)
    kept, note = decoded_cache.load(path)
    if kept is not None and not _belongs(source, kept):
        cache.remove(path)
        kept, note = None, f"decoded again: the cache entry {path} is of other images"
    if kept is not None and any(_readable(source, number) for number, _ in kept.missing):
        cache.remove(path)
        kept, note = None, "decoded again: images that could not be read before can be read now"
    if kept is not None:
        check_dropped(source, kept.missing, max_bad)
        return _resident(source, kept, device, [note])
    notes = [note] if note else []
    began = time.perf_counter()
    kept, remarks = _decode_all(source, canvas, max_bad, None)
    notes += remarks
    if time.perf_counter() - began >= decoded_cache.WORTH:
        notes.append(decoded_cache.store(path, kept, source.name))
    return _resident(source, kept, device, notes)


def decode_all(
    source: Source,
    device: torch.device | str = "cpu",
    *,
    canvas: int | None = None,
    max_bad: float = 0.01,
    threads: int | None = None,
) -> Resident:
    """Decode every image to uint8 on the device; scale images down if their longer side exceeds `canvas` pixels.

    Args:
        source: Images to decode.
        device: Device of the result.
        canvas: Maximum longer side in pixels; None for no limit.
        max_bad: Maximum fraction of unreadable images.
        threads: Number of decoding threads, by default the number of CPU cores.

    Returns:
        The decoded images; unreadable ones are left out and named in `dropped`.

    Raises:
        DataError: If the fraction of unreadable images exceeds `max_bad`.
    """
    kept, notes = _decode_all(source, canvas, max_bad, threads)
    return _resident(source, kept, device, notes)


def _decode_all(source: Source, canvas: int | None, max_bad: float, threads: int | None) -> tuple[Decoded, list[str]]:
    """Return the decoded images, and sentences about some of them."""
    images = np.zeros((len(source), source.channels, *_largest(source, canvas)), np.uint8)
    sizes, missing, scaled, at = [], [], 0, 0
    remarks: Counter[str] = Counter()
    starts = range(0, len(source), _CHUNK)
    # Each part is copied to its position at once, so that no image is in memory twice.
    for part in thread_map(lambda first: _decode(source, first, canvas), starts, threads):
        n, _, h, w = part.images.shape
        if h > images.shape[2] or w > images.shape[3]:
            images = _grown(images, max(h, images.shape[2]), max(w, images.shape[3]))
        images[at : at + n, :, :h, :w] = part.images
        at += n
        sizes.append(part.size)
        missing += part.missing
        scaled += part.scaled
        remarks += part.remarks
    check_dropped(source, missing, max_bad)
    size = torch.cat(sizes)
    height, width = size.amax(0).tolist()
    images = np.ascontiguousarray(images[:at, :, :height, :width])
    return Decoded(torch.from_numpy(images), size, missing, scaled), [remark(key, n) for key, n in remarks.items()]


@dataclass
class _Part:
    images: np.ndarray
    size: Int[Tensor, "k 2"]
    missing: list[tuple[int, str]]
    scaled: int
    remarks: Counter[str]


def _decode(source: Source, first: int, canvas: int | None) -> _Part:
    pixels: list[Tensor] = []
    missing, scaled = [], 0
    remarks: Counter[str] = Counter()
    for i in range(first, min(first + _CHUNK, len(source))):
        try:
            with source.open(i) as picture:
                pixels.append(picture.tensor(canvas))
                scaled += canvas is not None and max(picture.size) > canvas
                remarks.update(picture.remarks() if isinstance(picture, ImageFile) else ())
        except DataError as e:
            missing.append((i, str(e)))
    if not pixels:
        return _Part(np.zeros((0, source.channels, 0, 0), np.uint8), torch.zeros(0, 2).long(), missing, 0, remarks)
    images, size = stack(pixels)
    return _Part(images.numpy(), size, missing, scaled, remarks)


def _grown(images: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.zeros((*images.shape[:2], height, width), np.uint8)
    out[:, :, : images.shape[2], : images.shape[3]] = images
    return out


def _resident(source: Source, kept: Decoded, device: torch.device | str, notes: Sequence[str] = ()) -> Resident:
    left = source
    if kept.missing:
        keep = torch.ones(len(source), dtype=torch.bool)
        keep[[number for number, _ in kept.missing]] = False
        left = Readable(source, keep.nonzero()[:, 0], f"{len(kept.missing):,} cannot be read")
    dropped = tuple(why for _, why in kept.missing)
    return Resident(kept.images.to(device), kept.size.to(device), left, dropped, kept.scaled, tuple(notes))


def _belongs(source: Source, kept: Decoded) -> bool:
    """Return whether every image of the source is present or listed as missing, exactly once."""
    missing = {number for number, _ in kept.missing}
    known = len(missing) == len(kept.missing) and all(0 <= number < len(source) for number in missing)
    return known and len(kept.images) + len(missing) == len(source) and kept.images.shape[1] == source.channels


def allowing(bad: int, count: int) -> float:
    """Return a short value of `max_unreadable` that allows this many unreadable images, but not all, of `count`."""
    # Above bad / count: of equal numbers, the product of the check may be rounded down.
    shares = ((math.floor(bad / count * 10**digits) + 1) / 10**digits for digits in range(3, 16))
    return next(share for share in shares if share < 1)


def check_dropped(source: Source, missing: Sequence[tuple[int, str]], max_bad: float) -> None:
    """Raise DataError if the unreadable images are more than the fraction `max_bad`, or all of the images."""
    if len(missing) > max_bad * len(source) or len(missing) == len(source):
        few = "; ".join(why for _, why in missing[:3])
        if len(missing) < len(source):
            few += f". --set max_unreadable={allowing(len(missing), len(source))} or more allows them"
        raise DataError(
            f"{len(missing):,} of {len(source):,} images of {source.name} cannot be read "
            f"(max_unreadable allows {100 * max_bad:g}%): {few}"
        )


def check_different(held: Resident) -> None:
    """Raise DataError if all images are identical; other sets usually end the comparison at the second image."""
    images = held.images
    if len(images) > 1 and all(torch.equal(images[0], images[i]) for i in range(1, len(images))):
        raise DataError(
            f"all {len(held.images):,} images of {held.source.name} are identical: at least two different images "
            "are needed"
        )


def remark(key: str, count: int) -> str:
    """Return the sentence of a remark about a number of images."""
    return REMARKS[key].format(many(count, "image"))


def _readable(source: Source, i: int) -> bool:
    try:
        source.image(i)
    except DataError:
        return False
    return True


def estimate(source: Source, canvas: int) -> int:
    """Return the size of the decoded source in bytes, estimated from the headers of some evenly spaced images."""
    return len(source) * source.channels * math.prod(_largest(source, canvas))


def resides(needed: int, free: int, resident: bool | None) -> bool:
    """Return whether images of `needed` bytes are kept on the device: as requested, else by the free memory."""
    return needed <= SHARE * free if resident is None else resident


def _largest(source: Source, canvas: int | None) -> tuple[int, int]:
    """Return the height and width that hold some evenly spaced images after scaling down to the canvas."""
    height = width = 1
    for i in range(0, len(source), max(1, len(source) // _PROBES)):
        try:
            with source.open(i) as picture:
                scale = 1.0 if canvas is None else min(1.0, canvas / max(picture.size))
                height = max(height, round(picture.size[0] * scale))
                width = max(width, round(picture.size[1] * scale))
        except DataError:  # counted when the images are decoded
            continue
    return height, width


def stack(pixels: list[Tensor]) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, "n 2"]]:
    """Stack images of any sizes in one tensor, each in the top left corner; return it with their heights and widths.

    NumPy copies here because torch's own threads wait for each other: decoding a set took 2 to 7 times as long with
    torch on busy cores.
    """
    arrays = [one.numpy() for one in pixels]
    shapes = np.array([one.shape for one in arrays])
    size = torch.from_numpy(shapes[:, 1:].astype(np.int64))
    if (shapes == shapes[0]).all():
        return torch.from_numpy(np.stack(arrays, out=np.empty((len(arrays), *arrays[0].shape), np.uint8))), size
    out = np.zeros((len(arrays), *shapes.max(0)), np.uint8)
    for canvas, image in zip(out, arrays, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return torch.from_numpy(out), size
