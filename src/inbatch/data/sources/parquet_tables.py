"""Descriptions of Parquet files: their columns, row groups and labels, read before any image."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from inbatch.data.source import Reading
from inbatch.data.sources.columns import image_column, label_column
from inbatch.data.sources.groups import check_group_column
from inbatch.data.sources.labels import Labels, arrow_codes, number
from inbatch.data.sources.shard_files import open_shard, reached
from inbatch.errors import ConfigError, DataError
from inbatch.runtime.remote import Url

UNREADABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError)
"""Exceptions that Arrow may raise on a damaged or missing file, or on types without images."""


class Table(NamedTuple):
    """What is read of a file before its images: `rows` are the numbers of rows of its groups.

    image: name of the column. codes, values: labels, as `labels.number` takes them. names: of the classes.
    groups: codes and values of the groups, if a column of them is requested.
    """

    image: str
    rows: list[int]
    codes: np.ndarray
    values: list[Any]
    names: tuple[str, ...]
    groups: tuple[np.ndarray, list[Any]] | None = None


def read_table(file: str, reading: Reading) -> Table:
    """Return the description and the labels of a file; raise DataError if it cannot be read or has no images."""
    try:
        with reached(file), open_parquet(file) as opened:
            schema, meta = opened.schema_arrow, opened.metadata
            kinds = {field.name: field.type for field in schema}
            usable = [name for name, kind in kinds.items() if _holds_images(kind)]
            image = image_column(usable, kinds, reading.image_column, file)
            named = _class_names(schema.metadata)
            label = label_column([*kinds], [*named], reading.label_column, image, file)
            codes, values = np.full(meta.num_rows, -1), list[Any]()
            if label is not None:
                codes, values = arrow_codes(opened.read([label])[label])
            check_group_column([*kinds], column := reading.group_column, file)
            grouped = None if column is None else arrow_codes(opened.read([column])[column])
    except UNREADABLE as e:
        raise DataError(f"{str(file)!r} cannot be read as Parquet: {e}; copy or download it again") from e
    rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return Table(image, rows, codes, values, named.get(label or "", ()), grouped)


def number_labels(tables: Sequence[Table], name: str, like: Labels | None) -> Labels:
    """Return the labels of all files together."""
    codes, values = join_codes([(table.codes, table.values) for table in tables])
    names = next((table.names for table in reversed(tables) if table.names), ())
    return number(codes, values, f"The labels of {name!r}", names, like)


def join_codes(parts: Sequence[tuple[np.ndarray, list[Any]]]) -> tuple[np.ndarray, list[Any]]:
    """Return codes and values of all files together."""
    codes, values = [], list[Any]()
    for own, meanings in parts:
        codes.append(np.where(own < 0, -1, own + len(values)))
        values += meanings
    return np.concatenate(codes), values


def _holds_images(kind: Any) -> bool:
    """Return whether an Arrow type can hold encoded images: bytes, or a struct with bytes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the class names by column; empty if the file does not contain them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: kind.get("names") for name, kind in features.items() if isinstance(kind, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: tuple(map(str, names)) for name, names in kinds.items() if isinstance(names, list)}


def open_parquet(file: str) -> Any:
    """Open a Parquet file on a disk or behind a URL."""
    return pyarrow_parquet().ParquetFile(open_shard(file) if isinstance(file, Url) else file)


def pyarrow_parquet() -> Any:
    """Return pyarrow.parquet; ConfigError if it is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise ConfigError('Parquet files need pyarrow: python -m pip install "inbatch[parquet]"') from e
    return parquet
