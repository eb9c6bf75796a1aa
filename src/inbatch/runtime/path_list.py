"""Several paths or patterns as one text, separated as in the environment variable PATH."""

import glob
import os
from collections.abc import Sequence
from typing import Any

from inbatch.errors import ConfigError
from inbatch.runtime.paths import expanded
from inbatch.runtime.remote import is_url, public


def joined_paths(data: Any) -> Any:
    """Return a list or tuple of paths as one text, and everything else unchanged; `~` is the home directory.

    Raises:
        ConfigError: If one of several paths is empty or contains the separator.
    """
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        return expanded(data)
    if not all(isinstance(path, str | os.PathLike) for path in data):
        return data
    texts = [os.fspath(expanded(path)) for path in data]
    if len(texts) == 1:
        return texts[0]
    for text in texts:
        if is_url(text):
            raise ConfigError(
                f"{public(text)!r} cannot be one of several paths: name the files behind URLs by one range or pattern, "
                "such as s3://bucket/train-{000..099}.tar"
            )
        if not text or os.pathsep in text:
            raise ConfigError(
                f"{text!r} cannot be one of several paths, which are separated by {os.pathsep!r}: rename it, or list "
                "the images in a .csv file"
            )
    return os.pathsep.join(texts)


def listed_paths(text: str) -> list[str]:
    """Return the paths and patterns in a text; a text that exists, or does not begin with a path, is the only one."""
    parts = [expanded(part) for part in text.split(os.pathsep)]
    return parts if not os.path.exists(text) and _is_path(parts[0]) else [text]


def check_not_read(out: str | os.PathLike[str], *inputs: Any) -> None:
    """Raise ConfigError if a file to be written is one that the command reads, which it would replace.

    Args:
        out: File to write.
        *inputs: What the command reads: paths, lists of them, or other objects, which are ignored.
    """
    if not os.path.exists(place := expanded(out)):
        return
    for value in inputs:
        paths = joined_paths(value)
        if not isinstance(paths, str | os.PathLike):
            continue
        for path in listed_paths(os.fspath(paths)):
            if os.path.exists(path) and os.path.samefile(path, place):
                raise ConfigError(f"{out} is read by this command, which would replace it: name another file to write")


def is_pattern(text: str) -> bool:
    """Return whether a text contains wildcards (`*`, `?`, `[...]`) and is not itself the name of a file."""
    return glob.has_magic(text) and not os.path.exists(text)


def _is_path(text: str) -> bool:
    return os.path.exists(text) or glob.has_magic(text)
