"""Several paths as one data set, and patterns such as `photos/*/*.jpg` or `data/train-*.parquet`."""

import glob
import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.data.source import LazyImage, Reading, Source, signed
from inbatch.data.sources.class_lists import class_ids
from inbatch.data.sources.columns import check_no_columns
from inbatch.data.sources.folder import label_by_folder, left_out
from inbatch.data.sources.folder_contents import is_run, only_runs
from inbatch.data.sources.folder_scan import EXTENSIONS, PICTURES
from inbatch.data.sources.folder_splits import check_inner_splits
from inbatch.data.sources.packed_names import Names
from inbatch.data.sources.parquet import parquet_splits
from inbatch.data.sources.path_source import PathsSource
from inbatch.data.sources.shards import Shards, divided
from inbatch.data.sources.split_names import arranged, split_of
from inbatch.data.sources.webdataset import tar_splits
from inbatch.errors import DataError, listed, many
from inbatch.runtime.path_list import is_pattern, listed_paths
from inbatch.runtime.picture_mark import is_marked

Splits = dict[str, Callable[[], Source]]
Finder = Callable[[object, Reading], Splits]

PACKED: dict[str, Callable[[Shards, str, Reading], Splits]] = {".parquet": parquet_splits, ".tar": tar_splits}
"""Ending of files that each hold many images -> what opens them as one source."""


class Joined(Source):
    """The images of several sources, one source after the other.

    Classes of the same name are the same class; the images of an unlabelled source stay unlabelled.

    Args:
        sources: Sources with the same number of channels.
        prefixes: Beginning of the names of the images of each source.
        name: Name of the whole.
        classes: Fixed numbering of the classes, that of the training images; () for the names that occur.

    Raises:
        DataError: If the numbers of channels differ, or if a class is not in `classes`.
    """

    def __init__(self, sources: Sequence[Source], prefixes: Sequence[str], name: str, classes: tuple[str, ...] = ()):
        channels = {source.channels for source in sources}
        if len(channels) > 1:
            raise DataError(
                f"{name!r}: the images have {' and '.join(map(str, sorted(channels)))} channels; pass those of one "
                "number"
            )
        every = max((source.classes for source in sources), key=len)
        occurring = {one for source in sources for one in source.classes}
        if classes and (unknown := sorted(occurring - set(classes))):
            raise DataError(
                f"{name!r} holds classes that the train split lacks: {listed(unknown)}; rename or remove these classes"
            )
        ids = {name: id for source in sources for name, id in class_ids(source).items()}
        by_id = {} if set(ids) != occurring else ids
        together = tuple(sorted(occurring, key=lambda name: (by_id.get(name, 0), name)))
        order = (classes if occurring else ()) or (every if occurring <= set(every) else together)
        place = {one: i for i, one in enumerate(order)}
        labels = []
        for source in sources:
            number = torch.tensor([*(place[one] for one in source.classes), -1])
            labels.append(number[source.labels])  # -1 indexes the last entry
        super().__init__(name, channels.pop(), torch.cat(labels), order)
        self.sources, self.prefixes, self.levels = tuple(sources), tuple(prefixes), sources[0].levels
        known = tuple(ids[one] for one in order if one in ids)
        self.ids = known if len(known) == len(order) and known != tuple(range(len(order))) else None
        self.groups = _joined_groups(sources)
        self.label_note = "; ".join(dict.fromkeys(filter(None, (source.label_note for source in sources))))
        self._ends = [*accumulate(map(len, sources))]

    def open(self, i: int) -> LazyImage:
        source, place, _ = self._place(i)
        return source.open(place)

    def identity(self, i: int) -> str:
        source, place, prefix = self._place(i)
        return os.path.join(prefix, source.identity(place))

    def file_of(self, i: int) -> str | None:
        source, place, _ = self._place(i)
        return source.file_of(place)

    def fingerprint(self) -> str | None:
        parts = [source.fingerprint() for source in self.sources]
        return None if None in parts else hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()

    def signature(self) -> str:
        parts = (f"{prefix}\0{one.signature()}" for prefix, one in zip(self.prefixes, self.sources, strict=True))
        return signed(self, "\0".join(parts).encode(errors="surrogatepass"))

    def shard_sizes(self) -> list[int] | None:
        parts = [source.shard_sizes() for source in self.sources]
        return None if None in parts else [size for part in parts for size in part or ()]

    def shard_layout(self) -> str:
        return " ".join(source.shard_layout() for source in self.sources)

    def read_shards(self, numbers: Iterable[int]) -> Iterator[Any]:
        for source, part in groupby(map(self._place, numbers), lambda place: place[0]):
            yield from source.read_shards(number for _, number, _ in part)

    def unpack(self, i: int, data: Any) -> LazyImage:
        source, place, _ = self._place(i)
        return source.unpack(place, data)

    def skipped(self) -> dict[str, int]:
        return dict(sum((Counter(source.skipped()) for source in self.sources), Counter()).most_common())

    def report(self) -> str:
        return "\n".join((*(source.report() for source in self.sources), super().report()))

    def _place(self, i: int) -> tuple[Source, int, str]:
        which = bisect_right(self._ends, i)
        return self.sources[which], i - (self._ends[which - 1] if which else 0), self.prefixes[which]


