"""Lists of image files with labels: CSV, TSV and plain text.

CSV and TSV with a header: the columns `path`, `label` and `split` (`COLUMNS` lists other names), or those that the
settings name; other columns are ignored. CSV and TSV without a header: a path and optionally a label.
Text: each line has a path with an image file extension and optionally a label after a tab, a comma or a space. A CSV
file may be separated by semicolons. Labels are read as `labels` describes.
"""

import csv
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from inbatch.data.source import Reading, Source
from inbatch.data.sources.folder_scan import EXTENSIONS
from inbatch.data.sources.groups import groups_of_values
from inbatch.data.sources.labels import NO_LABELS, Distinct, Labels, number, printable_name
from inbatch.data.sources.path_source import PathsSource
from inbatch.data.sources.split_names import arranged, split_of
from inbatch.errors import DataError

COLUMNS = {
    "path": ("path", "image", "file", "filename", "filepath", "file_name", "file_path", "image_path"),
    "label": ("label", "class", "target"),
    "split": ("split",),
    "group": (),
}
"""Accepted column names, not case-sensitive; a column of groups is used only if a setting names it."""

_ENDINGS = "|".join(re.escape(extension.decode()) for extension in EXTENSIONS)
# the longest prefix with an image file extension
_LINE = re.compile(rf"(.*(?:{_ENDINGS}))(?:\s*[\t, ]\s*(.*))?", re.IGNORECASE)


class Row(NamedTuple):
    """One image of a list; fields that the list does not give are empty."""

    line: int
    path: str
    label: str
    split: str
    group: str = ""


