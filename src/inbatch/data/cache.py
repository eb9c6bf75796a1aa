"""Folders of the disk cache: decoded data sets (`decoded_cache`), and file lists of large folders (`sources`).

An entry is one folder, named by a hash of everything that its content depends on. It holds data and a JSON file;
nothing in it is executed when it is read. A folder is written under a temporary name and renamed when it is complete,
so several runs can share the cache; its writer holds a lock, so that what a dead one left is replaced at once.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inbatch.errors import ConfigError
from inbatch.runtime.paths import path_of, variable
from inbatch.runtime.unfinished import remove_abandoned, unfinished_folder

_DEFAULT_GB = 10.0
_STALE = 3600  # seconds since the last write after which a folder counts as abandoned, without locks
_SPARE = 2**24  # bytes that stay free on the disk
# errors of a rename whose target exists
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY} | ({errno.EACCES} if os.name == "nt" else set())
_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """Cached data set or file list.

    Attributes:
        path: Folder of the entry.
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
    setting = variable("INBATCH_CACHE")
    if setting.lower() == "off":
        return None
    if setting:
        return path_of(setting, "INBATCH_CACHE").absolute()
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
    setting = variable("INBATCH_CACHE_GB") or _DEFAULT_GB
    try:
        size = float(setting)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise ConfigError(f"INBATCH_CACHE_GB is {setting!r}: give the size of the cache in GB, 0 for none")
    return int(size * 1e9)


def entries() -> list[Entry]:
    """Return the entries, least recently used first."""
    result = []
    for path in _folders(_NAME.fullmatch):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            size = sum(file.stat().st_size for file in os.scandir(path))
            note = path / "entry.json"
            result.append(Entry(path, str(json.loads(note.read_text("utf-8"))["name"]), size, note.stat().st_mtime))
    return sorted(result, key=lambda entry: entry.used)


def used() -> int:
    """Return the size of the cache in bytes."""
    return sum(entry.bytes for entry in entries())


def clear() -> int:
    """Remove all entries, except those that are being written; return the number of bytes freed."""
    before = used()
    for path in _folders(_NAME.fullmatch):
        remove(path)
    for path in _folders(_is_temporary):
        if remove_abandoned(path) is None:
            remove(path)
    return before - used()


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
        _evict(needed)
        if (free := shutil.disk_usage(root).free) < needed + _SPARE:
            return f"not cached: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free in {root}"
        temporary = root / f".{path.name}.tmp"
        with unfinished_folder(temporary) as acquired:
            if not acquired:
                return f"being cached in {root} by another process"
            write(temporary)
            if replace:
                remove(path)
            os.rename(temporary, path)
    except OSError as error:
        if error.errno in _TAKEN and path.is_dir():
            return f"cached in {root} by another process"
        if error.errno == errno.ENOENT and root.is_dir():  # another process took the folder before it was locked
            return f"being cached in {root} by another process"
        return f"not cached: {root} cannot be written ({error.strerror or error})"
    return f"cached in {path}"


def remove(path: Path) -> None:
    """Remove an entry; processes that have mapped it keep their data if the cache is on a local disk."""
    if _NAME.fullmatch(path.name):
        # Renamed first, so that no process reads a part of it. The ids avoid a clash with a writer and other threads.
        away = path.with_name(f".{path.name}.{os.getpid()}{threading.get_native_id()}.tmp")
        try:
            os.rename(path, away)
        except OSError:  # a read-only folder, or Windows while another run has the set mapped
            return
        path = away
    shutil.rmtree(path, ignore_errors=True)


def _folders(wanted: Callable[[str], object]) -> list[Path]:
    """Return the folders in the cache whose name the cache could have written; other files are never touched."""
    root = where()
    with suppress(OSError):  # missing, or owned by another user
        return [path for path in root.iterdir() if wanted(path.name)] if root is not None else []
    return []


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r"\.[0-9a-f]{64}(\.\d+)?\.tmp", name) is not None


def _evict(needed: int) -> None:
    """Remove abandoned folders, then the least recently used sets, until `needed` bytes are available."""
    for path in _folders(_is_temporary):
        if remove_abandoned(path) is not None:
            continue
        with suppress(OSError):  # a file system without locks
            if time.time() - max(file.stat().st_mtime for file in (path, *path.iterdir())) > _STALE:
                remove(path)
    cached = entries()
    filled = sum(entry.bytes for entry in cached)
    for entry in cached:
        if filled + needed <= limit():
            break
        remove(entry.path)
        filled -= entry.bytes