@dataclass(frozen=True)
class _Part:
    """Splits of one path, or of several `files` in the folder `place`."""

    place: str
    splits: Splits
    is_folder: bool = False
    files: tuple[str, ...] = ()


def find_several(data: object, reading: Reading, find: Finder) -> Splits | None:
    """Find the splits of several paths (separated as in PATH), or of the files and folders that a pattern matches.

    Image files of a pattern are labelled as in a folder: by the first folder behind the beginning of the pattern that
    has no wildcard. Folders are opened one by one, Parquet and tar files together.

    Args:
        data: The data.
        reading: See `Reading`.
        find: Finder for a single path.

    Raises:
        DataError: If a path does not exist, a pattern matches nothing, or a folder contains another one.
    """
    if not isinstance(data, str | os.PathLike):
        return None
    text = os.fspath(data)
    paths = listed_paths(text)
    if len(paths) == 1 and not is_pattern(text):
        return None
    files = [path for path in paths if not is_pattern(path) and os.path.isfile(path) and _kind(path)]
    parts = _parts_of_files(files, _shared_folder(files), text, reading) if files else []
    for path in paths:
        if is_pattern(path):
            parts += _matching(path, reading, find)
        elif path not in files:
            is_folder = os.path.isdir(path)
            parts.append(_Part(path, find(path, reading), is_folder, () if is_folder else (path,)))
    _check_disjoint(parts, text)
    return parts[0].splits if len(parts) == 1 else _joined(parts, text)


def _joined_groups(sources: Sequence[Source]) -> Tensor | None:
    """Return the groups of all sources, if any has some; groups of different sources are different."""
    if all(source.groups is None for source in sources):
        return None
    parts, first = [], 0
    for source in sources:
        own = torch.full((len(source),), -1) if source.groups is None else source.groups
        parts.append(torch.where(own >= 0, own + first, own))
        first += int(own.max()) + 1
    return torch.cat(parts)


def _joined(parts: Sequence[_Part], text: str) -> Splits:
    """Return what opens each split of several parts."""
    places = [os.path.realpath(part.place) for part in parts]
    shared = _shared_folder([os.path.join(place, "") for place in places])
    prefixes = [os.path.relpath(place, shared) if place != shared else "" for place in places]
    names = arranged({split: split for part in parts for split in part.splits})

    def opened(split: str) -> Source:
        chosen = [(part.splits[split](), at) for part, at in zip(parts, prefixes, strict=True) if split in part.splits]
        classes = opened("train").classes if split != "train" and "train" in names else ()
        name = text if split == "train" else f"{text} ({split})"
        return Joined([source for source, _ in chosen], [at for _, at in chosen], name, classes)

    return {split: partial(opened, split) for split in names}


def _matching(pattern: str, reading: Reading, find: Finder) -> list[_Part]:
    """Return the parts of a pattern; with `**`, the folders that it matches are those of the files."""
    matches = sorted({*glob.glob(pattern, recursive=True)})  # `**/**` matches some twice
    beginning = pattern[: next(i for i, character in enumerate(pattern) if character in "*?[")]
    parts = _parts_of_files(
        [path for path in matches if _kind(path)], os.path.dirname(beginning) or ".", pattern, reading
    )
    folders = [] if "**" in pattern else [path for path in matches if os.path.isdir(path) and not only_runs(Path(path))]
    _check_one_split(map(os.path.basename, folders), pattern)
    parts += [_Part(path, find(path, reading), is_folder=True) for path in folders]
    if not parts:
        what = f"{many(len(matches), 'path')}, but no image, Parquet file, tar file or folder" if matches else "nothing"
        raise DataError(f"{pattern!r} matches {what}: correct the pattern, and write it in quotes on a command line")
    return parts


