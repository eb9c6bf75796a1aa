"""Decoded data sets in the disk cache: the next run on the same files memory-maps them instead of decoding them."""

import hashlib
import json
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data import cache
from inbatch.data.decoding.image_file import decoders
from inbatch.data.source import Source
from inbatch.runtime.files import to_json
from inbatch.runtime.thread_map import thread_map

WORTH = 2.0
"""Minimum decoding time in seconds of a cached set; caching faster ones would fill the disk without saving time."""

_FORMAT = 3
_BLOCK = 2**24  # bytes per checksum


class Decoded(NamedTuple):
    """Contents of a cached set; the fields are those of `resident.Resident`.

    Attributes:
        images: (N, C, H, W) uint8.
        size: (N, 2), height and width in pixels.
        missing: (image number, reason) of the images left out.
        scaled: Number of images that were scaled down.
    """

    images: UInt8[Tensor, "n c h w"]
    size: Int[Tensor, "n 2"]
    missing: Sequence[tuple[int, str]]
    scaled: int


def place(source: Source, canvas: int | None) -> Path | None:
    """Return the path of the decoded set, which may not exist yet; None if the set must not be cached."""
    root = cache.where()
    if root is None or not cache.limit() or (fingerprint := source.fingerprint()) is None:
        return None
    what = json.dumps([_FORMAT, fingerprint, canvas, source.channels, source.levels, decoders(), sys.byteorder])
    return root / hashlib.sha256(what.encode()).hexdigest()


def load(path: Path) -> tuple[Decoded | None, str]:
    """Load a cached set as a memory map and verify its checksums.

    Returns:
        The set, or None if it is not cached or damaged; and a sentence on its origin or on the problem.
    """
    try:
        if not path.is_dir():
            return None, ""
        kept = _read(path)
    except PermissionError as error:
        return None, f"not cached: {path.parent} is another user's ({error.strerror})"
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        if not path.is_dir():  # removed by another run in the meantime
            return None, ""
        cache.remove(path)
        return None, f"decoded again: the cache entry {path} is damaged ({error})"
    with suppress(OSError):
        os.utime(path / "entry.json")
    return kept, f"from the cache, {path}"


def store(path: Path, kept: Decoded, name: str) -> str:
    """Cache a set, removing other sets if space is needed; return a sentence on the result; errors are not raised."""
    needed = kept.images.numel() + 8 * len(kept.size)
    return cache.write_entry(path, needed, lambda folder: _write(folder, kept, name))


def _read(path: Path) -> Decoded:
    note = json.loads((path / "entry.json").read_text("utf-8"))
    n, c, h, w = shape = [int(side) for side in note["shape"]]
    if min(shape) < 1:
        raise ValueError(f"no images have the shape {shape}")
    flat = _mapped(path / "images.u8", math.prod(shape))
    sizes = _mapped(path / "sizes.i32", 8 * n)
    if list(_checksums(flat)) != note["images"] or list(_checksums(sizes)) != note["sizes"]:
        raise ValueError("a checksum differs")
    missing = [(int(number), str(why)) for number, why in note["missing"]]
    size = sizes.view(torch.int32).view(n, 2).long()
    # the view kernels rely on this and do not check it again
    if not ((size >= 1) & (size <= torch.tensor([h, w]))).all():
        raise ValueError("an image is larger than its canvas")
    return Decoded(flat.view(n, c, h, w), size, missing, int(note["scaled"]))


def _write(folder: Path, kept: Decoded, name: str) -> None:
    note = {"name": name, "shape": list(kept.images.shape), "missing": list(kept.missing), "scaled": kept.scaled}
    sizes = kept.size.to(torch.int32).contiguous().view(-1).view(torch.uint8)
    for key, file, flat in (("images", "images.u8", kept.images.view(-1)), ("sizes", "sizes.i32", sizes)):
        with open(folder / file, "xb") as opened:
            for block in _blocks(flat):
                opened.write(block.data)
        note[key] = list(_checksums(flat))
    (folder / "entry.json").write_text(to_json(note), "utf-8", errors="backslashreplace")


def _mapped(file: Path, size: int) -> UInt8[Tensor, "m"]:
    if file.stat().st_size != size:  # reading a map longer than its file would kill the process
        raise ValueError(f"{file.name} holds {file.stat().st_size:,} bytes, not {size:,}")
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)


def _blocks(flat: UInt8[Tensor, "m"]) -> list[np.ndarray]:
    return [block.numpy() for block in flat.split(_BLOCK)]


def _checksums(flat: UInt8[Tensor, "m"]) -> Iterator[int]:
    """Compute one CRC-32 per block.

    At 7 GB/s per core, the whole set is verified and in memory before training starts.
    """
    return thread_map(lambda block: zlib.crc32(block.data), _blocks(flat))
