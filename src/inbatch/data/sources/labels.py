"""Labels of every source as class numbers.

Whole numbers of any type and names are classes; the classes that occur are numbered from 0. Missing values, NaN, -1,
and the words that spreadsheets and pandas write for them mean unknown. Labels of any other kind are left out with a
sentence, so that methods that need no labels can use the images.
"""

import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from inbatch.data.source import path_text, unlabelled
from inbatch.errors import DataError

NO_LABELS = "none"
"""Name of the label column for images without labels."""

MOST_CLASSES = 1_000_000
"""Upper limit of the number of classes: more are a mistake, such as a column of row numbers."""

_UNKNOWN = {
    "", "-1", "-1.0", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
"""Texts that mean unknown: those of pandas, and -1."""

_WHOLE = re.compile(r"(-?[0-9]{1,18})(?:\.0*)?")  # pandas writes 3.0 if any number of the column is missing


_ARROW_KINDS = ("integer", "boolean", "decimal", "string", "large_string", "binary", "large_binary")
"""Types of Arrow that can be classes, in addition to floats."""


class Labels(NamedTuple):
    """Labels of N images.

    Attributes:
        numbers: (N,) int64, class numbers from 0, -1 for unknown.
        classes: Names of the classes; empty if all labels are unknown.
        values: The labels of the classes in the data: integers, or names.
        note: A sentence if the data have labels that cannot be used, else empty.
    """

    numbers: Int[Tensor, "n"]
    classes: tuple[str, ...] = ()
    values: tuple[int | str, ...] = ()
    note: str = ""

    @property
    def ids(self) -> tuple[int, ...] | None:
        """The integers of the classes in the data, if these are not 0, 1, 2, ..."""
        ids = tuple(value for value in self.values if isinstance(value, int))
        return ids if len(ids) == len(self.values) and ids != tuple(range(len(ids))) else None


class Unusable(NamedTuple):
    """A label that is not a class; `kind` describes it."""

    kind: str


class Distinct:
    """Labels as they are read, one by one: their distinct values, and 8 bytes per label."""

    def __init__(self) -> None:
        self.codes, self.values = array("q"), list[Any]()
        self._place: dict[tuple[type, Any], int] = {}

    def append(self, value: Any) -> None:
        """Append the label of the next image."""
        self.codes.append(self.code(value))

    def code(self, value: Any) -> int:
        """Return the position of a label in `values`."""
        try:
            place = self._place.setdefault((type(value), value), len(self.values))
        except TypeError:  # a list, a dict or an array
            value = Unusable(type(value).__name__)
            place = self._place.setdefault((Unusable, value), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


def number(
    codes: Sequence[int] | np.ndarray, values: Sequence[Any], what: str, names: Sequence[str] = (),
    like: Labels | None = None,
) -> Labels:  # fmt: skip
    """Return labels with the classes that occur numbered from 0, integers by size and names in alphabetical order.

    Args:
        codes: (N,) positions in `values`; -1 for unknown.
        values: Labels of the data.
        what: Origin of the labels, for messages.
        names: Names of the classes 0, 1, 2, ...; the integers of the data are then kept as class numbers.
        like: Labels of the train split, whose numbering a test split uses; other classes follow behind.

    Raises:
        DataError: For integers below -1, a label without a name, or more than `MOST_CLASSES` classes.
    """
    codes = np.asarray(codes, np.int64)
    used = {*np.unique(codes).tolist()}
    try:
        meanings = _joined([meaning(value) if i in used else None for i, value in enumerate(values)])
    except NotClassesError as error:
        return Labels(unlabelled(len(codes)), note=f"{what} are {error}, neither whole numbers nor names")
    known = {value for value in meanings if value is not None}
    lowest = min((value for value in known if isinstance(value, int)), default=0)
    if lowest < 0:
        raise DataError(f"{what} go down to {lowest}: use -1 for unknown, or no labels (label_column = none)")
    if len(known) > MOST_CLASSES:
        raise DataError(
            f"{what} are {len(known):,} classes, more than {MOST_CLASSES:,}: use no labels (label_column = none)"
        )
    if not known:
        return Labels(unlabelled(len(codes)))
    ordered: tuple[int | str, ...] = tuple(sorted(known))  # type: ignore[type-var]  # all are int, or all are str
    if names and all(isinstance(value, int) for value in ordered):
        if ordered[-1] >= len(names):  # type: ignore[operator]
            raise DataError(f"{what} hold the label {ordered[-1]}, but {len(names)} classes are named")
        ordered = tuple(range(len(names)))
    elif like is not None and like.values and isinstance(like.values[0], type(ordered[0])):
        ordered = like.values + tuple(value for value in ordered if value not in set(like.values))
    place: dict[int | str | None, int] = {value: i for i, value in enumerate(ordered)} | {None: -1}
    table = np.array([*(place[value] for value in meanings), -1])  # code -1 is the last entry
    classes = names if names and ordered == tuple(range(len(names))) else [printable_name(str(v)) for v in ordered]
    return Labels(torch.from_numpy(table[codes]), tuple(classes), ordered)


def from_array(
    labels: Any, n: int, what: str, names: Sequence[str] = (), like: Labels | None = None
) -> Labels:  # fmt: skip
    """Return the labels of n images from an array, a tensor or a sequence of numbers or names, (N,) or (N, 1).

    Several labels per image, (N, L), are not classes: they are left out with a note.

    Raises:
        DataError: If there is not one entry for each image; see also `number`.
    """
    if isinstance(labels, Set | Mapping):
        raise DataError(f"{what} are a {type(labels).__name__}: pass a list or an array, in the order of the images")
    values = as_array(labels)
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    if values.shape[:1] != (n,):
        raise DataError(f"{what} have shape {values.shape}, but there are {n:,} images: one label each")
    if values.ndim > 1:
        return Labels(unlabelled(n), note=f"{what} have shape {values.shape}, several for each image")
    return number(*distinct(values), what, names, like)


def from_arrow(column: Any, what: str, names: Sequence[str] = (), like: Labels | None = None) -> Labels:
    """Return the labels of a column of an Arrow table; see `number`."""
    return number(*arrow_codes(column), what, names, like)


def arrow_codes(column: Any) -> tuple[np.ndarray, list[Any]]:
    """Return the codes and values of a column of an Arrow table, for `number`."""
    import pyarrow as pa

    kind, types = column.type, pa.types
    if types.is_dictionary(kind):  # a categorical column
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_null(kind):
        return np.full(len(column), -1), []
    if types.is_floating(kind):
        column = column.cast(pa.float64())
    elif types.is_string_view(kind) or types.is_binary_view(kind):
        column = column.cast(pa.large_string() if types.is_string_view(kind) else pa.large_binary())
    elif not any(getattr(types, f"is_{name}")(kind) for name in _ARROW_KINDS):
        return np.zeros(len(column), np.int64), [Unusable(str(kind))]
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()


class NotClassesError(Exception):
    """A label is neither a whole number nor a name; the message describes it."""


def meaning(value: Any) -> int | str | None:
    """Return the class that a label means, None for unknown; raise NotClassesError for labels that are not classes."""
    if isinstance(value, Unusable):
        raise NotClassesError(value.kind)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return None if (text := value.strip()) in _UNKNOWN else text
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal):
        if value != value:
            return None
        if value in (float("inf"), float("-inf")) or value != int(value):
            raise NotClassesError(f"numbers such as {float(value):g}")
        value = int(value)
    if not isinstance(value, int):
        raise NotClassesError(type(value).__name__)
    return None if value == -1 else value


def _joined(meanings: list[int | str | None]) -> list[int | str | None]:
    """Return the classes as integers if every known one is written as a whole number, else as names."""
    known = [value for value in meanings if value is not None]
    whole = all(isinstance(value, int) or _WHOLE.fullmatch(value) for value in known)
    if whole and all(-(2**63) <= int(value) < 2**63 for value in known if isinstance(value, int)):
        return [value if value is None or isinstance(value, int) else _whole(value) for value in meanings]
    return [None if value is None else str(value) for value in meanings]


def changed_names(names: Sequence[str]) -> list[str]:
    """Return the names of classes that mean something else in a list of images with all of these classes.

    These are the words for unknown, negative numbers, names with spaces around them, and equal numbers.
    """
    meanings = _joined([meaning(name) for name in names])
    times = Counter(meanings)
    return [
        name
        for name, value in zip(names, meanings, strict=True)
        if value is None or name != name.strip() or times[value] > 1 or (isinstance(value, int) and value < 0)
    ]


def _whole(text: str) -> int:
    match = _WHOLE.fullmatch(text)
    assert match is not None
    return int(match[1])


def as_array(labels: Any) -> np.ndarray:
    """Return labels of any kind as an array."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        return (labels.float() if labels.dtype == torch.bfloat16 else labels).numpy()
    if hasattr(labels, "__array__") or not hasattr(labels, "__iter__"):
        return np.asarray(labels)
    return np.asarray(list(labels), object)  # NumPy would turn integers of 64 bits to floats if their signs differ


def distinct(values: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Return codes and values of an array (N,)."""
    if values.dtype.kind in "iufbUS":
        every, codes = np.unique(values, return_inverse=True)
        return codes, every.tolist()
    if values.dtype.kind not in "OT":
        return np.zeros(len(values), np.int64), [Unusable(str(values.dtype))]
    labels = Distinct()
    for value in values.tolist():
        labels.append(value)
    return np.array(labels.codes), labels.values


def printable_name(text: str) -> str:
    """Return the name of a class or of a file for a message, printable for any bytes, at most 200 characters."""
    return path_text(text.encode("utf-8", "surrogateescape"))[:200]
