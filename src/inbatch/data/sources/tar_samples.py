"""Samples in tar files, in the layout of WebDataset: which members are images, and which are their labels.

The members of one sample share a key, which is the member name up to the first dot of its last path component:
`cat/01.jpg` has its label in `cat/01.cls` or `cat/01.json` ({"label": ...}). A key has one image. A part of the name
that is a number, or that occurs under one key only, belongs to the key: `IMG.0001.jpg` and `IMG.0002.jpg` are two
samples.
"""

import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from inbatch.data.source import Reading
from inbatch.data.sources.labels import NO_LABELS, Distinct
from inbatch.data.sources.packed_names import Names
from inbatch.data.sources.shard_files import map_shards, place_of
from inbatch.data.sources.shard_index import Entry
from inbatch.data.sources.split_names import split_of
from inbatch.data.sources.tar_members import IMAGES, MemberName, extension_of, labelled_by, parts_of, read_contents
from inbatch.errors import DataError


@dataclass
class Members:
    """Members with the extension of an image, of all shards in order.

    Attributes:
        names: Names of the members.
        starts, sizes: Position and number of their bytes in the shard.
        keys: Numbers of their keys.
        extensions: Position of their extension, behind the first dot of the name, in `kinds`.
        labels: Position of their label in `distinct.values`; -1 for unknown.
        first: Position of the first member of every shard, and the number of all members.
        keys_of_shards: What identifies the content of every shard (`shard_files.shard_key`).
        kinds: Extensions of images.
        folders: Folders of the images, without those below the third level.
        distinct: The labels that occur.
        skipped: Number of the other members by extension.
    """

    names: Names = field(default_factory=Names)
    starts: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    keys: array = field(default_factory=lambda: array("q"))
    extensions: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("q"))
    first: list[int] = field(default_factory=lambda: [0])
    keys_of_shards: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    distinct: Distinct = field(default_factory=Distinct)
    skipped: Counter[str] = field(default_factory=Counter)


class Images(NamedTuple):
    """The image of each sample: places in `Members`; the members left out, by extension; a part of the report."""

    places: np.ndarray
    skipped: Counter[str]
    rule: str


def choose_images(members: Members, requested: str | None, name: str) -> Images:
    """Return one image for each key.

    Of several images of a key, the one with the first extension in the order of `folder.EXTENSIONS` is used; images
    with longer extensions, such as `input.jpg`, are used if the key has no other.

    Args:
        members: The members.
        requested: Extension of the images (`image_column`), or None.
        name: Name of the data, for messages.

    Raises:
        DataError: If no member has the requested extension, or if a key has several images with longer extensions.
    """
    kinds, kind, key = [*members.kinds], np.array(members.extensions), np.array(members.keys)
    if requested is not None:
        wanted = extension_of(requested)
        if wanted not in kinds:
            raise DataError(f"{name!r} has no image KEY.{wanted} (image_column), only {', '.join(kinds) or 'none'}")
        rank = np.where(np.arange(len(kinds)) == kinds.index(wanted), 0, -1)
    else:
        rank, alone = _ranks(kinds, kind, key)
        key = np.where(alone[kind], -1 - np.arange(len(key)), key)  # a key of its own
    places = np.arange(len(kind))
    places = places[rank[kind] >= 0]
    order = places[np.lexsort((-places, rank[kind[places]], key[places]))]  # of two equal names the last, as in tar
    chosen = np.sort(order[np.unique(key[order], return_index=True)[1]])
    left = np.setdiff1d(np.arange(len(kind)), chosen)
    if requested is None:
        _check_clear(kinds, kind, key, chosen, left, name)
    skipped = members.skipped + Counter(f".{kinds[number]}" for number in kind[left].tolist())
    used = " before ".join(sorted({kinds[n] for n in kind.tolist()}, key=lambda k: rank[members.kinds[k]])[:3])
    rule = f"one image for each key, {wanted}" if requested is not None else f"one image for each key, {used}"
    return Images(chosen, skipped, f"; {rule} (image_column chooses)" if len(left) else "")


