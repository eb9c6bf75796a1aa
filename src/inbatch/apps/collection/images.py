"""Open the images of a collection without features, and read them by threads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from inbatch.apps.collection.features import Collection, holds_features, open_collection
from inbatch.data import find_split, open_data, splits
from inbatch.data.sources.split_names import distinct
from inbatch.errors import ConfigError
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.remote import public
from inbatch.runtime.thread_map import thread_map

Result = TypeVar("Result")

_CHUNK = 64  # images per task of a thread
COLUMNS = ("image_column", "label_column")
"""Settings that name columns."""


def open_images(
    data: Any, features: str | Path | None, split: str | None, settings: Mapping[str, Any] | None, device: str,
    quiet: bool,
) -> Collection:  # fmt: skip
    """Return images with their features, or with vectors of width 0 if `features` is None; as `open_collection`.

    Args:
        data: The images.
        features: A run, an encoder's folder, or a file of features.
        split: The only split; None for every image.
        settings: Reading options; with a run or an encoder, only those of `COLUMNS`.
        device: Device on which features are computed.
        quiet: Show no progress.
    """
    reading = {key: value for key, value in (settings or {}).items() if value is not None}
    columns = {key: reading.get(key) for key in COLUMNS}
    if features is not None:
        other = sorted(reading.keys() - columns.keys())
        if holds_features(features):
            more = {key: reading[key] for key in other}
            return open_collection(features, data, split=split, device=device, quiet=quiet, reading=more, **columns)
        if other:
            raise ConfigError(f"{', '.join(other)}: the images are read as the encoder reads them; leave it out")
        return open_collection(features, data, split=split, device=device, quiet=quiet, **columns)
    data = joined_paths(data)
    every = splits(data, **columns)
    names = distinct(every) if split is None else [find_split(split, every) or split]
    sources = {name: open_data(data, name, **reading) for name in names}
    classes = tuple(dict.fromkeys(name for source in sources.values() for name in source.classes))
    labels = [classes.index(s.classes[i]) if i >= 0 else -1 for s in sources.values() for i in s.labels.tolist()]
    return Collection(
        vectors=torch.zeros(len(labels), 0),
        labels=torch.tensor(labels, dtype=torch.long),
        classes=classes,
        paths=tuple(source.identity(i) for source in sources.values() for i in range(len(source))),
        splits=tuple(name for name, source in sources.items() for _ in range(len(source))),
        index=torch.cat([torch.arange(len(source)) for source in sources.values()]),
        name=public(str(data)) if isinstance(data, str | Path) else "the images",
        sources=sources,
        origin={"features": None, "data": public(str(data))},
    )


def numbered(collection: Collection) -> dict[str, dict[int, int]]:
    """Return the position in the collection of each image, by its split and its number there."""
    place: dict[str, dict[int, int]] = {name: {} for name in collection.sources}
    for i, (split, number) in enumerate(zip(collection.splits, collection.index.tolist(), strict=True)):
        place[split][number] = i
    return place


def by_threads(work: Callable[[int], Result], numbers: Sequence[int]) -> Iterator[list[tuple[int, Result]]]:
    """Yield the results of `work` on all numbers, in chunks of (number, result); decoding releases the GIL."""
    starts = range(0, len(numbers), _CHUNK)
    return thread_map(lambda at: [(i, work(i)) for i in numbers[at : at + _CHUNK]], starts)
