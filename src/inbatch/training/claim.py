"""Claim the directory of a new run: of several starts at the same time, one gets it and the others are refused.

A check at the start refuses a run before minutes are spent. Another process can take the directory afterwards, so it is
checked again under its lock, before anything is removed or written.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from inbatch.errors import ConfigError
from inbatch.runtime.files import cannot_write, check_writable
from inbatch.training.side_files import FILES, FOLDERS

RunIdentity = tuple[int, int] | None
"""Identity of the run in a directory (of its recipe.json); None without a run."""


def run_identity(folder: Path | None) -> RunIdentity:
    """Return the identity of the run in a directory, which changes if another run starts there."""
    if folder is None:
        return None
    try:
        status = (folder / "recipe.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def check_free(folder: Path) -> None:
    """Raise ConfigError if a directory holds a run, or anything else that a new run would replace."""
    if (folder / "recipe.json").exists():
        raise ConfigError(
            f"{folder} already holds a run: continue it (--resume {folder}), replace it (--overwrite), "
            "or choose another --output-dir"
        )
    if names := [name for name in (*FILES, *FOLDERS) if (folder / name).exists()]:
        raise ConfigError(
            f"{folder} holds {', '.join(names)}, which a run would replace: choose another --output-dir, or replace "
            "them (--overwrite)"
        )


def check_place(folder: Path) -> None:
    """Raise InbatchError now if a directory could not be created or written later; nothing is created."""
    place = folder.absolute()
    check_writable(next(path for path in (place, *place.parents) if os.path.exists(path)) / "run.lock")


def check_unchanged(folder: Path, before: RunIdentity) -> None:
    """Raise ConfigError if another process has started or continued a run in a directory since `before`.

    Args:
        folder: Run directory, locked by the caller.
        before: `run_identity(folder)` at the start of the command.
    """
    if run_identity(folder) != before:
        raise ConfigError(
            f"another process has used {folder} for a run while this one was prepared, and nothing was changed: choose "
            f"another --output-dir, or continue that run (--resume {folder})"
        )


def claim(folders: Iterable[Path]) -> Path:
    """Create the first of these directories that does not exist, and return it; no other process gets the same one.

    Raises:
        InbatchError: If a directory cannot be created.
    """
    for folder in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise cannot_write(folder, error) from error
        return folder
    raise ConfigError("every directory exists: choose another --output-dir")


def numbered(stem: Path, first: int = 1) -> Iterator[Path]:
    """Yield STEM-1, STEM-2, ..."""
    return (Path(f"{stem}-{number}") for number in count(first))
