"""Pillow, and pillow-heif, as readers of image files: the formats they may try, their errors and their warnings."""

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from inbatch.data.decoding import signatures
from inbatch.errors import DataError
from inbatch.runtime.files import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF")
"""Formats that Pillow may try, regardless of the file extension.

Its other readers stay disabled (EPS runs Ghostscript).
"""

_FAILURES = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, MemoryError, RuntimeError)


def open_image(file: bytes | str) -> Image.Image:
    """Read the header of an image file.

    The class of pillow-heif is used, and not registered with Pillow, which would change what other code reads.
    """
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        if not signatures.reads_heif() or not _is_heif(file):
            raise
    from pillow_heif import HeifImageFile

    return HeifImageFile(io.BytesIO(file) if isinstance(file, bytes) else file)


def _is_heif(file: bytes | str) -> bool:
    if isinstance(file, bytes):
        return signatures.kind(file) == "HEIF"
    with open_regular(file) as opened:
        return signatures.kind(opened.read(256)) == "HEIF"


@contextmanager
def naming(name: Callable[[], str], explain: Callable[[], str] | None = None) -> Iterator[None]:
    """Convert any exception that Pillow raises on a damaged file to a DataError with its name.

    Args:
        name: Function that returns the name.
        explain: Function that returns the reason for a file that Pillow does not identify.
    """
    try:
        yield
    except _FAILURES as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        if explain is not None and isinstance(e, Image.UnidentifiedImageError):
            reason = explain()
        raise DataError(f"{name()!r} cannot be read: {reason}; repair or remove it") from e
    except Image.DecompressionBombError as e:
        raise DataError(f"{name()!r} cannot be read: {e}; shrink or remove it") from e


class _Redirection:
    """Redirection of Pillow's warnings to the thread that causes them, as long as any thread reads an image.

    `warnings.catch_warnings` is not used: it takes 10 microseconds per image, is not safe with threads, and lets
    warnings of the caller that were shown once be shown again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self.thread = threading.local()

    def begin(self) -> None:
        """Count a reader; the first one redirects the warnings."""
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._warn, warnings.warn = warnings.warn, self._collect

    def end(self) -> None:
        """Discount a reader; the last one ends the redirection."""
        with self._lock:
            self._readers -= 1
            if not self._readers and warnings.warn == self._collect:
                warnings.warn = self._warn

    def _collect(self, message: Any, category: Any = None, stacklevel: int = 1, *rest: Any, **named: Any) -> None:
        texts = getattr(self.thread, "texts", None)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if texts is None or not caller.startswith("PIL."):
            self._warn(message, category, stacklevel + 1, *rest, **named)
        elif (text := " ".join(str(message).split())) not in texts:
            texts.append(text)


_redirection = _Redirection()


def _renew() -> None:
    """Replace the redirection in a forked child: another thread may have held its lock."""
    global _redirection
    _redirection = _Redirection()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class collected:  # a context manager; as a class it takes half the time of a generator
    """Append Pillow's warnings of this thread to `texts` within the context, each text once, instead of showing them.

    Contexts are not nested.
    """

    def __init__(self, texts: list[str]):
        self._texts, self._redirection = texts, _redirection

    def __enter__(self) -> None:
        self._redirection.begin()
        self._redirection.thread.texts = self._texts

    def __exit__(self, *_: object) -> None:
        self._redirection.thread.texts = None
        self._redirection.end()
