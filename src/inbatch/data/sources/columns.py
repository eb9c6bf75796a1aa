"""Columns of tables: which one holds the images, and which one the labels."""

from collections.abc import Collection, Mapping, Sequence

from inbatch.data.source import Reading
from inbatch.data.sources.labels import NO_LABELS
from inbatch.errors import DataError

IMAGES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "bytes")
"""Usual names of the column of images, in the order in which they are tried."""

LABELS = ("label", "labels", "fine_label")
"""Usual names of the column of labels, in the order in which they are tried."""

_LATER = ("class", "target", "cls")
"""Names that are tried if there is neither one of `LABELS` nor a column with class names."""


def image_column(usable: Collection[str], types: Mapping[str, object], requested: str | None, name: str) -> str:
    """Return the column with the images: the requested one, else the one with a usual name, else the only one.

    Args:
        usable: Columns that can hold images.
        types: Types of all columns, for messages.
        requested: Setting `image_column`.
        name: Name of the data, for messages.

    Raises:
        DataError: If there is no such column, or if it is not clear which one is meant.
    """
    every = ", ".join(f"{column} ({kind})" for column, kind in types.items())
    if requested is not None:
        if requested not in usable:
            raise DataError(f"{name!r} has no encoded images in image_column = {requested!r}; its columns are {every}")
        return requested
    usual = [column for column in IMAGES if column in usable]
    if not usual and len(usable) != 1:
        several = f"choose one of {', '.join(usable)} with image_column (--image-column)"
        raise DataError(
            f"{name!r} has the columns {every}: {several if usable else 'a column of encoded images is needed'}"
        )
    return next(iter(usual or usable))


def label_column(
    columns: Sequence[str], named: Sequence[str], requested: str | None, image: str, name: str
) -> str | None:
    """Return the column with the labels, or None: the requested one, else the one with a usual name.

    Args:
        columns: All columns.
        named: Columns with class names; the first is used if no column has one of the names `LABELS`.
        requested: Setting `label_column`.
        image: Column with the images.
        name: Name of the data, for messages.

    Raises:
        DataError: If the requested column does not exist.
    """
    if requested == NO_LABELS:
        return None
    if requested is not None:
        if requested not in columns:
            raise DataError(f"{name!r} has no column {requested!r} (label_column), only {', '.join(columns)}")
        return requested
    tried = (*LABELS, *named, *_LATER)
    return next((column for column in tried if column in columns and column != image), None)


def check_no_columns(reading: Reading, name: str) -> None:
    """Raise DataError if the settings name a column of data that have none."""
    for key in ("image_column", "label_column", "group_column"):
        if (column := getattr(reading, key)) is not None and (key, column) != ("label_column", NO_LABELS):
            raise DataError(f"{key} = {column!r}: {name} has no columns; leave it out")
