"""Known groups of images, such as the frames of one video or the crops of one slide, as numbers."""

from collections.abc import Sequence
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
    found = Distinct()
    for value in values:
        found.append(value)
    return group_numbers(found.codes, found.values, what)


def groups_of_array(values: Any, n: int, what: str) -> Int[Tensor, "n"]:
    """Return the groups of n images from an array (N,); see `group_numbers`."""
    array = as_array(values)
    if array.shape != (n,):
        raise DataError(f"{what} have shape {array.shape}, but there are {n:,} images: one group each")
    return group_numbers(*distinct(array), what)


def check_group_column(columns: Sequence[str], requested: str | None, name: str) -> None:
    """Raise DataError if the requested column of groups does not exist."""
    if requested is not None and requested not in columns:
        raise DataError(f"{name!r} has no column {requested!r} (group_column), only {', '.join(columns)}")
