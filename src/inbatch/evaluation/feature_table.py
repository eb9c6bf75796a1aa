"""Features of images with their names, read from a file of `write_embeddings` without a copy of them in memory."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import DIVERGED, ConfigError, DataError, reason
from inbatch.runtime.files import open_regular
from inbatch.runtime.paths import path_of
from inbatch.runtime.stored_array import stored_member

_COLUMNS = ("path", "index", "label", "split", "class")


@dataclass(frozen=True)
class FeatureTable:
    """One row of features per image.

    Attributes:
        vectors: (N, F) float32 on the CPU; those of a .npz file are mapped, not read.
        labels: (N,) int64, the position in `classes`, -1 if unknown.
        classes: Names of the classes.
        paths: Path or number of each image in its split.
        splits: Split of each image, empty if unknown.
        index: (N,) int64, number of each image in its split.
    """

    vectors: Float[Tensor, "n f"]
    labels: Int[Tensor, "n"]
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    splits: tuple[str, ...]
    index: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.vectors)


def read_features(path: str | Path) -> FeatureTable:
    """Return the features in a .npz or .parquet file that `write_embeddings` (`inbatch embed`) wrote.

    Args:
        path: The file. The columns `path` and `vector` are required.

    Raises:
        ConfigError: For other endings, or .parquet without pyarrow.
        DataError: If the file cannot be read, holds no image, or holds features that are not finite.
    """
    path = path_of(path, "features")
    readers = {".npz": _npz, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ConfigError(f"{path} is not a file of features: inbatch embed writes .npz and .parquet files")
    if not path.exists():
        raise DataError(f"{path} does not exist: write it with inbatch embed")
    try:
        vectors, columns = readers[path.suffix](path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as features: {reason(error)}; write it with inbatch embed") from None
    if vectors.ndim != 2 or not vectors.numel() or any(len(column) != len(vectors) for column in columns.values()):
        raise DataError(f"{path} holds no features, one row per image: write it with inbatch embed")
    for rows in vectors.split(1 << 16):
        if not rows.isfinite().all():
            raise DataError(f"{path}: the features hold NaN or infinity: {DIVERGED}")
    labels, classes = _numbered(columns.get("label"), columns.get("class"), len(vectors))
    index = columns.get("index")
    return FeatureTable(
        vectors=vectors,
        labels=labels,
        classes=classes,
        paths=tuple(map(str, columns["path"].tolist())),
        splits=tuple(columns["split"].tolist()) if "split" in columns else ("",) * len(vectors),
        index=torch.arange(len(vectors)) if index is None else torch.tensor(np.array(index, np.int64)),
    )


def _npz(path: Path) -> tuple[Tensor, dict[str, np.ndarray]]:
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        if not {"path.npy", "vector.npy"} <= names:
            raise ValueError("the arrays path and vector are missing")
        columns = {name: _read(archive, name) for name in _COLUMNS if f"{name}.npy" in names}
        stored = stored_member(str(path), file, archive, "vector")
        if stored is None or stored.dtype != np.float32 or len(stored.shape) != 2:
            return torch.from_numpy(np.asarray(_read(archive, "vector"), np.float32)), columns
        return torch.from_numpy(stored.mapped()), columns


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _parquet(path: Path) -> tuple[Tensor, dict[str, np.ndarray]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: `pip install 'inbatch[parquet]'`, or use a .npz file.") from error
    try:
        with pq.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if not {"path", "vector"} <= names:
                raise ValueError("the columns path and vector are missing")
            chosen = [name for name in _COLUMNS if name in names]
            vectors = _stacked(file)
            table = file.read(columns=chosen)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in chosen}
    if "class" in columns:
        columns["class"] = np.array([name or "" for name in columns["class"]], object)
    return vectors, columns


def _stacked(file: Any) -> Tensor:
    """Return the column of vectors, read in pieces into one tensor."""
    vectors, at = torch.empty(0, 0), 0
    for rows in _pieces(file):
        if not at:
            vectors = torch.empty(file.metadata.num_rows, rows.shape[1])
        vectors[at : at + len(rows)] = torch.from_numpy(rows)
        at += len(rows)
    return vectors


def _pieces(file: Any) -> Iterator[np.ndarray]:
    for batch in file.iter_batches(columns=["vector"], batch_size=1 << 14):
        column = batch.column(0)
        values = column.flatten().to_numpy(zero_copy_only=False)
        yield np.array(values, np.float32).reshape(len(column), -1)


def _numbered(ids: np.ndarray | None, names: np.ndarray | None, count: int) -> tuple[Int[Tensor, "n"], tuple[str, ...]]:
    """Return labels from 0 and the names of the classes, in the order of their integers in the data."""
    if ids is None:
        return torch.full((count,), -1), ()
    texts = np.array([""] * count) if names is None else np.asarray(names, str)
    words = np.where(texts == "", np.asarray(ids).astype(str), texts)
    known = np.asarray(ids) >= 0
    classes = dict(sorted(dict(zip(words[known].tolist(), np.asarray(ids)[known].tolist(), strict=True)).items(),
                          key=lambda item: item[1]))  # fmt: skip
    place = {name: i for i, name in enumerate(classes)}
    labels = [place[word] if has else -1 for word, has in zip(words.tolist(), known.tolist(), strict=True)]
    return torch.tensor(labels, dtype=torch.long), tuple(classes)
