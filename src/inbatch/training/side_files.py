"""Files that a run writes but does not need to resume: run.json and metrics.jsonl, read without trust.

A line or a value of another form is dropped, and the caller gets a sentence about it.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from inbatch.errors import DataError, many
from inbatch.runtime.files import cannot_write, read_json

FOLDERS = (
    "checkpoints",
    "initial",
    "teacher",
    "encoder",
    "heads",
    "tensorboard",
    "trackers",
    "inspect",
    "nan_capture",
    "features",
)
FILES = (
    "recipe.json", "run.json", "data.json", "metrics.jsonl", "curves.png", "result.json", "bad_images.txt",
    "evaluation.json", "quickstart.json", "neighbours.png", "trackers.json",
)  # fmt: skip
"""Names of the folders and files of a run in its directory."""

Record = dict[str, Any]
"""A line of metrics.jsonl: "step", and other numbers or None."""

_HUGE = 1e308


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


_REPORT: dict[str, Callable[[Any], bool]] = {
    "status": lambda value: isinstance(value, str),
    "reason": lambda value: isinstance(value, str),
    "last_step": lambda value: type(value) is int and value >= 0,
    "steps": _count,
    "context": _count,
    "world": _count,
    "launch": lambda value: isinstance(value, str),
}
"""Entries of run.json that are read, each with the test of its value."""


def report_of(folder: Path) -> dict[str, Any]:
    """Return the valid entries of a run's run.json; empty if there is none, or if it is damaged (`damaged`)."""
    try:
        content = read_json(folder / "run.json")
    except DataError:
        return {}
    return {key: content[key] for key, valid in _REPORT.items() if key in content and valid(content[key])}


def damaged(folder: Path) -> list[str]:
    """Return a sentence for each damaged file that a resumed run writes again."""
    sentences = []
    for path in (folder / "run.json", folder / "data.json"):
        try:
            read_json(path)
        except DataError as error:
            if path.exists():
                sentences.append(f"{error}; it is not needed, and the run writes it again.")
    return sentences


def read_log(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Yield the lines of a metrics.jsonl, each with its record; None if the line is damaged or of another form.

    Raises:
        OSError: If the file cannot be read.
    """
    for line in path.read_bytes().splitlines():
        yield line, parse_record(line)


def parse_record(line: bytes) -> Record | None:
    """Return the record in a line of metrics.jsonl; None if the line is damaged or of another form."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return False
    return all(x is None or (type(x) in (int, float) and -_HUGE <= x <= _HUGE) for x in record.values())


def damaged_lines(path: Path, count: int) -> str:
    """Return a sentence about lines that were dropped."""
    return f"{path}: {many(count, 'damaged line')} dropped; the log is not needed to resume."


def move_aside(folder: Path) -> list[str]:
    """Rename what has the name of a run's file but is a folder, or the reverse; return a sentence for each.

    Raises:
        InbatchError: If it cannot be renamed.
    """
    sentences = []
    for name, valid in [*((name, Path.is_file) for name in FILES), *((name, Path.is_dir) for name in FOLDERS)]:
        path = folder / name
        if not path.exists() or valid(path):
            continue
        names = (path.with_name(f"{name}.damaged{'' if i == 1 else f'-{i}'}") for i in count(1))
        aside = next(new for new in names if not new.exists())
        try:
            path.rename(aside)
        except OSError as error:
            raise cannot_write(path, error) from error
        kind = "file" if name in FILES else "folder"
        sentences.append(f"{path} is not a {kind}; it was renamed to {aside.name}.")
    return sentences
