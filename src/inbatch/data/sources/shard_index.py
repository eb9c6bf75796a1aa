"""Members of remote shards in the cache: the headers of a shard are read once, and again if the shard changes.

An entry of the cache is one shard: a JSON file with the names, places and labels of its members.
"""

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from inbatch.data import cache
from inbatch.data.sources.labels import Unusable
from inbatch.runtime.files import to_json

_FORMAT = 1
_WRITING = threading.Lock()
"""Held while an entry is written: the locks of the cache keep processes apart, not threads."""


class Entry(NamedTuple):
    """Member of a shard: name, place of its bytes, and the label in it (text as bytes, or a value of JSON), or None."""

    name: str
    start: int
    size: int
    label: Any


def cached_entries(shown: str, key: str, column: str | None, read: Callable[[], Iterable[Entry]]) -> list[Entry]:
    """Return the members of a shard from the cache, else from `read`, whose result is then cached.

    Args:
        shown: Name of the shard without credentials.
        key: What identifies the content of the shard.
        column: Setting `label_column`, which decides the labels that are read.
        read: Reads the members.
    """
    root = cache.where()
    if root is None or not cache.limit():
        return list(read())
    place = root / hashlib.sha256(json.dumps(["shard", _FORMAT, key, column]).encode()).hexdigest()
    if (entries := _load(place)) is None:
        entries = list(read())
        _store(place, entries, shown)
    return entries


def _store(place: Path, entries: list[Entry], name: str) -> None:
    text = json.dumps([[one.name, one.start, one.size, _packed(one.label)] for one in entries]).encode()

    def write(folder: Path) -> None:
        (folder / "members.json").write_bytes(text)
        note = {"name": name, "members": zlib.crc32(text)}
        (folder / "entry.json").write_text(to_json(note), "utf-8", errors="backslashreplace")

    with _WRITING:
        cache.write_entry(place, len(text), write)


def _load(place: Path) -> list[Entry] | None:
    """Load the members of a shard; None if they are not cached, or damaged, which are then removed."""
    try:
        if not place.is_dir():
            return None
        text = (place / "members.json").read_bytes()
        if json.loads((place / "entry.json").read_text("utf-8"))["members"] != zlib.crc32(text):
            raise ValueError("a checksum differs")
        entries = [Entry(name, start, size, _unpacked(label)) for name, start, size, label in json.loads(text)]
    except PermissionError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        cache.remove(place)
        return None
    with suppress(OSError):
        os.utime(place / "entry.json")
    return entries


def _packed(label: Any) -> Any:
    """Return a label as a value of JSON that keeps its type."""
    if isinstance(label, bytes):
        return {"text": label.decode("latin-1")}
    if isinstance(label, Unusable):
        return {"unusable": label.kind}
    return None if label is None else {"value": label}


def _unpacked(label: Any) -> Any:
    if label is None:
        return None
    if "text" in label:
        return str(label["text"]).encode("latin-1")
    return Unusable(str(label["unusable"])) if "unusable" in label else label["value"]
