"""Folders of image files; files left out are counted and reported."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.pixels import Levels
from inbatch.data.source import Reading, Source, path_text, stat_fingerprint, unlabelled
from inbatch.data.sources.folder_scan import EXTENSIONS, is_kind, scan
from inbatch.errors import DataError, many
from inbatch.runtime.paths import path_of

TESTS = ("test", "val", "validation")
"""Names of the split that is not trained on; the first one present becomes `test`."""


class FolderSource(Source):
    """Images of a folder, decoded on demand.

    Images are labelled by first-level sub-folder if every image is in one and there are at least two of them.

    Args:
        root: Folder to scan.
        channels: Number of channels to decode to.
        classes: Fixed numbering of the classes, so that a test split uses that of its train split.
        levels: See `Reading`.

    Raises:
        DataError: If there is no image, or if a class is not in `classes`.
    """

    def __init__(self, root: Path, channels: int = 3, classes: tuple[str, ...] = (), levels: Levels | None = None):
        self.root, self.scan, self.levels = root, scan(root), levels
        paths = self.scan.paths
        if not len(paths):
            kinds = " ".join(e.decode() for e in EXTENSIONS)
            raise DataError(f"No image under {str(root)!r}{self._left_out()}: put files with {kinds} there")
        heads: dict[bytes, int] = {}
        every = (path.partition(b"/")[0] if b"/" in path else b"" for path in paths)
        numbers = np.fromiter((heads.setdefault(head, len(heads)) for head in every), np.int64, len(paths))
        self._labelled = len(heads) > 1 and b"" not in heads
        if not self._labelled:
            super().__init__(str(root), channels, unlabelled(len(paths)), ())
            return
        names = tuple(path_text(head) for head in sorted(heads))
        classes = classes or names
        if unknown := sorted(set(names) - set(classes)):
            raise DataError(f"{str(root)!r} holds classes that the train split lacks: {', '.join(unknown[:5])}")
        place = {name: i for i, name in reversed([*enumerate(classes)])}
        label = torch.tensor([place[path_text(head)] for head in heads])
        super().__init__(str(root), channels, label[torch.from_numpy(numbers)], classes)

    def open(self, i: int) -> ImageFile:
        return ImageFile(self._path(i), lambda: os.path.join(self.name, self.identity(i)), self.channels, self.levels)

    def identity(self, i: int) -> str:
        return path_text(self.scan.paths[i])

    def fingerprint(self) -> str | None:
        said = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogateescape"))
        for i, path in enumerate(self.scan.paths):
            try:
                status = os.stat(self._path(i))
            except OSError:  # removed since the scan; opening the image reports it
                return None
            said.update(stat_fingerprint(path, status))
        return said.hexdigest()

    def skipped(self) -> dict[str, int]:
        return {path_text(os.fsencode(kind)): count for kind, count in self.scan.skipped.most_common()}

    def _path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.scan.paths[i]))

    def report(self) -> str:
        kind = (
            f"{len(self.classes)} classes (the first-level sub-folders)"
            if self._labelled
            else "unlabelled (not every image lies in one of at least two sub-folders)"
        )
        return f"{self.name}: {many(len(self), 'image')} found{self._left_out()}; {kind}"

    def _left_out(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.scan.skipped.most_common(5))
        skipped = f", {many(self.scan.skipped.total(), 'other file')} skipped ({kinds})" if kinds else ""
        bad = self.scan.unreadable
        return skipped + (f", {many(len(bad), 'unreadable folder')} ({'; '.join(bad[:3])})" if bad else "")


def find_folder(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a folder: its `train` and `test`, `val` or `validation`, else the folder itself as `train`."""
    if not isinstance(data, str | os.PathLike) or not (root := Path(data)).is_dir():
        return None
    depth, levels = file_channels(reading.channels), reading.levels
    inside = {entry.name for entry in os.scandir(root) if is_kind(entry.is_dir) and not entry.name.startswith(".")}
    test = next((name for name in TESTS if name in inside), None)
    # A class may be named "train", so that name among other sub-folders does not define a split.
    if "train" not in inside or (test is None and inside != {"train"}):
        return {"train": lambda: FolderSource(root, depth, levels=levels)}
    splits: dict[str, Callable[[], Source]] = {"train": lambda: FolderSource(root / "train", depth, levels=levels)}
    if test:
        splits["test"] = lambda: FolderSource(root / test, depth, FolderSource(root / "train", depth).classes, levels)
    return splits


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
    safe = _NO_NAME.sub(lambda found: f"%{ord(found[0]):02X}", name) or "%"
    kept = safe.encode(errors="backslashreplace")
    if len(kept) <= 240:
        return safe
    return f"{kept[:200].decode(errors='ignore')}%{hashlib.sha256(kept).hexdigest()[:32]}"
