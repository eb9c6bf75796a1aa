"""Files behind URLs, such as s3://bucket/train-000.tar, read by fsspec. Credentials in a URL are never shown.

No file system is kept: fsspec caches them per process, and a forked worker makes its own.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

from inbatch.errors import ConfigError, DataError, InbatchError, reason

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # at least two letters: "C:" is a drive
_BLOCK = 4 * 2**20  # bytes per request of a file that is read from beginning to end
_MARKS = {
    "size", "etag", "md5", "md5hash", "content-md5", "content_md5", "crc32c", "generation", "versionid", "mtime",
    "lastmodified", "last_modified", "updated", "created",
}  # fmt: skip
"""Entries of fsspec's description of a file, in lower case, by which a change of it is detected."""


class Url(str):
    """Address of a file; as text, it has neither user, password nor query.

    Attributes:
        base: Complete address from which the file system is made.
        path: Path of the file in that file system; None for that of `base`.
    """

    base: str
    path: str | None

    def __new__(cls, base: str, path: str | None = None, shown: str | None = None) -> "Url":
        url = super().__new__(cls, public(base if shown is None else shown))
        url.base, url.path = base, path
        return url


def is_url(data: object) -> bool:
    """Return whether data are named by a URL, such as "s3://bucket/train-{000..099}.tar"."""
    return isinstance(data, str) and _URL.match(data) is not None


def public(text: str) -> str:
    """Return a URL without user, password and query; other text is returned unchanged."""
    if not is_url(text):
        return text
    bare = _without_query(text)
    place = urlsplit(bare)
    return urlunsplit(place._replace(netloc=place.netloc.rpartition("@")[2])) if place.netloc else bare


def files(url: str) -> list[Url]:
    """Return the file of a URL, the files that its wildcards match, or those in the folder, in order."""
    at = Url(url)
    with reaching(at):
        fs, path = _file_system(at)
        if any(sign in _without_query(url) for sign in "*["):
            paths = fs.glob(path)
        elif url.endswith("/") or fs.isdir(path):
            paths = [one["name"] for one in fs.ls(path, detail=True) if one["type"] == "file"]
        else:
            return [at]
        return [Url(url, one, fs.unstrip_protocol(one)) for one in sorted(paths)]


def open_url(url: Url) -> BinaryIO:
    """Open a file to be read from beginning to end; use it and close it within `reaching`."""
    fs, path = _file_system(url)
    return cast(BinaryIO, fs.open(path, "rb", block_size=_BLOCK, cache_type="readahead"))


def read_range(url: Url, start: int, size: int) -> bytes:
    """Return a part of a file by one request; shorter than `size` at the end of the file."""
    with reaching(url):
        fs, path = _file_system(url)
        return bytes(fs.cat_file(path, start=start, end=start + size))


def state_of(url: Url) -> str:
    """Return a text that changes with the file: its size, and the times and checksums that the file system states."""
    with reaching(url):
        fs, path = _file_system(url)
        fs.invalidate_cache()
        facts = {str(key).lower(): value for key, value in fs.info(path).items()}
        return "; ".join(f"{key} {facts[key]}" for key in sorted(_MARKS & facts.keys()) if facts[key] is not None)


@contextmanager
def reaching(url: Url) -> Iterator[None]:
    """Raise errors of a file system within the context as one sentence without credentials.

    Raises:
        ConfigError: If the package of the file system is not installed, or the kind of the URL is unknown.
        DataError: If the file does not exist or cannot be read.
    """
    try:
        yield
    except InbatchError:
        raise
    except FileNotFoundError:
        raise DataError(f"{str(url)!r} does not exist: correct the URL, or restore the file") from None
    except ImportError as error:
        raise ConfigError(f"{str(url)!r} needs a package that is not installed: {_hidden(str(error), url)}") from None
    except Exception as error:  # each file system has its own errors; their texts may hold the whole address
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ConfigError(
                f"{str(url)!r}: fsspec knows no file system {url.partition('://')[0]!r}; correct the URL"
            ) from None
        raise DataError(f"{str(url)!r} cannot be read: {_hidden(reason(error), url)}") from None


def _file_system(url: Url) -> tuple[Any, str]:
    """Return the file system and the path of a file in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ConfigError(
            f'{str(url)!r}: URLs need fsspec: python -m pip install "inbatch[remote]", and the package of the file '
            "system, such as s3fs or gcsfs"
        ) from None
    fs, path = url_to_fs(url.base)
    return fs, path if url.path is None else url.path


def _without_query(url: str) -> str:
    """Return a URL without a query, such as a signature; a "?" without "=" behind it is a wildcard."""
    start, _, query = url.partition("?")
    return start if "=" in query else url


def _hidden(text: str, url: Url) -> str:
    """Return the text of an error without everything that `public` removes from the URL."""
    text, place = text.replace(url.base, str(url)), urlsplit(url.base)
    query = url.base.removeprefix(_without_query(url.base))
    for secret in filter(None, (query, query[1:], place.netloc.rpartition("@")[0], place.password)):
        text = text.replace(secret, "...")
    return text
