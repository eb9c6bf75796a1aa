"""Members of tar shards: plain files and the labels in them. The headers of remote shards are kept in the cache."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from inbatch.data.sources.folder import EXTENSIONS
from inbatch.data.sources.labels import NO_LABELS, Unusable
from inbatch.data.sources.shard_files import open_shard, reached, shard_key
from inbatch.data.sources.shard_index import Entry, cached_entries
from inbatch.errors import DataError
from inbatch.runtime.remote import Url

IMAGES = tuple(extension.decode()[1:] for extension in EXTENSIONS)
"""Extensions of images, in the order in which they are preferred."""

_LABEL_BYTES = 2**20  # maximum size of a label; a longer one is not read


class MemberName(NamedTuple):
    """Parts of a member's name: `stem` is all but the last extension, `key` ends at the first dot of the last part."""

    key: str
    stem: str
    extension: str
    kind: str


def parts_of(name: str) -> MemberName:
    """Split a name: "a/x.input.jpg" has the key "a/x", the extension "input.jpg" and the kind "jpg"."""
    folder, _, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    stem, _, kind = last.rpartition(".") if extension else (last, "", "")
    return MemberName(f"{folder}/{key}", f"{folder}/{stem}", extension.lower(), kind.lower())


def read_contents(place: str, column: str | None) -> tuple[str, Iterable[Entry]]:
    """Return the key of a shard and its members; those of a URL are kept in the cache."""
    key = shard_key(place)
    if isinstance(place, Url):
        return key, cached_entries(place, key, column, lambda: _entries(place, column))
    return key, _entries(place, column)


def _entries(place: str, column: str | None) -> Iterator[Entry]:
    """Iterate over the plain members of a shard; DataError if it is damaged."""
    damage = (tarfile.TarError, ValueError) if isinstance(place, Url) else Exception  # of a URL, the rest is `reached`
    try:
        with reached(place), open_shard(place) as file:
            try:
                yield from _read_entries(file, column)
            except damage as e:  # tarfile can raise any exception on damaged headers
                reason = getattr(e, "strerror", None) or e
                hint = "; copy or download it again" if isinstance(e, tarfile.TarError) else ""
                raise DataError(f"{str(place)!r} cannot be read as a tar file: {reason}{hint}") from e
    except OSError as e:
        raise DataError(f"{str(place)!r} cannot be read as a tar file: {e.strerror or e}") from e


def _read_entries(file: BinaryIO, column: str | None) -> Iterator[Entry]:
    _check_plain(file)
    for name, member in _plain_members(file):
        parts = parts_of(name)
        how = None if parts.kind in IMAGES else labelled_by(parts, column)
        yield Entry(name, member.offset_data, member.size, None if how is None else _label(file, member, *how))


def _plain_members(file: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Iterate over the names and headers of the files in a shard; raise ValueError if it is damaged."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as opened:
        while (member := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # tarfile keeps all members
            if (name := _allowed(member)) is None:
                continue
            if member.offset_data + member.size > length:
                raise ValueError(f"it is truncated within {name!r}; copy or download it again")
            yield name, member
        file.seek(opened.offset)
        if file.read(512) != bytes(512):  # tarfile treats data that it cannot read as the end of the archive
            raise ValueError(f"it is damaged or truncated behind byte {opened.offset:,}; copy or download it again")


def _check_plain(file: BinaryIO) -> None:
    """Raise ValueError if the file is compressed, for any name."""
    head = file.read(6)
    file.seek(0)
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError("it is compressed, and images in it cannot be reached one by one: unpack it to a plain .tar")


def _allowed(member: tarfile.TarInfo) -> str | None:
    """Return the name of a plain file, None for a folder; raise ValueError for members that are unsafe."""
    name = member.name.removeprefix("./")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        raise ValueError(
            f"its member {member.name!r} points out of the folder that it is unpacked in: pack it with relative names"
        )
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise ValueError(
            f"its member {member.name!r} is a link, a device or a sparse file, and only plain files are read: pack it "
            "with tar --dereference --hard-dereference"
        )
    return name


def extension_of(column: str | None) -> str | None:
    """Return the extension of members that a setting such as `.Kind.txt` names, as in `MemberName.extension`."""
    return None if column is None else column.lower().lstrip(".")


def labelled_by(parts: MemberName, column: str | None) -> tuple[str | None] | None:
    """Return the field of the JSON that a member's label is in, None for its whole text; None if it has no label.

    column: Setting `label_column`: an extension, or a field of KEY.json.
    """
    if column == NO_LABELS:
        return None
    if column is None:
        return {"cls": (None,), "json": ("label",)}.get(parts.kind)
    if parts.extension == extension_of(column):
        return (None,)
    return (column,) if parts.kind == "json" else None


def _label(file: BinaryIO, member: tarfile.TarInfo, field: str | None) -> Any:
    """Return the label in a member, None if there is none."""
    if member.size > _LABEL_BYTES:
        return Unusable(f"such as {member.name!r} of {member.size / 1e6:,.0f} MB")
    file.seek(member.offset_data)
    text = file.read(member.size)
    if field is None:
        return text
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return Unusable(f"such as {member.name!r}, which cannot be read as JSON")
    return content.get(field) if isinstance(content, dict) else None
