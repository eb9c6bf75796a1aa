"""Files and folders that are being written: owned by a kernel lock, and removed if their writer has ended.

A lock of the kernel ends with its process, so that what a killed process left is recognised at once, also if its
process id is in use again.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TRIES = 10  # to own a new folder

_unfinished: set[Path] = set()
"""What this process is writing."""


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Own a new file or folder within the context; if that ends by an exception, or the process by `leave`, remove it.

    Raises:
        FileNotFoundError: If another thread or process has removed it before it was owned.
    """
    handle = _locked(path, wait=True)
    try:
        there = os.stat(path)
        if handle is not None and not os.path.samestat(os.fstat(handle), there):  # what is there belongs to another
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        _unfinished.add(path)
        try:
            yield
        except BaseException:
            _remove(path)
            raise
        finally:
            _unfinished.discard(path)
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[bool]:
    """Create a folder that the work renames; yield False if another thread or process is writing it.

    What a dead process left there is removed. So may be what is new and not yet owned, by `remove_abandoned` of another
    thread or process: then the folder is created again.
    """
    with ExitStack() as stack:
        for left in reversed(range(_TRIES)):
            if not (mine := _make(path) or (bool(remove_abandoned(path)) and _make(path))):
                break
            try:
                stack.enter_context(unfinished(path))
                break
            except FileNotFoundError:
                if not left:
                    raise
        yield mine


def remove_abandoned(path: Path) -> bool | None:
    """Remove an unfinished file or folder if its writer has ended.

    Returns:
        Whether it was removed; None if it is unknown whether the writer has ended.
    """
    if path.is_symlink():  # no writer makes links: its target must not be opened
        _remove(path)
        return not path.is_symlink()
    try:
        handle = _locked(path, wait=False)
    except BlockingIOError:
        return False
    if handle is None:
        return None
    try:
        _remove(path)
    finally:
        os.close(handle)
    return not path.exists()


def remove_unfinished() -> None:
    """Remove what this process is writing, before it ends without unwinding its stack."""
    for path in list(_unfinished):
        _remove(path)


def _make(path: Path) -> bool:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _locked(path: Path, wait: bool) -> int | None:
    """Return a handle that holds the lock of a file or folder, None without locks; BlockingIOError if it is held."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # some network file systems need RDWR
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
