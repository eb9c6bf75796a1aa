"""Numbering of the classes of a source: by a file that lists them, or as in another source."""

import re
from typing import Any

import torch

from inbatch.data.source import Source, Subset
from inbatch.errors import DataError, listed
from inbatch.runtime.paths import path_of


def choose(source: Source, file: str) -> Source:
    """Return the images of the classes that a file lists, with labels in the order of the list.

    A line is a class name, or starts with one followed by a space, tab or comma ("n01558993 robin, American robin").
    Empty lines and comments ("#") are ignored.

    Args:
        source: Labelled images.
        file: Text file in UTF-8.

    Raises:
        DataError: If the source has no labels, if a class is unknown or listed twice, or if no image is left.
    """
    if not source.classes:
        raise DataError(
            f"{source.name} has no labels{source.why_unlabelled()}: "
            f"a list of classes ({file!r}) cannot choose among its images; leave it out"
        )
    names = _listed(file, source)
    number = torch.full((len(source.classes) + 1,), -1)
    place = {name: i for i, name in enumerate(source.classes)}
    number[[place[name] for name in names]] = torch.arange(len(names))
    new = number[source.labels]  # -1 indexes the last entry and stays unknown
    chosen = Subset(source, (new >= 0).nonzero()[:, 0], f"the {len(names)} classes that {file} lists")
    if not len(chosen):
        raise DataError(f"{source.name} has no image of the {len(names)} classes that {file!r} lists: list others")
    chosen.labels, chosen.classes = new[new >= 0], names
    chosen.ids = None if source.ids is None else tuple(source.ids[place[name]] for name in names)
    return chosen


def class_ids(images: Any) -> dict[str, int]:
    """Return the integers of the classes in the data by their names; empty if the data have other labels."""
    numbered = images.classes == tuple(map(str, range(len(images.classes))))
    ids = range(len(images.classes)) if images.ids is None and numbered else images.ids or ()
    return dict(zip(images.classes, ids, strict=False))


def _listed(file: str, source: Source) -> tuple[str, ...]:
    """Return the listed classes in the order of the file."""
    try:
        lines = path_of(file, "classes").read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise DataError(f"the list of classes {file!r} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    known, unknown = set(source.classes), []
    line_numbers: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        name = line if line in known else re.split(r"[\s,]", line, maxsplit=1)[0]
        if not line or (name not in known and line.startswith("#")):
            continue
        if name not in known:
            unknown.append(f"{line!r} (line {number})")
        elif name in line_numbers:
            raise DataError(
                f"{file!r} lists the class {name!r} twice, in lines {line_numbers[name]} and {number}: leave one out"
            )
        line_numbers[name] = number
    if unknown:
        raise DataError(
            f"{source.name} lacks classes that {file!r} lists: {listed(unknown)}; its classes are "
            f"{listed(source.classes)}"
        )
    if not line_numbers:
        raise DataError(f"the list of classes {file!r} is empty: write a class on each line")
    return tuple(line_numbers)
