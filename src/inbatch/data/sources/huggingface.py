"""Hugging Face `datasets`: folders written by `save_to_disk`, data sets of the hub by name, and objects in memory.

No code of a data set is run, and nothing is downloaded unless requested.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from inbatch.data.decoding.image_file import ImageFile, file_channels
from inbatch.data.source import Reading, Source, signed, stat_fingerprint, unlabelled
from inbatch.data.sources.columns import image_column, label_column
from inbatch.data.sources.groups import check_group_column, group_numbers
from inbatch.data.sources.labels import Labels, arrow_codes, from_arrow
from inbatch.data.sources.split_names import arranged, split_of
from inbatch.errors import ConfigError, DataError, type_name

_AGAIN = "; save the data set again (save_to_disk)"
_NAME = re.compile(r"hf/(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<config>[\w.-]+))?")


class HubSource(Source):
    """Rows of one split in order, memory-mapped: an image is read from the disk on access.

    Args:
        dataset: Split of the `datasets` library.
        name: Name of the source.
        folder: Folder of the files that rows name by a relative path; None if there are none. Absolute paths are
            followed.
        reading: See `Reading`.
        train: Opens the train split, whose numbering of the classes is used; None for this one's own.

    Raises:
        DataError: If there is no usable image column, no row, or a label without a class name.
    """

    def __init__(
        self, dataset: Any, name: str, folder: Path | None, reading: Reading, train: Callable[[], Any] | None = None
    ):
        self.column = _image_column(dataset.features, reading.image_column, name)
        self.levels, self.folder = reading.levels, folder
        label = _label_column(dataset.features, reading.label_column, self.column, name)
        check_group_column([*dataset.features], group := reading.group_column, name)
        wanted = [*dict.fromkeys(filter(None, (self.column, label, group)))]
        rows = dataset.with_format(None).select_columns(wanted)
        # rows are read by table position, which differs from the row number after a selection
        if rows._indices is not None:
            rows = rows.flatten_indices()
        self.rows = rows.cast_column(self.column, _datasets().Image(decode=False))
        if not len(rows):
            raise DataError(f"{name!r} holds no image: it has no rows")
        labels = Labels(unlabelled(len(rows)))
        if label is not None:
            like = None if train is None else _labels(train(), label)
            labels = _labels(rows, label, f"The labels {label!r} of {name!r}", like)
        super().__init__(name, file_channels(reading.channels), labels.numbers, labels.classes)
        self.ids, self.label_note = labels.ids, labels.note
        if group is not None:
            codes, values = arrow_codes(rows.data.column(group))
            self.groups = group_numbers(codes, values, f"The groups {group!r} of {name!r}")

    def open(self, i: int) -> ImageFile:
        row = self._row(i)
        if row["bytes"] is not None:
            return ImageFile(row["bytes"], lambda: self.identity(i), self.channels, self.levels)
        if not row["path"]:
            raise DataError(f"{self.identity(i)!r} of {self.name!r} holds no image")
        return ImageFile(self._file(row["path"]), lambda: self.identity(i), self.channels, self.levels)

    def identity(self, i: int) -> str:
        row = self.rows.data.column(self.column)[i]  # does not copy the image bytes
        return (row["path"].as_py() if row.is_valid else None) or f"row {i}"

    def signature(self) -> str:
        names = (str(path) for chunk in self.rows.data.column(self.column).chunks for path in chunk.field("path"))
        return signed(self, "\0".join(names).encode(errors="surrogatepass"))

    def fingerprint(self) -> str | None:
        chunks = self.rows.data.column(self.column).chunks
        if not self.rows.cache_files or any(chunk.field("bytes").null_count for chunk in chunks):
            return None  # in memory, or the pixels are in separate files
        digest = hashlib.sha256(f"{self.column}\0{self.rows._fingerprint}".encode())  # slices share their files
        for file in self.rows.cache_files:
            name = os.path.realpath(file["filename"])
            digest.update(stat_fingerprint(name.encode(), os.stat(name)))
        return digest.hexdigest()

    def _row(self, i: int) -> dict[str, Any]:
        return self.rows.data.column(self.column)[i].as_py() or {"bytes": None, "path": None}

    def _file(self, path: str) -> str:
        """Return the path of an image file outside the table.

        Raise DataError for URLs and for paths outside the folder.
        """
        if os.path.isabs(path):
            return path
        if self.folder is not None and "://" not in path:
            root, file = self.folder.resolve(), (self.folder / path).resolve()
            if file.is_relative_to(root):
                return str(file)
        raise DataError(
            f"{path!r} cannot be read: {self.name!r} names a file that is not in its folder; save the data set with "
            "its images (save_to_disk)"
        )


def find_huggingface(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of a folder written by `save_to_disk`, of `hf/NAME` or `hf/NAME:CONFIG`, or of an object."""
    if (loaded := _in_memory(data)) is not None:
        return _opened(loaded, "dataset", reading)
    if not isinstance(data, str | os.PathLike):
        return None
    if isinstance(data, str) and data.startswith("hf/") and not os.path.exists(data):
        if not (named := _NAME.fullmatch(data)):
            raise DataError(f"{data!r} is not a data set on the Hugging Face hub: use hf/OWNER/NAME[:CONFIG]")
        return _opened(_hub(named["name"], named["config"], reading.download), data, reading)
    root = Path(data)
    if (root / "dataset_dict.json").is_file():
        names = _json(root / "dataset_dict.json").get("splits", [])
        if not names or any(Path(str(name)).name != name for name in names):
            raise DataError(f"{str(root / 'dataset_dict.json')!r} names no splits, or splits without a folder{_AGAIN}")
        first = _training(names)
        train = None if first is None else partial(_saved, root / first)
        return arranged(
            {name: partial(_open_saved, root / name, reading, None if name == first else train) for name in names}
        )
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return {"train": partial(_open_saved, root, reading)}
    return None


