"""Errors for users: each message names the problem, the value and the fix, and carries the exit code of the process."""

import difflib
import math
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def type_name(value: object) -> str:
    """Return the type of a value with its module, for messages: "h5py._hl.dataset.Dataset", "int"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def check_whole(name: str, value: object, least: int | None = None) -> None:
    """Raise ConfigError unless an argument is a whole number (also of NumPy), and at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} must be a whole number, not {value!r:.40}")
    if least is not None and value < least:  # type: ignore[operator]
        raise ConfigError(f"{name} must be at least {least}, not {value}")


def check_range(least: float, most: float = math.inf, **values: float) -> None:
    """Raise ValueError for an option of a method that is below `least` or above `most`."""
    for name, value in values.items():
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ValueError(f"{name} must be {limits}, not {value:g}")


class InbatchError(Exception):
    """Base class of all errors that the user can correct; the command line prints them without a traceback."""

    exit_code = 1
    alone = False
    """Whether this process may be the only one of several that reports the error."""


class ConfigError(InbatchError):
    """Wrong usage, unknown or contradictory settings."""

    exit_code = 2


class DataError(InbatchError):
    """Images or labels that cannot be used as requested."""

    exit_code = 3


class TrainingError(InbatchError):
    """Training diverged, collapsed, or did not reach the required result."""

    exit_code = 4


class Unwritten(InbatchError):
    """A result was computed, but a file of it cannot be written.

    Args:
        message: text of the error, which names the file.
        result: the result.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result or {}


class Preempted(InbatchError):
    """Stopped by any other signal than Ctrl-C; resumable if at least one step was finished and saved."""

    exit_code = 75


class Interrupted(InbatchError):
    """Stopped by Ctrl-C; a checkpoint is saved under the same condition as for `Preempted`."""

    exit_code = 130


class RankError(InbatchError):
    """Another process of the run died, hangs, or ended with an error.

    Args:
        message: text of the error.
        reports_for_all: whether this process is the first of the remaining ones and reports the error for all of them.
    """

    def __init__(self, message: str, reports_for_all: bool = False) -> None:
        super().__init__(message)
        self.reports_for_all = reports_for_all


def many(count: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "6,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


DIVERGED = "the encoder has diverged: train it again with a lower learning rate (--lr)"
PASS_A_RUN = "pass the output directory of inbatch pretrain"
"""Ends of error messages of several packages."""


def not_a_run(folder: Path) -> ConfigError:
    """Return the error of a path that is not the folder of a run, with the reason."""
    why = "it has no recipe.json" if folder.is_dir() else "there is no such folder"
    return ConfigError(f"{folder} is not the folder of a run: {why}; {PASS_A_RUN}")


def listed(words: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first words of a list, and the number of the others."""
    more = len(words) - most
    return separator.join(words[:most]) + (f" and {more:,} more" if more > 0 else "")


def unreadable(count: int) -> str:
    """Return the beginning of a sentence about images that cannot be read."""
    return f"{many(count, 'image')} cannot be read and {'is' if count == 1 else 'are'}"


def reason(error: BaseException) -> str:
    """Return the type and the text of an exception in one line; without a text, the line of code that raised it."""
    kind, text = type(error).__name__, " ".join(str(error).split()).rstrip(".")
    if text:
        return f"{kind}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return kind
    last = next((f for f in reversed(frames) if "torch" not in Path(f.filename).parts), frames[-1])
    return f"{kind} in {Path(last.filename).name}, line {last.lineno}: {last.line}"


def closest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known words that are most similar to a word, in any case of letters, the closest first."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[near] for near in difflib.get_close_matches(word.lower(), by_lower, n=count)]
