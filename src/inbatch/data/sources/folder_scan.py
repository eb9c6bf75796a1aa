"""Scan of a folder for images.

Slow scans are cached, and the next scan of the folder reads only the sub-folders that have changed since.
"""

import hashlib
import json
import os
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from inbatch.data import cache
from inbatch.data.decoding.signatures import reads_heif
from inbatch.data.sources.packed_names import Names
from inbatch.runtime.files import to_json
from inbatch.runtime.picture_mark import is_marked

HEIF = (b".heic", b".heif")
_ALWAYS = (b".jpg", b".jpeg", b".png", b".webp", b".tif", b".tiff", b".bmp", b".avif")
EXTENSIONS = (*_ALWAYS, *HEIF) if reads_heif() else _ALWAYS

WORTH = 2.0
"""Minimum time in seconds for reading folders before a scan is cached."""

_EVERY = 30.0  # seconds of reading between intermediate saves, from which an interrupted scan continues
_STABLE_AGE = 2 * 10**9  # nanoseconds; a folder may change again within one tick of its file system's clock
_FORMAT = 2
RUN_FILES = {b"run.json", b"recipe.json"}
"""Files by which a run directory is recognised; the pictures in one of an older version have no mark."""
RUNS, PICTURES = "run directory", "inbatch picture"
"""Keys of `Scan.skipped` for what inbatch itself wrote into the folder."""

Stamp = tuple[int, int, int, int]
"""State of a folder: device, inode number, modification time and metadata change time in nanoseconds."""


class Listing(NamedTuple):
    """Contents of one folder: sorted names of images and of sub-folders, separated by NUL.

    Attributes:
        stamp: State of the folder; None if it must be read again, because it had recently changed or has broken links.
        images: Names of the images.
        folders: Names of the sub-folders.
        skipped: Number of other files, by file extension, and of what inbatch wrote.
    """

    stamp: Stamp | None
    images: bytes | memoryview
    folders: bytes | memoryview
    skipped: dict[str, int]


@dataclass
class Scan:
    """Contents of a folder at any depth.

    Attributes:
        paths: Sorted image paths relative to the folder.
        folders: Paths of all folders relative to the folder, each with "/" at its end; the folder itself is empty.
        skipped: Number of files left out, by file extension, and of `RUNS` and `PICTURES`.
        unreadable: One sentence per folder that cannot be read.
        stamps: State of every folder; empty if not all of them are reliable.
        read: Number of folders that were read.
        kept: Number of folders taken from the cache.
    """

    paths: Names = field(default_factory=Names)
    folders: list[bytes] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    stamps: dict[bytes, Stamp] = field(default_factory=dict)
    read: int = 0
    kept: int = 0


_recent: WeakValueDictionary[str, Scan] = WeakValueDictionary()
"""Scans held by sources in use, by root; the next source of the same folder shares them."""


def scan(root: Path) -> Scan:
    """Find every image under a folder at any depth, except hidden files; symbolic links are followed once each.

    Paths are bytes with "/" as the separator, in the same order on every file system.
    """
    real = os.path.realpath(root)
    last = _recent.get(real)
    if last is not None and last.stamps and all(_unchanged(*one) for one in last.stamps.items()):
        return last
    place = _place(real)
    known = {} if place is None else _load(place)
    listings: dict[bytes, Listing] = {}
    result, began, saved = Scan(), time.perf_counter(), 0.0

    def keep(after: float) -> None:
        nonlocal saved
        if place is not None and time.perf_counter() - began - saved >= after:
            known.update(listings)
            _store(place, known, str(root))
            saved = time.perf_counter() - began

    try:
        for prefix, listing in _walk(root, known, result):
            listings[prefix] = listing
            if listing is not known.get(prefix):
                keep(_EVERY)
        if result.read:
            known.clear()  # folders that no longer exist
            saved = 0.0
            keep(WORTH)
    except KeyboardInterrupt:
        keep(WORTH)
        raise
    for listing in listings.values():
        result.skipped.update(listing.skipped)
    result.paths, result.folders = Names(_in_order(listings)), list(listings)
    _recent[real] = result
    return result


def _walk(root: Path, known: dict[bytes, Listing], result: Scan) -> Iterator[tuple[bytes, Listing]]:
    """Iterate over every folder by its path with a trailing "/"; counts are added to `result`."""
    seen: set[tuple[int, int]] = set()
    stack, whole = [(os.fsencode(root), b"")], True
    while stack:
        folder, prefix = stack.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was already scanned
                continue
            seen.add((status.st_dev, status.st_ino))
            listing = known.get(prefix)
            if listing is None or listing.stamp != _stamp(status):
                listing, result.read = _read(folder, status, inner=bool(prefix)), result.read + 1
            else:
                result.kept += 1
        except OSError as e:
            result.unreadable.append(f"{os.fsdecode(prefix) or root}: {e.strerror}")
            whole = False
            continue
        if listing.stamp is None:
            whole = False
        else:
            result.stamps[folder] = listing.stamp
        stack.extend((os.path.join(folder, name), prefix + name + b"/") for name in reversed(_split(listing.folders)))
        yield prefix, listing
    if not whole:
        result.stamps.clear()


