"""Folders of image files; files left out are counted and reported."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from inbatch.data.decoding import signatures
from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.pixels import Levels
from inbatch.data.source import Reading, Source, path_text, stat_fingerprint, unlabelled
from inbatch.data.sources.folder_scan import EXTENSIONS, HEIF, PICTURES, RUN_FILES, RUNS, scan
from inbatch.data.sources.folder_splits import Layout, check_inner_splits, find_layout
from inbatch.data.sources.groups import groups_of_paths, is_path_rule
from inbatch.data.sources.packed_names import Names
from inbatch.data.sources.split_names import naming
from inbatch.errors import DataError, listed, many
from inbatch.runtime.paths import path_of


class FolderSource(Source):
    """Images of a folder, decoded on demand.

    Images are labelled by first-level sub-folder if every image is in one and there are at least two of them.

    Args:
        root: Folder to scan.
        channels: Number of channels to decode to.
        classes: Fixed numbering of the classes, so that a test split uses that of its train split.
        levels: See `Reading`.
        note: Sentence part for the report.
        group_column: "folder" or a regular expression, see `groups_of_paths`; None for no groups.

    Raises:
        DataError: If there is no image, if a class is not in `classes`, or if sub-folders are divided into splits.
    """

    def __init__(
        self, root: Path, channels: int = 3, classes: tuple[str, ...] = (), levels: Levels | None = None,
        note: str = "", group_column: str | None = None,
    ):  # fmt: skip
        self.root, self.scan, self.levels, self.note = root, scan(root), levels, note
        paths = self.scan.paths
        if not len(paths):
            if all((root / os.fsdecode(name)).is_file() for name in RUN_FILES):
                raise DataError(f"{str(root)!r} is the folder of a run and contains no images: pass the images' folder")
            kinds = " ".join(e.decode() for e in EXTENSIONS)
            raise DataError(f"No image under {str(root)!r}{self._left_out()}: put files with {kinds} there")
        check_inner_splits(root, self.scan.folders)
        labels, names = label_by_folder(paths, classes)
        if unknown := sorted(set(names) - set(classes or names)):
            raise DataError(
                f"{str(root)!r} holds classes that the train split lacks: {listed(unknown)}; rename or remove "
                "their folders"
            )
        super().__init__(str(root), channels, labels, (classes or names) if names else ())
        if group_column is not None:
            if not is_path_rule(group_column):
                raise DataError(
                    f"group_column = {group_column!r}: the files of {str(root)!r} have no columns. Use folder (the "
                    r"folder of each file), or a regular expression with brackets, such as (video\d+), for their paths"
                )
            self.groups = groups_of_paths(map(path_text, paths), group_column, str(root))

    def open(self, i: int) -> ImageFile:
        return ImageFile(self._path(i), lambda: os.path.join(self.name, self.identity(i)), self.channels, self.levels)

    def identity(self, i: int) -> str:
        return path_text(self.scan.paths[i])

    def file_of(self, i: int) -> str:
        return os.path.abspath(self._path(i))

    def fingerprint(self) -> str | None:
        digest = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogateescape"))
        for i, path in enumerate(self.scan.paths):
            try:
                status = os.stat(self._path(i))
            except OSError:  # removed since the scan; opening the image reports it
                return None
            digest.update(stat_fingerprint(path, status))
        return digest.hexdigest()

    def skipped(self) -> dict[str, int]:
        return {path_text(os.fsencode(kind)): count for kind, count in self.scan.skipped.most_common()}

    def _path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.scan.paths[i]))

    def report(self) -> str:
        kind = (
            f"{len(self.classes)} classes (the first-level sub-folders)"
            if self.classes
            else self.labelling()
            if self.label_note
            else "unlabelled (not every image lies in one of at least two sub-folders)"
        )
        parts = (f"{self.name}: {many(len(self), 'image')} found{self._left_out()}", kind, self.note)
        return "; ".join(filter(None, parts))

    def _left_out(self) -> str:
        skipped = left_out(self.scan.skipped)
        bad = self.scan.unreadable
        return skipped + (f", {many(len(bad), 'unreadable folder')} ({'; '.join(bad[:3])})" if bad else "")


def find_folder(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a folder by the names of its sub-folders, else the folder itself as `train`."""
    if not isinstance(data, str | os.PathLike) or not (root := Path(data)).is_dir():
        return None
    channels, levels, layout = file_channels(reading.channels), reading.levels, find_layout(root)
    note = "; ".join([*([naming(layout.names)] if layout.names else []), *layout.notes])
    how = levels, note, reading.group_column
    if not layout.names:
        return {"train": lambda: FolderSource(root, channels, (), *how)}

    def opened(split: str) -> Source:
        classes = () if split == "train" else _training_classes(layout, channels)
        return FolderSource(layout.root / layout.names[split], channels, classes, *how)

    return {split: partial(opened, split) for split in layout.names}


