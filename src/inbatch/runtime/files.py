"""Atomic writes to a run directory: a kill, a full disk or a second run leaves no partial file."""

import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.runtime.unfinished import remove_abandoned, unfinished

_TRIES = 10  # to own a new file

_writing: set[Path] = set()
"""Unfinished files of this process, by which they differ from those of a dead process with the same id."""


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a new file that replaces `path` atomically after it is completely on the disk.

    A missing folder is created; if `path` is a link, its target is replaced, not the link. Threads and processes may
    write the same file at the same time: each has a new file of its own, and the last one to finish replaces `path`.

    Files that dead processes left next to it, unfinished versions of the same file, are removed.

    Args:
        path: file to replace.
        keep: where the old file is moved instead of being replaced. After a kill, either `path` or `keep` is intact.

    Raises:
        InbatchError: if the file cannot be written, with the path and the free space; `path` is then unchanged.
    """
    place = Path(os.path.realpath(path)) if os.path.islink(path) else path
    try:
        _replaceable(place)
        for left in _temporaries(place):
            if remove_abandoned(left) is None and left not in _writing and left.name.split(".")[-3] == str(os.getpid()):
                left.unlink(missing_ok=True)  # without locks: left by a dead process with the same id
        with _new_file(place) as (temporary, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name != "posix":  # an open file could not be renamed
                file.close()
            if keep is not None:
                with suppress(FileNotFoundError):
                    os.replace(place, keep)
            os.replace(temporary, place)
        _sync_folder(place.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def _new_file(place: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Create a file next to another one, under a name that no other writer has, and own it within the context.

    Another writer may take it for abandoned, and remove it, before it is owned: then another one is created.
    """
    with ExitStack() as stack:
        for left in reversed(range(_TRIES)):
            temporary = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
            _writing.add(temporary)
            stack.callback(_writing.discard, temporary)
            file = stack.enter_context(open(temporary, "x+b"))  # x: never through an existing link
            try:
                stack.enter_context(unfinished(temporary))
                break
            except FileNotFoundError:
                if not left:
                    raise
        yield temporary, file


def _temporaries(place: Path) -> list[Path]:
    """Return the unfinished versions of a file, of this and of other processes."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        return [place.with_name(name) for name in os.listdir(place.parent) if pattern.fullmatch(name)]
    return []


def check_writable(path: Path) -> None:
    """Raise InbatchError now if a file could not be written later."""
    try:
        with TemporaryFile(dir=_replaceable(Path(os.path.realpath(path)))):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _replaceable(path: Path) -> Path:
    """Return the folder of a file to be written, created if missing; OSError if the path is not a regular file."""
    if path.exists() and not path.is_file():  # a rename would replace /dev/null, too
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "it exists and is not a regular file")
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk by its folder; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""Errors of a path that no free space would make writable."""


def cannot_write(path: Path, error: OSError) -> InbatchError:
    """Return the error for a file that could not be written."""
    if error.errno in (errno.EISDIR, errno.EINVAL):
        return InbatchError(f"Cannot write {path}: {error.strerror or error}. Name another file.")
    if error.errno in _NO_PLACE:
        return InbatchError(f"Cannot write {path}: {error.strerror or error}. Choose another folder.")
    try:
        space = f"{shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        space = "its folder cannot be read"
    return InbatchError(
        f"Cannot write {path}: {error.strerror or error} ({space}). The previous file is unchanged. "
        "Free some space, or choose another folder."
    )


@contextmanager
def out_of_room(folder: Path) -> Iterator[None]:
    """Raise `cannot_write` for errors of a full, read-only or broken disk within the context."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES):
            raise
        raise cannot_write(Path(error.filename) if error.filename else folder / "a file of the run", error) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: numbers that it does not support (nan, inf) become null.

    Characters that cannot be printed are escaped: a class name could otherwise turn the line of a terminal around.
    """

    def finite(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        return [finite(item) for item in x] if isinstance(x, (list, tuple)) else x

    text = json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    text = to_json(value, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a name that is not UTF-8: JSON reads the escape back


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; DataError if it cannot be read or holds no object."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; restore the file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} cannot be read: it is not a JSON object; restore the file")
    return content


def object_in(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Return the object of this name in the object of a file, empty if it is null or missing; else DataError."""
    part = content.get(name)
    if part is not None and not isinstance(part, dict):
        raise DataError(f"{path} cannot be read: {name!r} is not a JSON object; restore the file")
    return part or {}


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Lock a run directory for writing, and remove partial files of a killed writer.

    Yields a message for the user if the previous writer ended without releasing the lock, or the file system has no
    locks. The lock is the kernel's, so it ends with its process in every case; the file names the process.

    Raises:
        ConfigError: if another process holds the directory.
    """
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closed below, and in forked children
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        note = _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for left in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):  # checkpoints are in a subfolder
            if remove_abandoned(left) is None:  # without locks: this process holds the folder
                left.unlink(missing_ok=True)
        try:
            yield note
        finally:
            file.truncate(0)


def _lock(file: Any, folder: Path) -> str | None:
    file.seek(0)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read() or "another process"
        raise ConfigError(
            f"{folder} is being written by {holder}. Wait for it, stop it, or choose another folder for this run."
        ) from None
    except (ImportError, OSError) as error:
        return f"{folder} cannot be locked ({error}): make sure that no second run writes to it."
    # A data worker that outlives a killed run for some seconds must not hold the run directory.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=file.close)
    last = file.read()
    return f"{folder} was last written by {last}, which ended without finishing; its lock is void." if last else None


@contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this file, and hold it; without locks on this disk, do not wait.

    Raises:
        OSError: if the file cannot be created.
    """
    with open(path, "a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; OSError for a pipe or a device, where a plain open() would block."""
    wait_not = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_not))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError("it is not a regular file")