def _ranks(kinds: list[str], kind: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of every extension, the smallest first, and whether it is a part of the name of the sample."""
    pairs = np.unique(np.stack([kind, key]), axis=1)[0] if len(kind) else kind
    keys = np.bincount(pairs, minlength=len(kinds))
    alone = np.array([
        "." in one and (count == 1 or any(part.isdigit() for part in one.split(".")))
        for one, count in zip(kinds, keys.tolist(), strict=True)
    ], bool)  # fmt: skip
    rank = [IMAGES.index(one) if one in IMAGES else len(IMAGES) for one in kinds]
    return np.array(rank, np.int64), alone


def _check_clear(
    kinds: list[str], kind: np.ndarray, key: np.ndarray, chosen: np.ndarray, left: np.ndarray, name: str
) -> None:
    """Raise DataError if an image with a longer extension was chosen from several."""
    longer = np.array(["." in one for one in kinds], bool)
    unclear = chosen[longer[kind[chosen]]]
    also = left[np.isin(key[left], key[unclear])]
    if len(also):
        one = next(i for i in unclear.tolist() if key[i] == key[also[0]])
        choices = sorted({kinds[kind[i]] for i in (one, *also[key[also] == key[one]].tolist())})
        if len(choices) > 1:
            raise DataError(
                f"{name!r} has several images for a key, {', '.join(choices)}: choose with image_column "
                f"(--image-column {choices[0]})"
            )


def read_members(
    shards: Iterable[str | os.PathLike], name: str, reading: Reading, setting: str = "label_column"
) -> Members:
    """Return the images of the shards with their labels; raise DataError with the name of a shard on any problem.

    setting: Name of the setting that `reading.label_column` is the value of, for messages.
    """
    members, places = Members(), [*map(place_of, shards)]
    for key, entries in map_shards(partial(read_contents, column=reading.label_column), places):
        members.keys_of_shards.append(key)
        _add(entries, members, reading)
    _check_one_split(members.folders, name)
    column = reading.label_column
    if column not in (None, NO_LABELS) and max(members.labels, default=-1) < 0:
        raise DataError(
            f"{name!r} has no member KEY.{extension_of(column)} and no {column!r} in a KEY.json of an image ({setting})"
        )
    return members


def _check_one_split(folders: Iterable[str], name: str) -> None:
    """Raise DataError if a folder in the shards holds the folders of training images and those of other splits."""
    inside: dict[str, dict[str, str]] = {}
    for path in folders:
        while path:
            path, _, last = path.rpartition("/")
            if (split := split_of(last)) is not None:
                inside.setdefault(path, {})[split] = last
    for words in inside.values():
        if "train" in words and len(words) > 1:
            raise DataError(
                f"{name!r} holds folders of several splits, {', '.join(sorted(words.values()))}: training on all of "
                "it would include test images. Unpack it, or write one tar file for each split, such as train.tar"
            )


def _add(entries: Iterable[Entry], members: Members, reading: Reading) -> None:
    """Add the images of a shard."""
    keys: dict[str, int] = {}
    labels: dict[str, int] = {}
    images: list[MemberName] = []
    before = max(members.keys, default=-1) + 1
    column = extension_of(reading.label_column)
    for entry in entries:
        parts = parts_of(entry.name)
        if any(part.startswith(".") for part in entry.name.split("/")):
            members.skipped["hidden"] += 1
        elif parts.kind in IMAGES:
            images.append(parts)
            members.folders.add("/".join(parts.key.split("/")[:-1][:4]))  # the first part is empty
            members.names.append(entry.name.encode("utf-8", "surrogateescape"))
            members.starts.append(entry.start)
            members.sizes.append(entry.size)
            members.keys.append(before + keys.setdefault(parts.key, len(keys)))
            members.extensions.append(members.kinds.setdefault(parts.extension, len(members.kinds)))
        elif labelled_by(parts, reading.label_column) is not None:
            if entry.label is not None:
                labels[parts.key if parts.extension == column else parts.stem] = members.distinct.code(entry.label)
        elif parts.kind not in ("cls", "json"):
            members.skipped[f".{parts.extension}" if parts.extension else "no extension"] += 1
    members.labels.extend(labels.get(image.stem, labels.get(image.key, -1)) for image in images)
    members.first.append(len(members.names))
