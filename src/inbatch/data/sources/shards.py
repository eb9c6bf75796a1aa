"""Files that each hold many images: which of those in a folder belong to which split.

The split is named by the file ("train-00000-of-00002.parquet") or by its folder ("train/0000.parquet"). The files may
lie in a sub-folder, as in a data set that was downloaded from a hub ("data", "plain_text").
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from inbatch.data.sources.folder_contents import has_loose_images, holds_images, sub_folders
from inbatch.data.sources.folder_scan import EXTENSIONS, is_kind
from inbatch.data.sources.split_names import arranged, naming, split_of, split_within, word_within
from inbatch.errors import DataError, many
from inbatch.runtime.remote import public

_MOST_FOLDERS = 50  # more are classes of images, and listing them all takes time
_NUMBERED = r"{0}([-_.]*\d.*)?\.\w+"  # not "train-features.parquet"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 10**6  # maximum number of files of a range
_OF_A_HUB = re.compile(r"(.+)-\d{5}-of-\d{5}\b.*")  # as the hub writes the name of a split and the number of the file


@dataclass(frozen=True)
class Shards:
    """Files by split.

    Attributes:
        files: Files of each split, in order: paths or URLs.
        names: The word that named each split; empty if the files are not divided.
        unused: Number of files that name no split.
    """

    files: Mapping[str, Sequence[str | os.PathLike]]
    names: dict[str, str]
    unused: int = 0

    def note(self) -> str:
        """Return a sentence part for the report, empty if the files are not divided."""
        unused = f"; {many(self.unused, 'file')} without the name of a split not used" if self.unused else ""
        return naming(self.names) + unused if self.names else ""

    def name(self, split: str, where: str) -> str:
        """Return the name of the source of a split."""
        return where if split == "train" else f"{where} ({self.names[split]})"


def shards_in(folder: Path, suffix: str, allow_images: bool = True) -> list[Path]:
    """Return the files with an ending in a folder, in order; if not `allow_images`, none if it also holds an image."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                ending = os.path.splitext(entry.name)[1].lower()
                if not allow_images and os.fsencode(ending) in EXTENSIONS:
                    return []
                if ending == suffix and not entry.name.startswith(".") and is_kind(entry.is_file):
                    files.append(folder / entry.name)
    except OSError:  # the scan for images reports it
        return []
    return sorted(files)


def without_images(root: Path) -> bool:
    """Return whether a folder holds no image, apart from pictures that inbatch wrote."""
    return not has_loose_images(root) and not any(holds_images(root / name) for name in sub_folders(root))


def shards_below(root: Path, suffix: str, nested: bool = True) -> Shards | None:
    """Return the files with an ending in the sub-folders of a folder, None if there are none.

    Raises:
        DataError: If they may be several data sets, or if it is unclear which are training images.
    """
    folders = sub_folders(root)
    if len(folders) > _MOST_FOLDERS:
        folders = [name for name in folders if name == "data"]
    by_folder = {name: files for name in folders if (files := shards_in(root / name, suffix, allow_images=False))}
    if not by_folder:
        return shards_below(root / folders[0], suffix, nested=False) if nested and len(folders) == 1 else None
    if all(map(split_within, by_folder)):
        return _grouped([(word_within(name) or "", files) for name, files in by_folder.items()], root)
    if len(by_folder) == 1:
        return divided(next(iter(by_folder.values())), root / next(iter(by_folder)))
    raise DataError(
        f"{str(root)!r} holds {suffix} files in several folders ({', '.join(list(by_folder)[:5])}): "
        f"name one or several of them as the data (--data {root / next(iter(by_folder))})"
    )


def divided(files: Sequence[Path], where: Path) -> Shards:
    """Return files by the split that their names hold; without any test images, all files are training images.

    Of files that are all named as a hub does (`extra-00000-of-00002.parquet`), every name is a split.

    Raises:
        DataError: If some files are named as test images, and others not as any split.
    """
    of_a_hub = [match[1] for file in files if (match := _OF_A_HUB.fullmatch(file.name))]
    if len(of_a_hub) == len(files) and len(set(of_a_hub)) > 1:
        return _grouped([(name, [file]) for name, file in zip(of_a_hub, files, strict=True)], where)
    words = {file: word_within(file.name.partition(".")[0]) for file in files}
    other = next((word for word in words.values() if word and split_of(word) != "train"), None)
    if other is None:
        return Shards({"train": list(files)}, {})
    if unnamed := [file.name for file, word in words.items() if word is None]:
        raise DataError(
            f"{str(where)!r} holds files named as {other!r} next to others, such as {unnamed[0]!r}: all of them would "
            f"include test images. Name the training images by a pattern in quotes (--data '{where / 'NAME*'}'), and "
            f"the test images by --set 'test={where / other}*'"
        )
    return _grouped([(word or "", [file]) for file, word in words.items()], where)


def named(files: Sequence[Path], where: Path) -> Shards | None:
    """Return the files whose names are that of a split, with or without a number; None if there are none."""
    words = {file: word_within(file.name.partition(".")[0]) for file in files}
    kept = [(word, [file]) for file, word in words.items() if word and re.fullmatch(_NUMBERED.format(word), file.name)]
    if not kept:
        return None
    shards = _grouped(kept, where)
    return Shards(shards.files, shards.names, len(files) - len(kept))


def _grouped(named_files: Sequence[tuple[str, list[Path]]], where: Path) -> Shards:
    """Return files by split, given the word that names it; DataError if two words name training images."""
    groups: dict[str, list[Path]] = {}
    for word, files in named_files:
        groups.setdefault(word.lower(), []).extend(files)
    training = [word for word in groups if split_of(word) == "train"]
    if len(training) > 1:
        raise DataError(
            f"{str(where)!r} holds files of {' and of '.join(map(repr, training))}, which both name training images: "
            f"name those to use by a pattern in quotes (--data '{where / training[0]}*')"
        )
    return Shards(arranged(groups), arranged({word: word for word in groups}))


def has_range(text: str) -> bool:
    """Return whether a text contains a range of numbers such as `{000..146}`."""
    return _RANGE.search(text) is not None


def ranges(pattern: str) -> list[str]:
    """Return the texts of a pattern such as `train-{000..146}.tar`; numbers keep their width."""
    pieces = _RANGE.split(pattern)  # text, first, last, text, ...
    ends = [(int(first), int(last), len(first)) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(max(0, last - first + 1) for first, last, _ in ends) not in range(1, _MOST + 1):
        raise DataError(f"{public(pattern)!r} names no file, or more than {_MOST:,}: a range is {{FIRST..LAST}}")
    numbers = product(*([f"{n:0{width}}" for n in range(first, last + 1)] for first, last, width in ends))
    return ["".join(a + b for a, b in zip(pieces[::3], (*chosen, ""), strict=True)) for chosen in numbers]