def find_file_list(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a `.csv`, `.tsv` or `.txt` list of images: one split, or those of its column `split`."""
    if not isinstance(data, str | os.PathLike):
        return None
    file = Path(data)
    if file.suffix.lower() not in (".csv", ".tsv", ".txt") or not file.is_file():
        return None
    if file.suffix.lower() == ".txt" and not _lists_images(file):
        return None
    if not _has_splits(file, reading):
        return {"train": lambda: _open(file, None, reading)}
    names = {_word(row.split): row.line for row in _rows(file, reading)} or {"train": 0}
    if "" in names:
        raise DataError(f"{str(file)!r}, line {names['']}: the column split is empty; write train or test there")
    training = [name for name in names if split_of(name) == "train"]
    if len(training) > 1:
        raise DataError(
            f"{str(file)!r}: the column split has {' and '.join(map(repr, training))}, which both name training "
            "images: write one of them"
        )
    return arranged({name: partial(_open, file, name, reading) for name in names})


def _word(split: str) -> str:
    """Return a value of the column split; the words of the splits are equal in any letter case."""
    return split.lower() if split_of(split) else split


def _open(file: Path, split: str | None, reading: Reading) -> Source:
    rows = list(_rows(file, reading))
    if not rows:
        raise DataError(f"{str(file)!r} lists no image: write a path on each line")
    labels = _labels(rows, str(file))
    mine = [i for i, row in enumerate(rows) if split is None or _word(row.split) == split]
    known = bool((labels.numbers[mine] >= 0).any())
    name, paths = str(file) if split is None else f"{file} ({split})", (_checked(rows[i], file) for i in mine)
    source = PathsSource(name, file.parent, paths, labels.numbers[mine], labels.classes if known else (), reading)
    source.ids, source.label_note = labels.ids if known else None, labels.note
    if reading.group_column is not None:
        source.groups = groups_of_values([row.group for row in rows], f"The groups in {str(file)!r}")[mine]
    return source


def _rows(file: Path, reading: Reading) -> Iterator[Row]:
    """Iterate over the images of a list in order; raise DataError with the line number if a line cannot be read."""
    try:
        with _opened(file) as lines:
            yield from _text(lines, file, reading) if _is_text(file) else _table(lines, file, reading)
    except OSError as e:
        raise DataError(f"{str(file)!r} cannot be read: {e.strerror}") from e


def _is_text(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _opened(file: Path) -> TextIO:
    # Names that are not UTF-8 keep their bytes. The byte order mark that Windows writes is not part of the text.
    newline = None if _is_text(file) else ""
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _text(lines: Iterator[str], file: Path, reading: Reading) -> Iterator[Row]:
    if _names_columns(reading):
        raise DataError(
            f"{str(file)!r} has no columns with names: leave out image_column, label_column and group_column"
        )
    labelled = reading.label_column is None
    for at, line in enumerate(lines, 1):
        if line.strip():
            match = _LINE.fullmatch(line.strip("\n"))
            if not match:
                raise DataError(
                    f"{str(file)!r}, line {at}: no name of an image ({_ENDINGS.replace(chr(92), '')}) in "
                    f"'{printable_name(line.strip())}'; other names can be listed in a .csv file"
                )
            yield Row(at, match[1], (match[2] or "").strip() if labelled else "", "")


def _table(lines: Iterator[str], file: Path, reading: Reading) -> Iterator[Row]:
    separator = _separator(file, reading)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    place: dict[str, int] | None = None
    width = 0
    first: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if place is None:
                place, width = _header(cells, reading), len(cells)
                if place:
                    continue
                if _names_columns(reading):
                    raise _no_column(file, cells, reading)
                if width > 2:
                    raise DataError(
                        f"{str(file)!r} has {width} columns: name them in its first line: path, label, split"
                    )
                place = {"path": 0, "label": 1} if width == 2 and reading.label_column is None else {"path": 0}
                first = cells
            if len(cells) != width:
                raise DataError(
                    f"{str(file)!r}, line {reader.line_num}: {len(cells)} columns, the first line has {width}; "
                    "put names with a separator in them into quotes"
                )
            if first and cells is not first:
                _check_no_header(file, first, cells)
                first = []
            values = {what: cells[at] for what, at in place.items()}
            label, split = values.get("label", "").strip(), values.get("split", "").strip()
            yield Row(reader.line_num, values["path"], label, split, values.get("group", ""))
    except csv.Error as e:
        raise DataError(f"{str(file)!r}, line {reader.line_num}: {e}") from e


def _names_columns(reading: Reading) -> bool:
    """Return whether the settings name a column."""
    named = reading.image_column or reading.group_column or reading.label_column not in (None, NO_LABELS)
    return bool(named)


def _header(cells: list[str], reading: Reading) -> dict[str, int]:
    """Return the positions of the columns that are used, empty if this is not a header that has them."""
    names = [cell.strip().lower() for cell in cells]
    requested = {"path": reading.image_column, "label": reading.label_column, "group": reading.group_column}
    positions: dict[str, int] = {}
    for what, usual in COLUMNS.items():
        column = requested.get(what)
        words = usual if column is None else (column.strip().lower(),)
        if column != NO_LABELS and (at := next((i for i, name in enumerate(names) if name in words), None)) is not None:
            positions[what] = at
        elif column not in (None, NO_LABELS):
            return {}
    return positions if "path" in positions else {}


def _check_no_header(file: Path, first: list[str], second: list[str]) -> None:
    """Raise DataError if the first line of a list names columns: the next one has the name of an image, it has not."""
    if _LINE.fullmatch(second[0].strip()) and not _LINE.fullmatch(first[0].strip()):
        columns = ", ".join(f"'{printable_name(cell.strip())}'" for cell in first)
        raise DataError(
            f"{str(file)!r} has the columns {columns}, and none is called {', '.join(COLUMNS['path'])}: name that of "
            "the images with image_column (--image-column), or rename it"
        )


def _no_column(file: Path, cells: list[str], reading: Reading) -> DataError:
    """Return the error for a list that lacks a column which the settings name."""
    requested = {key: getattr(reading, key) for key in ("image_column", "label_column", "group_column")}
    settings = ", ".join(f"{key} = {name!r}" for key, name in requested.items() if name is not None)
    columns = ", ".join(f"'{printable_name(cell.strip())}'" for cell in cells)
    return DataError(f"{str(file)!r} has no columns for {settings}; its first line has {columns}")


def _separator(file: Path, reading: Reading) -> str:
    """Return the separator of a table: a tab in a .tsv file; in a .csv file a semicolon if the first line shows it."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    with _opened(file) as lines:
        line = next((line for line in lines if line.strip()), "")
    try:
        by_comma, by_semicolon = (next(csv.reader([line], delimiter=separator), []) for separator in ",;")
    except csv.Error:  # reading the whole file reports the line
        return ","
    if len(by_comma) > 1 or len(by_semicolon) < 2:
        return ","
    # A file name may contain a semicolon: without a header, the first cell must be the name of an image.
    return ";" if _header(by_semicolon, reading) or _LINE.fullmatch(by_semicolon[0].strip()) else ","


def _has_splits(file: Path, reading: Reading) -> bool:
    """Return whether the first line of a list that is not empty has a column of splits."""
    if _is_text(file):
        return False
    try:
        with _opened(file) as lines:
            rows = csv.reader(lines, delimiter=_separator(file, reading), skipinitialspace=True)
            first = next(filter(None, rows), [])
    except (OSError, csv.Error):  # reading the whole file reports it
        return False
    return "split" in _header(first, reading)


def _lists_images(file: Path) -> bool:
    """Return whether the first non-empty line of a text names an image."""
    try:
        with _opened(file) as lines:
            first = next((line for line in lines if line.strip()), "")
    except OSError:
        return False
    return bool(_LINE.fullmatch(first.strip("\n")))


def _labels(rows: list[Row], name: str) -> Labels:
    """Return the labels of all rows, of every split."""
    labels = Distinct()
    for row in rows:
        labels.append(row.label)
    return number(labels.codes, labels.values, f"The labels in {name!r}")


def _checked(row: Row, file: Path) -> str:
    """Return the path of a row; raise DataError if it is invalid or outside the list's folder."""
    wrong = None
    if not row.path or "\0" in row.path:
        wrong = "not the name of a file"
    elif os.pardir in row.path and _is_outside(row.path):
        wrong = "outside the list's folder; give absolute paths to files elsewhere"
    if wrong:
        raise DataError(f"{str(file)!r}, line {row.line}: '{printable_name(row.path)}' is {wrong}")
    return row.path


def _is_outside(path: str) -> bool:
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == os.pardir
