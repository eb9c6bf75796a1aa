"""Tables of named columns, written to CSV, JSON lines or Parquet part by part in constant memory."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from inbatch.errors import ConfigError
from inbatch.runtime.files import replacing, to_json

Table = Mapping[str, Sequence[Any]]
"""Columns of equal length by name; the values are texts, numbers, or None."""


def check_table_file(path: Path) -> None:
    """Raise ConfigError unless a table can be written to a file of this name."""
    if path.suffix.lower() not in _WRITERS:
        raise ConfigError(f"{path}: a table is written to a file that ends in {', '.join(_WRITERS)}")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ConfigError('Parquet needs pyarrow: pip install "inbatch[parquet]", or write to .csv') from error


def write_table(path: Path, parts: Iterable[Table]) -> int:
    """Write the parts of a table, all with the same columns, and return the number of rows.

    The file is replaced when it is complete; without any part it is empty.

    Raises:
        ConfigError: as `check_table_file`.
        InbatchError: if the file cannot be written.
    """
    check_table_file(path)
    with replacing(path) as file:
        return _WRITERS[path.suffix.lower()](file, parts)


def _csv(file: IO[bytes], parts: Iterable[Table]) -> int:
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
    writer, count = csv.writer(text), 0
    try:
        for part in parts:
            if not count:
                writer.writerow(part)
            rows = list(zip(*part.values(), strict=True))
            writer.writerows(rows)
            count += len(rows)
    finally:
        text.detach()
    return count


def _json_lines(file: IO[bytes], parts: Iterable[Table]) -> int:
    count = 0
    for part in parts:
        for row in zip(*part.values(), strict=True):
            line = to_json(dict(zip(part, row, strict=True)))
            file.write(line.encode(errors="backslashreplace") + b"\n")
            count += 1
    return count


def _parquet(file: IO[bytes], parts: Iterable[Table]) -> int:
    """Write one row group per part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    try:
        for part in parts:
            table = pa.table({name: _column(pa, values) for name, values in part.items()})
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


def _column(pa: Any, values: Sequence[Any]) -> Any:
    """Return a column of Arrow; texts have characters that every reader accepts, and may be missing in any part."""
    if all(value is None or isinstance(value, str) for value in values):
        texts = [v and v.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for v in values]
        return pa.array(texts, pa.string())
    return pa.array(values)


_WRITERS: dict[str, Callable[[IO[bytes], Iterable[Table]], int]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
