"""Files that hold many images, on a disk or behind a URL: opened, read in part, and checked for changes."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import BinaryIO, TypeVar

from inbatch.data.source import stat_fingerprint
from inbatch.errors import DataError
from inbatch.runtime.files import open_regular
from inbatch.runtime.remote import Url, open_url, reaching, read_range, state_of
from inbatch.runtime.thread_map import thread_map

AT_ONCE = 8
"""Files behind URLs that are described at once: the time is that of waiting for the network."""

Result = TypeVar("Result")


def place_of(shard: str | os.PathLike) -> str:
    """Return the path of a file as text; a URL is returned unchanged."""
    return shard if isinstance(shard, Url) else os.fspath(shard)


def open_shard(place: str) -> BinaryIO:
    """Open a file to be read from beginning to end; OSError if it is on a disk and cannot be opened."""
    if isinstance(place, Url):
        with reaching(place):
            return open_url(place)
    return open_regular(place)


def map_shards(work: Callable[[str], Result], places: Sequence[str]) -> Iterator[Result]:
    """Yield the result of `work` for every file, in their order; of files behind URLs, some work at once."""
    remote = any(isinstance(place, Url) for place in places)
    return thread_map(work, places, min(AT_ONCE, len(places))) if remote else map(work, places)


def read_part(place: str, start: int, size: int) -> bytes:
    """Return a part of a file, shorter than `size` at its end; DataError if it cannot be read."""
    if isinstance(place, Url):
        return read_range(place, start, size)
    try:
        with open_regular(place) as file:
            file.seek(start)
            return file.read(size)
    except OSError as e:
        raise DataError(f"{place!r} cannot be read: {e.strerror or e}") from e


def shard_state(place: str) -> bytes:
    """Return what identifies the content of a file without reading it: name, size, and time of change or checksum."""
    if isinstance(place, Url):
        return f"{place}\0{state_of(place)}\0".encode()
    return stat_fingerprint(os.path.realpath(place).encode("utf-8", "surrogateescape"), os.stat(place))


def shard_key(place: str) -> str:
    """Return a short form of `shard_state`; DataError if the file does not exist."""
    try:
        return hashlib.sha256(shard_state(place)).hexdigest()[:32]
    except OSError as e:
        raise DataError(f"{place!r} cannot be read: {e.strerror or e}") from e


def reached(place: str) -> AbstractContextManager[None]:
    """Return a context within which errors of the file system of a URL become one sentence (`remote.reaching`)."""
    return reaching(place) if isinstance(place, Url) else nullcontext()


@contextmanager
def unchanged(place: str, key: str) -> Iterator[BinaryIO]:
    """Open a file within the context; DataError if it cannot be read, or is no longer the one that had this key."""
    if shard_key(place) != key:
        raise DataError(
            f"{str(place)!r} has changed since the run began: restore it, or start a new run from the weights of this "
            "one (--init RUN)"
        )
    try:
        with reached(place), open_shard(place) as file:
            yield file
    except OSError as e:
        raise DataError(f"{place!r} cannot be read: {e.strerror or e}") from e
