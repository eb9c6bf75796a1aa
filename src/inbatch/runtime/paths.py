"""Paths that a user gives: checked, and with `~` replaced by the home directory. Does not import torch."""

import os
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError


def path_of(value: Any, name: str = "path") -> Path:
    """Return a path argument or option as a Path, with a leading `~` or `~user` replaced by the home directory.

    Args:
        value: Text or a path object.
        name: Name of the argument, for the message.

    Raises:
        ConfigError: If the value is not a path, is blank, holds a null character, or names an unknown home directory.
    """
    if not isinstance(value, str | bytes | os.PathLike):
        raise ConfigError(f"{name} must be a path (str or pathlib.Path), not {type(value).__name__}")
    text = os.fsdecode(value)
    if not text.strip():
        raise ConfigError(f"{name} is blank: give the path of a file or a folder")
    if "\0" in text:
        raise ConfigError(f"{name} = {text!r} holds a null character, which no path may")
    return Path(expanded(text))


def expanded(value: Any) -> Any:
    """Return text or a path with a leading `~` replaced by the home directory; other values unchanged.

    A file that has such a name is meant first. Raise ConfigError if the home directory is unknown.
    """
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)).startswith("~"):
        return value
    if os.path.lexists(text):
        return value
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: the home directory of this user is not known; write the whole path") from None
    return str(path) if isinstance(value, str) else path


def variable(name: str) -> str:
    """Return an environment variable without surrounding blanks; empty if it is not set or blank."""
    return os.environ.get(name, "").strip()
