"""Writing a run's folder so that a kill, a full disk or a second run leaves nothing half done."""

import errno
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from inbatch.errors import ConfigError, DataError, InbatchError


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` in one step, once it is on the disk completely.

    keep: where the old file goes instead of being replaced. After a kill either `path` or `keep` is whole.
    A missing folder is made; where `path` is a link, the file that it names is replaced, not the link.
    Raises InbatchError with the path and the space left where it cannot be written; `path` is then untouched.
    """
    place = Path(os.path.realpath(path)) if os.path.islink(path) else path
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        _replaceable(place)
        with suppress(FileNotFoundError):  # of a dead process that had this number
            temporary.unlink()
        with open(temporary, "x+b") as file:  # x: never through a link that somebody laid there
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and place.exists():
            os.replace(place, keep)
        os.replace(temporary, place)
        _sync_folder(place.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def check_writable(path: Path) -> None:
    """InbatchError now for a file that could not be written when the work is done."""
    try:
        with TemporaryFile(dir=_replaceable(Path(os.path.realpath(path)))):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _replaceable(path: Path) -> Path:
    """The folder of a file to be written, made where it is missing; OSError where something else has its name."""
    if path.exists() and not path.is_file():  # a rename would take the place of /dev/null, too
        raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "it exists, and is no regular file")
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is; Windows opens no folders, and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cannot_write(path: Path, error: OSError) -> InbatchError:
    """The error to raise for a file that could not be written."""
    try:
        space = f"{shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there"
    except OSError:
        space = "its folder cannot be read"
    return InbatchError(
        f"Cannot write {path}: {error.strerror or error} ({space}). What was there before is untouched. "
        "Make room, or choose another folder for the run."
    )


@contextmanager
def out_of_room(folder: Path) -> Iterator[None]:
    """Whoever finds the disk full, read-only or broken inside says so as `cannot_write` does."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES):
            raise
        raise cannot_write(Path(error.filename) if error.filename else folder / "a file of the run", error) from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: numbers that it does not know (nan, inf) become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        return [finite(item) for item in x] if isinstance(x, (list, tuple)) else x

    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    text = to_json(value, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a name that is not UTF-8: JSON reads the escape back


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; DataError where it cannot be read or holds none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} cannot be read: it holds no JSON object")
    return found


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Be the only writer of a run's folder, and remove what a killed writer left half written.

    Yields a sentence for the user where a last writer ended without letting go, or the file system has no locks.
    The lock is the kernel's, so it ends with its process, however that ends; the file says whose it is.
    Raises ConfigError where another process holds the folder.
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
        for left in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):  # checkpoints lie a folder down
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
    # A data worker that outlives a killed run for some seconds must not hold the run's folder.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=file.close)
    last = file.read()
    return f"{folder} was last written by {last}, which ended without finishing; its lock is void." if last else None


def open_regular(path: str | Path) -> BinaryIO:
    """A file to read from; OSError for a pipe or a device, at which a plain open() would wait for ever."""
    wait_not = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_not))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError("it is no regular file")
