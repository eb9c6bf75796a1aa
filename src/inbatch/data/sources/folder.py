"""Folders of image files: scanned by our own scanner (`scan`), which counts what it leaves out and says so."""

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
from inbatch.data.source import Reading, Source, unlabelled
from inbatch.data.sources.folder_scan import EXTENSIONS, is_kind, scan
from inbatch.errors import DataError, many

TESTS = ("test", "val", "validation")
"""Names of the split that is not trained on; the first that exists is `test`."""


class FolderSource(Source):
    """The images of a folder, decoded when asked for.

    Labelled by first-level sub-folder if every image lies in one and there are at least two of them.
    `classes` fixes the numbering (a test split counts as its train split does).
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
        names = tuple(_text(head) for head in sorted(heads))
        classes = classes or names
        if unknown := sorted(set(names) - set(classes)):
            raise DataError(f"{str(root)!r} holds classes that the train split lacks: {', '.join(unknown[:5])}")
        place = {name: i for i, name in reversed([*enumerate(classes)])}
        label = torch.tensor([place[_text(head)] for head in heads])
        super().__init__(str(root), channels, label[torch.from_numpy(numbers)], classes)

    def open(self, i: int) -> ImageFile:
        return ImageFile(self._path(i), lambda: os.path.join(self.name, self.identity(i)), self.channels, self.levels)

    def identity(self, i: int) -> str:
        return _text(self.scan.paths[i])

    def fingerprint(self) -> str | None:
        said = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogateescape"))
        for i, path in enumerate(self.scan.paths):
            try:
                status = os.stat(self._path(i))
            except OSError:  # gone since; opening it will say so
                return None
            said.update(b"%s\0%d\0%d\0" % (path, status.st_size, status.st_mtime_ns))
        return said.hexdigest()

    def skipped(self) -> dict[str, int]:
        return {_text(os.fsencode(kind)): count for kind, count in self.scan.skipped.most_common()}

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
    """The splits of a folder: its `train` and `test`, `val` or `validation`, else itself as `train`."""
    if not isinstance(data, str | os.PathLike) or not (root := Path(data)).is_dir():
        return None
    depth, levels = file_channels(reading.channels), reading.levels
    inside = {entry.name for entry in os.scandir(root) if is_kind(entry.is_dir) and not entry.name.startswith(".")}
    test = next((name for name in TESTS if name in inside), None)
    # A class may be called "train", so the word alone, among other sub-folders, makes no split.
    if "train" not in inside or (test is None and inside != {"train"}):
        return {"train": lambda: FolderSource(root, depth, levels=levels)}
    splits: dict[str, Callable[[], Source]] = {"train": lambda: FolderSource(root / "train", depth, levels=levels)}
    if test:
        splits["test"] = lambda: FolderSource(root / test, depth, FolderSource(root / "train", depth).classes, levels)
    return splits


def write_folder(source: Source, directory: str | os.PathLike) -> Path:
    """Every image as PNG, in a sub-folder per class (none if unlabelled); the directory must not hold files.

    What a class's name holds that a folder's cannot, is written as %XX: no name leads out of the directory.
    """
    root = Path(directory)
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{str(root)!r} is not empty: name a new directory")
    for i, label in enumerate(source.labels.tolist()):
        folder = root / _folder_name(source.classes[label]) if label >= 0 else root
        folder.mkdir(parents=True, exist_ok=True)
        pixels = source.image(i).permute(1, 2, 0).numpy()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(folder / f"{i:06d}.png")
    return root


_NO_NAME = re.compile(r"""[%/\\<>:"|?*\x00-\x1f\x7f]|^[. ]|[. ]$|^(?=(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)).""", re.I)
"""What some file system takes for a separator, a command, a device or the folder above, and % itself."""


def _folder_name(name: str) -> str:
    """The name of a class as that of one folder; of 240 bytes at most, and of its own even then."""
    safe = _NO_NAME.sub(lambda found: f"%{ord(found[0]):02X}", name) or "%"
    kept = safe.encode(errors="backslashreplace")
    if len(kept) <= 240:
        return safe
    return f"{kept[:200].decode(errors='ignore')}%{hashlib.sha256(kept).hexdigest()[:32]}"


def _text(path: bytes) -> str:
    """A name that can be printed and stored whatever bytes it is made of."""
    return path.decode("utf-8", "backslashreplace")