def _parts_of_files(files: Iterable[str], root: str, name: str, reading: Reading) -> list[_Part]:
    """Return one part for image files, and one for each kind of packed files."""
    by_kind: dict[str, list[str]] = {}
    for file in files:
        by_kind.setdefault(_kind(file), []).append(file)
    parts = []
    for kind, members in by_kind.items():
        if kind == "image":
            check_no_columns(reading, repr(name))
            if (splits := _images(members, root, name, reading)) is not None:
                parts.append(_Part(root, splits, files=tuple(members)))
            continue
        shards = divided([Path(file) for file in members], Path(root))
        whole = Shards({"train": [Path(file) for file in members]}, {}) if len(shards.files) == 1 else shards
        parts.append(_Part(root, PACKED[kind](whole, name, reading), files=tuple(members)))
    return parts


def _images(files: Sequence[str], root: str, name: str, reading: Reading) -> Splits | None:
    """Return what opens image files, without those that inbatch wrote; None if no others are left."""
    in_run: dict[str, bool] = {}
    kept, skipped = [], Counter[str]()
    for file in files:
        folder = os.path.dirname(file)
        if folder not in in_run:
            in_run[folder] = any(is_run(above) for above in _folders_between(folder, root))
        if in_run[folder] or (file.lower().endswith(".png") and is_marked(file)):
            skipped[PICTURES] += 1
        else:
            kept.append(os.path.relpath(file, root))
    if not kept:
        return None
    kept.sort(key=os.fsencode)
    folders = {os.path.dirname(path) for path in kept}
    _check_one_split((folder.split(os.sep)[0] for folder in folders), name)
    check_inner_splits(Path(root), [os.fsencode("/".join(folder.split(os.sep)[:2]) + "/") for folder in folders])

    def opened() -> Source:
        labels, classes = label_by_folder(Names(map(os.fsencode, kept)))
        source = PathsSource(name, root, kept, labels, classes, reading)
        source.note = left_out(skipped).removeprefix(", ")
        return source

    return {"train": opened}


def _folders_between(folder: str, root: str) -> Iterator[str]:
    """Iterate over a folder and those above it, below `root`."""
    while len(folder) > len(root) and folder != os.path.dirname(folder):
        yield folder
        folder = os.path.dirname(folder)


def _check_one_split(folders: Iterable[str], pattern: str) -> None:
    """Raise DataError if a pattern matches the folders of training images and those of other splits."""
    splits = {split: folder for folder in folders if (split := split_of(folder)) is not None}
    if "train" in splits and len(splits) > 1:
        raise DataError(
            f"{pattern!r} matches {' and '.join(map(repr, splits.values()))}: training on all would include test "
            "images. Pass the folder that holds them, which is divided into splits, or a pattern within one of them"
        )


def _kind(path: str) -> str:
    """Return "image", or the ending of a file that holds many images; empty for everything else."""
    ending = os.path.splitext(path)[1].lower()
    if not os.path.isfile(path):
        return ""
    return "image" if os.fsencode(ending) in EXTENSIONS else ending if ending in PACKED else ""


def _shared_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def _check_disjoint(parts: Sequence[_Part], text: str) -> None:
    """Raise DataError if a file or a folder is given twice, or a folder or an image lies in a folder that is given."""
    places = [os.path.realpath(part.place) for part in parts if part.is_folder]
    for i, place in enumerate(places):
        for other in places[:i]:
            if os.path.commonpath((place, other)) in (place, other):
                raise DataError(f"{text!r}: {place!r} and {other!r} hold the same images: leave one of them out")
    folders = {folder: os.path.realpath(folder) for part in parts for folder in map(os.path.dirname, part.files)}
    seen: set[str] = set()
    for file in (file for part in parts for file in part.files):
        folder, name = os.path.split(file)
        if (path := os.path.join(folders[folder], name)) in seen:
            raise DataError(f"{text!r} holds {path!r} twice: leave out one of the paths or patterns that match it")
        seen.add(path)
        if (
            places
            and _kind(file) == "image"
            and (above := [one for one in places if path.startswith(os.path.join(one, ""))])
        ):
            raise DataError(f"{text!r}: {path!r} is also in the folder {above[0]!r}: leave one of them out")
