"""Export of embeddings to disk, chunk by chunk: memory is constant, and a file appears only when it is complete."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation.embeddings import Embeddings, check_one_label
from inbatch.runtime.files import check_writable, replacing
from inbatch.runtime.paths import path_of


@dataclass(frozen=True)
class Tokens:
    """Layout of a file with several tokens per image, written as `tokens` instead of `vector`.

    Attributes:
        grid: height and width of the feature map; tokens are its positions, row by row.
        width: numbers per token.
        half: write float16 instead of float32.
    """

    grid: tuple[int, int]
    width: int
    half: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid[0] * self.grid[1], self.width


def write_embeddings(path: str | Path, stream: Iterable[Embeddings], tokens: Tokens | None = None) -> int:
    """Write path, index, label (-1 unknown), vector and split to a .parquet or .npz file; return the number of rows.

    The index is the number of the image in its split. Labels are the integers of the data, `class` has the names of the
    classes, empty or null for unknown. Replaces an existing file.

    Args:
        path: the file.
        stream: chunks of embeddings.
        tokens: write `tokens` instead of `vector`: in .npz an array (N, T, D) and `grid` (height, width), in .parquet a
            list of T * D numbers per row, with "grid" and "width" as JSON in the metadata "inbatch.tokens".

    Raises:
        ConfigError: for other endings, or .parquet without pyarrow.
        DataError: if the stream is empty, images have several labels, or a number does not fit into float16.
    """
    path = path_of(path, "out")
    write = _writer(path)
    with replacing(path) as file:
        rows = write(file, stream, tokens)
        if not rows:
            raise DataError(f"{path} was not written: there are no images to embed.")
    return rows


def check_output(path: Path) -> None:
    """Raise, before any work, the errors of `write_embeddings` that do not depend on the embeddings."""
    _writer(path)
    check_writable(path)


def _writer(path: Path) -> Callable[[IO[bytes], Iterable[Embeddings], Tokens | None], int]:
    if path.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"{path}: features are written to a file that ends in .parquet or .npz.")
    if path.suffix == ".npz":
        return _npz
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as e:
        raise ConfigError("Parquet needs pyarrow: `pip install 'inbatch[parquet]'`, or write to .npz.") from e
    return _parquet


def numbers(chunk: Embeddings, tokens: Tokens | None) -> np.ndarray:
    """Return the vectors of a chunk in the type of the file."""
    vectors = np.ascontiguousarray(chunk.vectors.numpy(), np.float32)
    if tokens is None or not tokens.half:
        return vectors
    if np.abs(vectors).max(initial=0) > np.finfo(np.float16).max:
        raise DataError(f"tokens reach {np.abs(vectors).max():.3g}, which float16 does not hold: leave out --float16")
    return vectors.astype(np.float16)


def _parquet(file: IO[bytes], stream: Iterable[Embeddings], tokens: Tokens | None = None) -> int:
    """Write one row group per chunk."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, writer = 0, None
    try:
        for chunk in stream:
            n, width = chunk.vectors.shape
            values = pa.array(numbers(chunk, tokens).ravel())
            ids, classes = _tables(chunk)
            labels = chunk.labels.numpy()
            columns = {
                "path": pa.array([_text(i) for i in chunk.identities], pa.string()),
                "index": pa.array(chunk.index.numpy()),
                "label": pa.array(ids[labels]),
                "vector" if tokens is None else "tokens": pa.FixedSizeListArray.from_arrays(values, width),
                "split": pa.array([chunk.split] * n, pa.string()),
                "class": pa.array(classes[labels], pa.string(), mask=classes[labels] == ""),
            }
            layout = tokens and {"inbatch.tokens": json.dumps({"grid": tokens.grid, "width": tokens.width})}
            table = pa.table(columns, metadata=layout)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
            rows += n
    finally:
        if writer is not None:
            writer.close()
    return rows


def _npz(file: IO[bytes], stream: Iterable[Embeddings], tokens: Tokens | None = None) -> int:
    """Write through unnamed files: the number of rows and the longest path are only known at the end."""
    folder = Path(file.name).parent
    with TemporaryFile(dir=folder) as vectors, TemporaryFile("w+", dir=folder) as names:
        rows, width, longest, labels, index = 0, 0, 1, [], []
        splits: list[tuple[str, int]] = []
        tables: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # of each split
        for chunk in stream:
            vectors.write(numbers(chunk, tokens).tobytes())
            key = (chunk.classes, chunk.ids)
            tables[key] = _tables(chunk, tables.get(key))
            labels.append((key, chunk.labels.numpy()))
            index.append(chunk.index.numpy())
            splits.append((chunk.split, len(chunk)))
            identities = [_text(i) for i in chunk.identities]
            longest = max(longest, *map(len, identities))
            names.write(json.dumps(identities) + "\n")
            rows, width = rows + len(chunk), chunk.vectors.shape[1]
        if not rows:
            return 0
        vectors.seek(0)
        names.seek(0)
        text, word = np.dtype(f"<U{longest}"), np.dtype(f"<U{max(1, *(len(name) for name, _ in splits))}")
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            _array(archive, "path", text, (rows,), (np.array(json.loads(line), text).tobytes() for line in names))
            _array(archive, "index", np.dtype("<i8"), (rows,), (x.astype("<i8").tobytes() for x in index))
            _array(archive, "label", np.dtype("<i8"), (rows,), (tables[key][0][x].tobytes() for key, x in labels))
            _array(archive, "split", word, (rows,), (np.full(count, name, word).tobytes() for name, count in splits))
            if tokens is None:
                _array(archive, "vector", np.dtype("<f4"), (rows, width), _pieces(vectors))
            else:
                kind = np.dtype("<f2" if tokens.half else "<f4")
                _array(archive, "tokens", kind, (rows, *tokens.shape), _pieces(vectors))
                _array(archive, "grid", np.dtype("<i8"), (2,), iter([np.array(tokens.grid, "<i8").tobytes()]))
            word = max((classes.dtype for _, classes in tables.values()), key=lambda dtype: dtype.itemsize)
            parts = (tables[key][1].astype(word)[x].tobytes() for key, x in labels)
            _array(archive, "class", word, (rows,), parts)
        return rows


def _tables(chunk: Embeddings, known: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the integer in the data and the name of each class; those of the number -1, at the end, are -1 and empty.

    known: Result for another chunk with the same classes; it is extended if labels have no names.
    """
    check_one_label(chunk.labels, chunk.name, "files of features have one label per image")
    names = [*map(_text, chunk.classes)]
    most = max(len(names), int(chunk.labels.max()) + 1, 0 if known is None else len(known[0]) - 1)
    ids = range(most) if chunk.ids is None else chunk.ids
    return np.array([*ids, -1], "<i8"), np.array([*names, *[""] * (most - len(names) + 1)])


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], data: Iterator[bytes]) -> None:
    """Write one .npy member from pieces of its bytes."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(member, header)
        for piece in data:
            member.write(piece)


def _pieces(file: IO[bytes], size: int = 1 << 22) -> Iterator[bytes]:
    while piece := file.read(size):
        yield piece


def _text(identity: str) -> str:
    """Return a file name that is not UTF-8 in characters that every reader accepts."""
    return identity.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