def _read(folder: bytes, status: os.stat_result, inner: bool) -> Listing:
    """Return the contents of a folder; nothing if it is a run directory inside the scanned folder."""
    images, folders, skipped, broken, own = [], [], Counter[str](), False, set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if is_kind(entry.is_dir):
                folders.append(entry.name)
            elif extension in EXTENSIONS and is_kind(entry.is_file):
                if extension == b".png" and is_marked(entry.path):
                    skipped[PICTURES] += 1
                else:
                    images.append(entry.name)
            else:
                odd = " that are not files" if extension in EXTENSIONS else ""  # broken links, pipes, sockets
                skipped[(os.fsdecode(extension) or "no extension") + odd] += 1
                broken |= entry.is_symlink()  # its target may appear later without a change of the folder
                own |= RUN_FILES & {entry.name}
    if inner and own == RUN_FILES:
        images, folders, skipped = [], [], Counter({RUNS: 1})
    stable = max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _STABLE_AGE
    stamp = _stamp(status) if stable and not broken else None
    return Listing(stamp, b"\0".join(sorted(images)), b"\0".join(sorted(folders)), dict(sorted(skipped.items())))


def is_kind(kind: Callable[[], bool]) -> bool:
    """Return the result of an entry's type check; False if its links form a cycle."""
    try:
        return kind()
    except OSError:
        return False


def _in_order(listings: dict[bytes, Listing]) -> Iterator[bytes]:
    """Iterate over image paths in byte order; a folder sorts by its name with a trailing "/"."""
    stack = [(b"", iter(_keys(listings[b""])))] if listings else []
    while stack:
        prefix, keys = stack[-1]
        for key in keys:
            path = prefix + key
            if not key.endswith(b"/"):
                yield path
            elif path in listings:
                stack.append((path, iter(_keys(listings[path]))))
                break
        else:
            stack.pop()


def _keys(listing: Listing) -> list[bytes]:
    folders = [name + b"/" for name in _split(listing.folders)]
    return sorted(_split(listing.images) + folders) if folders else _split(listing.images)


def _split(names: bytes | memoryview) -> list[bytes]:
    return bytes(names).split(b"\0") if len(names) else []


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_dev & sys.maxsize, status.st_ino & sys.maxsize, status.st_mtime_ns, status.st_ctime_ns


def _unchanged(folder: bytes, stamp: Stamp) -> bool:
    with suppress(OSError):
        return _stamp(os.stat(folder)) == stamp
    return False


def _place(real: str) -> Path | None:
    """Return the cache path of a folder's scan, which may not exist yet; None if it must not be cached."""
    root = cache.where()
    if root is None or not cache.limit():
        return None
    what = json.dumps(["scan", _FORMAT, sys.byteorder, [os.fsdecode(e) for e in EXTENSIONS], real])
    return root / hashlib.sha256(what.encode()).hexdigest()


def _store(place: Path, listings: dict[bytes, Listing], name: str) -> None:
    numbers, skipped, needed = array("q"), {}, 0
    kept = [(prefix, one) for prefix, one in listings.items() if one.stamp is not None]
    for row, (prefix, one) in enumerate(kept):
        lengths = len(prefix), len(one.images), len(one.folders)
        numbers.extend((*(one.stamp or ()), *lengths))
        needed += sum(lengths)
        if one.skipped:
            skipped[str(row)] = one.skipped

    def write(folder: Path) -> None:
        checksum = 0
        with open(folder / "names.bin", "xb") as file:
            for prefix, one in kept:
                for part in (prefix, one.images, one.folders):
                    file.write(part)
                    checksum = zlib.crc32(part, checksum)
        (folder / "folders.i64").write_bytes(numbers.tobytes())
        note = {"name": name, "names": checksum, "folders": zlib.crc32(numbers), "skipped": skipped}
        (folder / "entry.json").write_text(to_json(note), "utf-8", errors="backslashreplace")

    cache.write_entry(place, needed + numbers.itemsize * len(numbers), write, replace=True)


def _load(place: Path) -> dict[bytes, Listing]:
    """Load a cached scan; return nothing if it is damaged, and remove it."""
    try:
        if not place.is_dir():
            return {}
        listings = _listings(place)
    except PermissionError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        cache.remove(place)
        return {}
    with suppress(OSError):
        os.utime(place / "entry.json")
    return listings


def _listings(place: Path) -> dict[bytes, Listing]:
    note = json.loads((place / "entry.json").read_text("utf-8"))
    numbers, text = array("q", (place / "folders.i64").read_bytes()), (place / "names.bin").read_bytes()
    if note["names"] != zlib.crc32(text) or note["folders"] != zlib.crc32(numbers):
        raise ValueError("a checksum differs")
    listings, at, names = {}, 0, memoryview(text)
    skipped = {int(row): {str(k): int(n) for k, n in kinds.items()} for row, kinds in note["skipped"].items()}
    for row in range(0, len(numbers), 7):
        a, b, c, d, *lengths = numbers[row : row + 7]
        ends = [at := at + length for length in lengths]
        prefix, images = bytes(names[ends[0] - lengths[0] : ends[0]]), names[ends[0] : ends[1]]
        listings[prefix] = Listing((a, b, c, d), images, names[ends[1] : ends[2]], skipped.get(row // 7, {}))
    if at != len(text):
        raise ValueError("the names end elsewhere")
    return listings
