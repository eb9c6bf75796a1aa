"""Folders of exports: written next to their place and moved there complete; foreign folders are never replaced."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, DataError
from inbatch.models.classifier import holds_classifier
from inbatch.models.weights import READOUT
from inbatch.runtime.files import cannot_write, out_of_room, read_json

MANIFEST = "export.json"
"""File with the target, the preprocessing, and the size and SHA-256 of every other file of an export."""
ENCODER_FILES = {"model.safetensors", "config.json", READOUT}
_FEATURES = re.compile(r"features[/\\][0-9a-f]{24}(\.npz|\.json|\.index\.safetensors)")
"""Features that `inbatch search` and others kept in the folder, which they compute again if they are missing."""


def own_files(folder: Path) -> set[str]:
    """Return the paths of the files in a folder, without features that were kept there (`collection.features`)."""
    inside = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return {path for path in inside if not _FEATURES.fullmatch(path)}


def check_free(out: Path, what: set[str] | None = None) -> None:
    """Raise ConfigError unless a path is free, an empty folder, or an export that may be replaced.

    Args:
        out: the path.
        what: names of files; the folder may then only have these, and no manifest.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not _is_free(out, what):
        raise ConfigError(f"{out} exists and is not an exported encoder: choose another folder")


def _is_free(out: Path, what: set[str] | None) -> bool:
    if not out.is_dir() or (out.is_symlink() and what is None):
        return False
    inside = own_files(out)
    if not inside and not any(out.iterdir()):
        return True
    try:
        if inside <= (what or ENCODER_FILES):
            return "inbatch" in read_json(out / "config.json") and not holds_classifier(out)  # the only copy, perhaps
        manifest = read_json(out / MANIFEST) if what is None else {}
        return "inbatch" in manifest and inside <= {MANIFEST, *manifest.get("files", {})}
    except (DataError, TypeError):
        return False


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the context ends without an error, and else is removed.

    Raises:
        ConfigError: if `out` exists and is not an export.
        InbatchError: if it cannot be written.
    """
    check_free(out)
    place = out.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        with out_of_room(out):
            yield new
            new.chmod(0o777 & ~_umask())
            _flush(new)
        _move(new, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move(new: Path, place: Path) -> None:
    """Move a complete folder to its place; what was there is moved away first and then removed."""
    old = new.with_name(new.name.removesuffix(".tmp") + ".old")
    try:
        if place.exists():
            os.rename(place, old)
        try:
            os.rename(new, place)
        except OSError:
            with suppress(OSError):
                os.rename(old, place)
            raise
    except OSError as error:  # also a mount point, which cannot be moved
        raise cannot_write(place, error) from error
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Write the files of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def contents(folder: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of every file of a folder, by its path within the folder."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": digest}
    return files
