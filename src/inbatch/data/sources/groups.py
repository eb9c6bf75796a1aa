"""Known groups of images, such as the frames of one video or the crops of one slide, as numbers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from inbatch.data.sources.labels import Distinct, NotClassesError, as_array, distinct, meaning
from inbatch.errors import DataError


def group_numbers(codes: Sequence[int] | np.ndarray, values: Sequence[Any], what: str) -> Int[Tensor, "n"]:
    """Return the groups of N images, numbered from 0 in the order of `values`; -1 for none.

    Args:
        codes: (N,) positions in `values`; -1 for none.
        values: Groups as the data name them: whole numbers or names. What means unknown for labels, such as an empty
            cell, means none.
        what: Origin of the groups, for messages.

    Raises:
        DataError: If a group is neither a whole number nor a name.
    """
    try:
        names = [meaning(value) for value in values]
    except NotClassesError as error:
        raise DataError(f"{what} are {error}: a group is a whole number or a name") from None
    place: dict[int | str | None, int] = {None: -1}
    for name in names:
        place.setdefault(name, len(place) - 1)
    table = np.array([*(place[name] for name in names), -1])  # code -1 is the last entry
    return torch.from_numpy(table[np.asarray(codes, np.int64)])


def groups_of_values(values: Sequence[Any], what: str) -> Int[Tensor, "n"]:
    """Return the groups of a sequence of whole numbers or names; see `group_numbers`."""
    groups = Distinct()
    for value in values:
        groups.append(value)
    return group_numbers(groups.codes, groups.values, what)


def groups_of_array(values: Any, n: int, what: str) -> Int[Tensor, "n"]:
    """Return the groups of n images from an array (N,); see `group_numbers`."""
    array = as_array(values)
    if array.shape != (n,):
        raise DataError(f"{what} have shape {array.shape}, but there are {n:,} images: one group each")
    return group_numbers(*distinct(array), what)


FOLDER = "folder"
"""Value of `group_column` for which the images of one folder are a group, in data without columns."""


def is_path_rule(column: str) -> bool:
    """Return whether `group_column` is a rule on the paths of files: the folder, or a pattern with a group."""
    return column == FOLDER or "(" in column


def groups_of_paths(paths: Iterable[str], column: str, name: str) -> Int[Tensor, "n"]:
    """Return the groups of images by their relative paths, numbered in the order in which they occur; -1 for none.

    Args:
        paths: Paths with "/".
        column: "folder": images of one folder are a group, those outside of folders have none. Else a regular
            expression: images for which it finds the same text in its brackets are a group, others have none.
        name: Name of the data, for messages.

    Raises:
        DataError: If the expression is not valid, has not one pair of capturing brackets, or finds nothing.
    """
    pattern = re.compile(r"(.*)/" if column == FOLDER else _checked(column), re.DOTALL)
    numbers: dict[str, int] = {}
    groups, last = [], ""
    for last in paths:
        match = pattern.match(last) if column == FOLDER else pattern.search(last)
        text = match[1] if match else None
        groups.append(numbers.setdefault(text, len(numbers)) if text else -1)
    if not numbers:
        what = "no image is in a folder" if column == FOLDER else "it finds no text in its brackets in any path"
        raise DataError(f"group_column = {column!r}: {what} of {name!r}, such as {last!r}; correct it, or leave it out")
    return torch.tensor(groups, dtype=torch.int64)


def _checked(column: str) -> str:
    try:
        count = re.compile(column).groups
    except re.error as error:
        raise DataError(f"group_column = {column!r} is not a regular expression: {error}") from None
    if count != 1:
        raise DataError(
            f"group_column = {column!r} has {count} pairs of capturing brackets: put one around the part of the path "
            r"that names the group, such as (video\d+), and write others as (?:...)"
        )
    return column


def check_group_column(columns: Sequence[str], requested: str | None, name: str) -> None:
    """Raise DataError if the requested column of groups does not exist."""
    if requested is not None and requested not in columns:
        raise DataError(f"{name!r} has no column {requested!r} (group_column), only {', '.join(columns)}")
