"""What a folder contains, without a complete scan: images, sub-folders, run directories."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from inbatch.data.sources.folder_scan import EXTENSIONS, RUN_FILES, is_kind
from inbatch.runtime.picture_mark import is_marked


def is_run(folder: str | Path) -> bool:
    """Return whether a folder is a run directory."""
    return all(os.path.isfile(os.path.join(folder, os.fsdecode(name))) for name in RUN_FILES)


def holds_images(folder: Path) -> bool:
    """Return whether there is an image in a sub-folder, at any depth; run directories hold none."""
    return any(map(_is_image, _files(folder, [])))


def only_runs(folder: Path) -> bool:
    """Return whether a sub-folder is or holds run directories, and no image."""
    runs: list[str] = []
    return not any(map(_is_image, _files(folder, runs))) and bool(runs)


def has_loose_images(folder: Path) -> bool:
    """Return whether there is an image directly in a folder; the first one decides."""
    with os.scandir(folder) as entries:
        return any(map(_is_image, entries))


def loose_images(folder: Path) -> int:
    """Return the number of images directly in a folder."""
    with os.scandir(folder) as entries:
        return sum(map(_is_image, entries))


def _files(folder: Path, runs: list[str]) -> Iterator[os.DirEntry[str]]:
    """Iterate over the files at any depth, without those of run directories, which are added to `runs`."""
    seen: set[str] = set()
    stack = [os.fspath(folder)]
    while stack:
        place = stack.pop()
        if (real := os.path.realpath(place)) in seen:
            continue
        seen.add(real)
        if is_run(place):
            runs.append(place)
            continue
        with suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                if not is_kind(entry.is_dir):
                    yield entry
                elif not entry.name.startswith("."):
                    stack.append(entry.path)


def _is_image(entry: os.DirEntry[str]) -> bool:
    extension = os.fsencode(os.path.splitext(entry.name)[1].lower())
    if entry.name.startswith(".") or extension not in EXTENSIONS or not is_kind(entry.is_file):
        return False
    return extension != b".png" or not is_marked(entry.path)


def sub_folders(folder: Path) -> list[str]:
    """Return the names of the visible sub-folders; none if the folder cannot be read, which the scan reports."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_kind(entry.is_dir))
    except OSError:
        return []