def _in_memory(data: object) -> dict[str, Any] | None:
    """Return {split: dataset} of an object of the library, None for others; raise DataError for a stream."""
    datasets = sys.modules.get("datasets")  # without it there is no such object
    if datasets is None or not hasattr(datasets, "Dataset"):
        return None
    if isinstance(data, datasets.Dataset):
        return {"train": data}
    if isinstance(data, datasets.DatasetDict):
        return dict(data)
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(f"A {type_name(data)} is a stream without a length: load it without streaming=True")
    return None


def _opened(loaded: Mapping[str, Any], name: str, reading: Reading) -> dict[str, Callable[[], Source]]:
    """Return the splits of loaded data sets."""
    first = _training(loaded)
    train = None if first is None else partial(loaded.__getitem__, first)
    return arranged(
        {
            split: partial(HubSource, rows, f"{name} ({split})", None, reading, None if split == first else train)
            for split, rows in loaded.items()
        }
    )


def _training(names: Iterable[str]) -> str | None:
    """Return which of the splits holds the training images, or None."""
    return next((name for name in names if split_of(name) == "train"), None)


def _open_saved(folder: Path, reading: Reading, train: Callable[[], Any] | None = None) -> Source:
    return HubSource(_saved(folder), str(folder), folder, reading, train)


def _saved(folder: Path) -> Any:
    """Load a folder written by `Dataset.save_to_disk`; its tables must be in the folder."""
    tables = _json(folder / "state.json").get("_data_files", [])
    try:
        inside = all(Path(table["filename"]).name == table["filename"] for table in tables)
    except (TypeError, KeyError) as e:
        raise DataError(f"{str(folder / 'state.json')!r} is damaged: {e}{_AGAIN}") from e
    if not inside:
        raise DataError(f"{str(folder / 'state.json')!r} names a table that is not in its folder{_AGAIN}")
    datasets = _datasets()
    try:
        return datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as e:  # a damaged folder, or one without rows, can raise any exception
        raise DataError(f"{str(folder)!r} cannot be read as a saved dataset, or has no rows: {e}{_AGAIN}") from e


@lru_cache(maxsize=4)
def _hub(name: str, config: str | None, download: bool) -> dict[str, Any]:
    """Return {split: dataset} of a data set on the hub, from the local caches unless `download` is set."""
    datasets = _datasets()
    try:
        if download:
            return dict(datasets.load_dataset(name, config))
        from huggingface_hub import snapshot_download

        with _offline():
            try:
                return dict(datasets.load_dataset(name, config))
            except OSError:  # not prepared yet, but its files may have been downloaded
                files = snapshot_download(name, repo_type="dataset", local_files_only=True)
                return dict(datasets.load_dataset(files, config))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        if isinstance(e, FileNotFoundError) and not download:
            raise DataError(f"hf/{name} is not on this machine: fetch it with --download") from e
        raise DataError(
            f"hf/{name} cannot be loaded: {e}; correct the name (hf/OWNER/NAME[:CONFIG]), or pass "
            "the folder of its files"
        ) from e


@contextmanager
def _offline() -> Iterator[None]:
    """Disable network access of both libraries temporarily, as HF_HUB_OFFLINE=1 in the environment does."""
    from huggingface_hub import constants

    places: tuple[Any, ...] = (_datasets().config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _image_column(features: Any, requested: str | None, name: str) -> str:
    """Return the column of images: one with the feature Image, or of bytes."""
    images = [column for column, kind in features.items() if isinstance(kind, _datasets().Image)]
    encoded = [column for column, kind in features.items() if getattr(kind, "dtype", "") in ("binary", "large_binary")]
    every = {column: _kind(kind) for column, kind in features.items()}
    usable = images + encoded if requested else images or encoded
    return image_column(usable, every, requested, name)


def _kind(feature: Any) -> str:
    """Return a feature as text: the type of a value, or the name of the feature."""
    return str(feature.dtype) if isinstance(feature, _datasets().Value) else type(feature).__name__


def _label_column(features: Any, requested: str | None, image: str, name: str) -> str | None:
    named = [column for column, kind in features.items() if isinstance(kind, _datasets().ClassLabel)]
    return label_column([*features], named, requested, image, name)


def _labels(rows: Any, column: str, what: str = "The labels of the train split", like: Labels | None = None) -> Labels:
    """Return the labels in a column of a data set."""
    rows = rows.with_format(None).select_columns([column]) if column in rows.column_names else None
    if rows is None:
        return Labels(unlabelled(0))
    rows = rows.flatten_indices() if rows._indices is not None else rows
    return from_arrow(rows.data.column(column), what, getattr(rows.features[column], "names", None) or (), like)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{str(file)!r} cannot be read: {e}{_AGAIN}") from e
    if not isinstance(content, dict):
        raise DataError(f"{str(file)!r} is damaged: it is not a JSON object{_AGAIN}")
    return content


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as e:
        raise ConfigError('Hugging Face datasets need the library: python -m pip install "inbatch[hf]"') from e
    return datasets
