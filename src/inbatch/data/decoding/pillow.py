"""Pillow as a reader of image files: the formats it may try, its errors and its warnings."""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from inbatch.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")
"""Formats that Pillow may try, regardless of the file extension.

Its other readers stay disabled (EPS runs Ghostscript).
"""

_HOME = os.path.dirname(Image.__file__)
_FAILURES = (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, MemoryError)


def open_image(file: bytes | str) -> Image.Image:
    """Read the header of an image file."""
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)


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

    The filters of `warnings` belong to the process: a thread that leaves must not restore them for the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self.thread = threading.local()

    def begin(self) -> None:
        """Count a reader; the first one changes the filters."""
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                self._outer = warnings.catch_warnings()
                self._outer.__enter__()
                warnings.filterwarnings("always", module=r"PIL\b")
                self._show, warnings.showwarning = warnings.showwarning, self._collect

    def end(self) -> None:
        """Discount a reader; the last one restores the filters."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                self._outer.__exit__(None, None, None)

    def _collect(self, message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        texts = getattr(self.thread, "texts", None)
        if texts is None or not filename.startswith(_HOME):
            self._show(message, category, filename, *rest, **named)
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