def _training_classes(layout: Layout, channels: int) -> tuple[str, ...]:
    train = layout.names.get("train")
    return () if train is None else FolderSource(layout.root / train, channels).classes


def label_by_folder(paths: Names, classes: tuple[str, ...] = ()) -> tuple[Int[Tensor, "n"], tuple[str, ...]]:
    """Return labels (N,) by the first folder of each path, and the names of the classes that occur.

    All are unlabelled, without names, unless every path has a folder and there are two of them or all are in `classes`.

    Args:
        paths: N relative paths.
        classes: Numbering of the classes; that of the names that occur if empty, or if it lacks one of them.
    """
    heads: dict[bytes, int] = {}
    every = (path.partition(b"/")[0] if b"/" in path else b"" for path in paths)
    numbers = np.fromiter((heads.setdefault(head, len(heads)) for head in every), np.int64, len(paths))
    names = tuple(path_text(head) for head in sorted(heads))
    if b"" in heads or (len(heads) < 2 and not set(names) <= set(classes)):
        return unlabelled(len(paths)), ()
    order = classes if set(names) <= set(classes) else names
    place = {name: i for i, name in reversed([*enumerate(order)])}
    label = torch.tensor([place[path_text(head)] for head in heads])
    return label[torch.from_numpy(numbers)], names


def left_out(skipped: Counter[str]) -> str:
    """Return a sentence part on the files that were not taken as images, empty without any."""
    own = {kind: skipped[kind] for kind in (RUNS, PICTURES) if skipped[kind]}
    others = Counter({kind: count for kind, count in skipped.items() if kind not in own})
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(5))
    hint = f"; {signatures.HEIF}" if {os.fsencode(kind) for kind in others}.intersection(HEIF) - set(EXTENSIONS) else ""
    parts = [f"{many(others.total(), 'other file')} skipped ({kinds}{hint})"] if kinds else []
    if own:
        parts.append(f"not data: {' and '.join(_own(kind, count) for kind, count in own.items())}")
    return "".join(f", {part}" for part in parts)


def _own(kind: str, count: int) -> str:
    return many(count, kind) if kind != RUNS or count == 1 else f"{count:,} run directories"


def write_folder(source: Source, directory: str | os.PathLike) -> Path:
    """Write every image as PNG, in one sub-folder per class (none if unlabelled).

    Characters of a class name that a folder name cannot contain are written as %XX, so no name leads out of the
    directory.

    Args:
        source: Images to write.
        directory: New or empty directory.

    Returns:
        Path of the directory.

    Raises:
        DataError: If the directory is not empty.
    """
    root = path_of(directory, "directory")
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{str(root)!r} is not empty: name a new directory")
    for i, label in enumerate(source.labels.tolist()):
        folder = root / _folder_name(source.classes[label]) if label >= 0 else root
        folder.mkdir(parents=True, exist_ok=True)
        pixels = source.image(i).permute(1, 2, 0).numpy()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(folder / f"{i:06d}.png")
    return root


_NO_NAME = re.compile(r"""[%/\\<>:"|?*\x00-\x1f\x7f]|^[. ]|[. ]$|^(?=(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)).""", re.I)
"""Characters and names that a file system may treat as a separator, a command, a device or a parent folder, and %."""


def _folder_name(name: str) -> str:
    """Convert a class name to a folder name of at most 240 bytes; longer names stay distinct by a hash."""
    safe = _NO_NAME.sub(lambda match: f"%{ord(match[0]):02X}", name) or "%"
    kept = safe.encode(errors="backslashreplace")
    if len(kept) <= 240:
        return safe
    return f"{kept[:200].decode(errors='ignore')}%{hashlib.sha256(kept).hexdigest()[:32]}"
