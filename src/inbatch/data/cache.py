"""Disk cache of decoded data sets: the next run on the same files memory-maps them instead of decoding them.

Each set has one folder, named by a hash of everything that its pixels depend on. It holds raw bytes and a JSON file;
nothing in it is executed when it is read. A folder is written under a temporary name and renamed when it is complete,
so several runs can share the cache; its writer holds a lock, so that what a dead one left is replaced at once. File
lists of large folders are cached in the same way (`sources.folder_scan`).
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from inbatch.data.decoding.image_file import decoders
from inbatch.data.source import Source
from inbatch.errors import ConfigError
from inbatch.runtime.files import to_json
from inbatch.runtime.paths import path_of, variable
from inbatch.runtime.thread_map import thread_map
from inbatch.runtime.unfinished import remove_abandoned, unfinished_folder

WORTH = 2.0
"""Minimum decoding time in seconds of a cached set; caching faster ones would fill the disk without saving time."""

_FORMAT = 3
_DEFAULT_GB = 10.0
_STALE = 3600  # seconds since the last write after which a folder counts as abandoned, without locks
_BLOCK = 2**24  # bytes per checksum
# errors of a rename whose target exists
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY} | ({errno.EACCES} if os.name == "nt" else set())
_NAME = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True)
class Entry:
    """Cached set.

    Attributes:
        path: Folder of the set.
        name: Name of its source.
        bytes: Size on disk.
        used: Time of the last read or write, in seconds since 1970.
    """

    path: Path
    name: str
    bytes: int
    used: float


def where() -> Path | None:
    """Return the cache directory: $INBATCH_CACHE or the user's; None if the variable is `off` or there is no home."""
    given = variable("INBATCH_CACHE")
    if given.lower() == "off":
        return None
    if given:
        return path_of(given, "INBATCH_CACHE").absolute()
    if sys.platform == "win32" and (local := variable("LOCALAPPDATA")):
        return Path(local) / "inbatch" / "cache"
    if (xdg := Path(variable("XDG_CACHE_HOME"))).is_absolute():
        return xdg / "inbatch"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "inbatch"


def limit() -> int:
    """Return the maximum size of the cache in bytes: $INBATCH_CACHE_GB, by default 10 GB.

    Raises:
        ConfigError: If the variable is not a number from 0.
    """
    given = variable("INBATCH_CACHE_GB") or _DEFAULT_GB
    try:
        size = float(given)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise ConfigError(f"INBATCH_CACHE_GB is {given!r}: give the size of the cache in GB, 0 for none")
    return int(size * 1e9)


def entries() -> list[Entry]:
    """Return the cached sets, least recently used first."""
    found = []
    for path in _ours(_NAME.fullmatch):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            size = sum(file.stat().st_size for file in os.scandir(path))
            note = path / "entry.json"
            found.append(Entry(path, str(json.loads(note.read_text("utf-8"))["name"]), size, note.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def used() -> int:
    """Return the size of the cache in bytes."""
    return sum(entry.bytes for entry in entries())


def clear() -> int:
    """Remove all cached sets, except those that are being written; return the number of bytes freed."""
    before = used()
    for path in _ours(_NAME.fullmatch):
        remove(path)
    for path in _ours(_half_written):
        if remove_abandoned(path) is None:
            remove(path)
    return before - used()


def place(source: Source, canvas: int | None) -> Path | None:
    """Return the path of the decoded set, which may not exist yet; None if the set must not be cached."""
    root = where()
    if root is None or not limit() or (said := source.fingerprint()) is None:
        return None
    what = json.dumps([_FORMAT, said, canvas, source.channels, source.levels, decoders(), sys.byteorder])
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
        remove(path)
        return None, f"decoded again: the cache entry {path} is damaged ({error})"
    with suppress(OSError):
        os.utime(path / "entry.json")
    return kept, f"from the cache, {path}"


def store(path: Path, kept: Decoded, name: str) -> str:
    """Cache a set, removing other sets if space is needed; return a sentence on the result; errors are not raised."""
    needed = kept.images.numel() + 8 * len(kept.size)
    return write_entry(path, needed, lambda folder: _write(folder, kept, name))


def write_entry(path: Path, needed: int, write: Callable[[Path], None], *, replace: bool = False) -> str:
    """Create a cache entry: `write` fills a temporary folder, which is then renamed to `path`.

    Args:
        path: Final path of the entry.
        needed: Approximate size of the entry in bytes.
        write: Function that writes the files of the entry, including `entry.json` with a `name`, into the folder given.
        replace: Replace an existing entry instead of keeping it.

    Returns:
        A sentence that states whether and where the entry was cached, or why not.
    """
    root = path.parent
    if needed > limit():
        return f"not cached: its {needed / 1e6:,.0f} MB are over the limit of {limit() / 1e9:g} GB (INBATCH_CACHE_GB)"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(needed)
        if (free := shutil.disk_usage(root).free) < needed + _BLOCK:
            return f"not cached: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free in {root}"
        half = root / f".{path.name}.tmp"
        with unfinished_folder(half) as mine:
            if not mine:
                return f"being cached in {root} by another process"
            write(half)
            if replace:
                remove(path)
            os.rename(half, path)
    except OSError as error:
        if error.errno in _TAKEN and path.is_dir():
            return f"cached in {root} by another process"
        if error.errno == errno.ENOENT and root.is_dir():  # another process took the folder before it was locked
            return f"being cached in {root} by another process"
        return f"not cached: {root} cannot be written ({error.strerror or error})"
    return f"cached in {path}"


def remove(path: Path) -> None:
    """Remove a cached set; processes that have mapped it keep their data if the cache is on a local disk."""
    if _NAME.fullmatch(path.name):
        # Renamed first, so that no process reads a part of it. The process id avoids a clash with a writer's name.
        away = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            os.rename(path, away)
        except OSError:  # a read-only folder, or Windows while another run has the set mapped
            return
        path = away
    shutil.rmtree(path, ignore_errors=True)


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


def _ours(wanted: Callable[[str], object]) -> list[Path]:
    """Return the folders in the cache whose name the cache could have written; other files are never touched."""
    root = where()
    with suppress(OSError):  # missing, or owned by another user
        return [path for path in root.iterdir() if wanted(path.name)] if root is not None else []
    return []


def _half_written(name: str) -> bool:
    return re.fullmatch(r"\.[0-9a-f]{64}(\.\d+)?\.tmp", name) is not None


def _make_room(needed: int) -> None:
    """Remove abandoned folders, then the least recently used sets, until `needed` bytes are available."""
    for path in _ours(_half_written):
        if remove_abandoned(path) is not None:
            continue
        with suppress(OSError):  # a file system without locks
            if time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir())) > _STALE:
                remove(path)
    held = entries()
    filled = sum(entry.bytes for entry in held)
    for entry in held:
        if filled + needed <= limit():
            break
        remove(entry.path)
        filled -= entry.bytes
