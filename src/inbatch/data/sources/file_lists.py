"""Lists of image files with labels: CSV, TSV and plain text.

CSV and TSV with a header: the columns `path` (or image, file, filename, filepath), `label` (class, target) and `split`;
other columns are ignored. CSV and TSV without a header: a path and optionally a label. Text: each line has a path with
an image file extension and optionally a label after a tab, a comma or a space. Labels are integers or names; an empty
label and -1 mean unknown.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from inbatch.data.source import Reading, Source, path_text, unlabelled
from inbatch.data.sources.arrays import check_labels
from inbatch.data.sources.folder_scan import EXTENSIONS
from inbatch.data.sources.path_source import PathsSource
from inbatch.data.sources.split_names import arranged
from inbatch.errors import DataError

COLUMNS = {
    "path": ("path", "image", "file", "filename", "filepath"),
    "label": ("label", "class", "target"),
    "split": ("split",),
}
"""Accepted column names, not case-sensitive."""

_ENDINGS = "|".join(re.escape(extension.decode()) for extension in EXTENSIONS)
# the longest prefix with an image file extension
_LINE = re.compile(rf"(.*(?:{_ENDINGS}))(?:\s*[\t, ]\s*(.*))?", re.IGNORECASE)


class Row(NamedTuple):
    """One image of a list; fields that the list does not give are empty."""

    line: int
    path: str
    label: str
    split: str


def find_file_list(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a `.csv`, `.tsv` or `.txt` list of images: one split, or those of its column `split`."""
    if not isinstance(data, str | os.PathLike):
        return None
    file = Path(data)
    if file.suffix.lower() not in (".csv", ".tsv", ".txt") or not file.is_file():
        return None
    if file.suffix.lower() == ".txt" and not _lists_images(file):
        return None
    if not _has_splits(file):
        return {"train": lambda: _open(file, None, reading)}
    names = {row.split: row.line for row in _rows(file)} or {"train": 0}
    if "" in names:
        raise DataError(f"{str(file)!r}, line {names['']}: the column split is empty; write train or test there")
    return arranged({name: partial(_open, file, name, reading) for name in names})


def _open(file: Path, split: str | None, reading: Reading) -> Source:
    rows = list(_rows(file))
    if not rows:
        raise DataError(f"{str(file)!r} lists no image: write a path on each line")
    labels, classes = _labels(rows, str(file))
    mine = [i for i, row in enumerate(rows) if split is None or row.split == split]
    if not bool((labels[mine] >= 0).any()):
        classes = ()
    name = str(file) if split is None else f"{file} ({split})"
    return PathsSource(name, file.parent, (_checked(rows[i], file) for i in mine), labels[mine], classes, reading)


def _rows(file: Path) -> Iterator[Row]:
    """Iterate over the images of a list in order; raise DataError with the line number if a line cannot be read."""
    try:
        with _opened(file) as lines:
            yield from _text(lines, file) if file.suffix.lower() == ".txt" else _table(lines, file)
    except OSError as e:
        raise DataError(f"{str(file)!r} cannot be read: {e.strerror}") from e


def _opened(file: Path) -> TextIO:
    # Names that are not UTF-8 keep their bytes. The byte order mark that Windows writes is not part of the text.
    newline = None if file.suffix.lower() == ".txt" else ""
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _text(lines: Iterator[str], file: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            match = _LINE.fullmatch(line.strip("\n"))
            if not match:
                raise DataError(
                    f"{str(file)!r}, line {number}: no name of an image ({_ENDINGS.replace(chr(92), '')}) in "
                    f"{_printable(line.strip())}; other names can be listed in a .csv file"
                )
            yield Row(number, match[1], (match[2] or "").strip(), "")


def _table(lines: Iterator[str], file: Path) -> Iterator[Row]:
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    place: dict[str, int] | None = None
    width = 0
    try:
        for cells in reader:
            if not cells:
                continue
            if place is None:
                place, width = _header(cells), len(cells)
                if place:
                    continue
                if width > 2:
                    raise DataError(
                        f"{str(file)!r} has {width} columns: name them in its first line: path, label, split"
                    )
                place = {"path": 0, "label": 1} if width == 2 else {"path": 0}
            if len(cells) != width:
                raise DataError(
                    f"{str(file)!r}, line {reader.line_num}: {len(cells)} columns, the first line has {width}; "
                    "put names with a separator in them into quotes"
                )
            values = {what: cells[at] for what, at in place.items()}
            label, split = values.get("label", "").strip(), values.get("split", "").strip()
            yield Row(reader.line_num, values["path"], label, split)
    except csv.Error as e:
        raise DataError(f"{str(file)!r}, line {reader.line_num}: {e}") from e


def _header(cells: list[str]) -> dict[str, int]:
    """Return the positions of the known columns, empty if this is not a header."""
    names = [cell.strip().lower() for cell in cells]
    found = {
        what: next(i for i, name in enumerate(names) if name in words)
        for what, words in COLUMNS.items()
        if set(words) & set(names)
    }
    return found if "path" in found else {}


def _has_splits(file: Path) -> bool:
    """Return whether the first line of a list has a column of splits."""
    if file.suffix.lower() == ".txt":
        return False
    with _opened(file) as lines:
        try:
            first = next(csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ","), [])
        except csv.Error:  # reading the whole file reports the line
            return False
    return "split" in _header(first)


def _lists_images(file: Path) -> bool:
    """Return whether the first non-empty line of a text names an image."""
    try:
        with _opened(file) as lines:
            first = next((line for line in lines if line.strip()), "")
    except OSError:
        return False
    return bool(_LINE.fullmatch(first.strip("\n")))


def _labels(rows: list[Row], name: str) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return labels (N,) and class names: numbers if every known label is an integer, else the sorted names."""
    given = ["" if row.label == "-1" else row.label for row in rows]
    known = sorted(set(given) - {""})
    if not known:
        return unlabelled(len(rows)), ()
    if not all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in known):
        number = {"": -1} | {label: i for i, label in enumerate(known)}
        return torch.tensor([number[label] for label in given]), tuple(_printable(label, "") for label in known)
    labels = check_labels(torch.tensor([int(label or -1) for label in given]), len(rows), f"The labels in {name!r}")
    return labels, tuple(map(str, range(int(labels.max()) + 1)))


def _checked(row: Row, file: Path) -> str:
    """Return the path of a row; raise DataError if it is invalid or outside the list's folder."""
    wrong = None
    if not row.path or "\0" in row.path:
        wrong = "not the name of a file"
    elif os.pardir in row.path and _leaves(row.path):
        wrong = "outside the list's folder; give absolute paths to files elsewhere"
    if wrong:
        raise DataError(f"{str(file)!r}, line {row.line}: {_printable(row.path)} is {wrong}")
    return row.path


def _leaves(path: str) -> bool:
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir


def _printable(text: str, quote: str = "'") -> str:
    """Return text for a message or a class name, printable for any bytes."""
    return f"{quote}{path_text(text.encode('utf-8', 'surrogateescape'))[:200]}{quote}"
