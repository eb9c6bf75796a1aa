"""Which images of a collection are labelled already, and as what: by the data, by a list, or by features."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from inbatch.apps.collection.features import ENDINGS, Collection
from inbatch.data import open_data, splits
from inbatch.data.sources.split_names import distinct
from inbatch.errors import ConfigError, DataError, many
from inbatch.evaluation.feature_table import read_features
from inbatch.runtime.paths import path_of

LISTS = (".csv", ".tsv", ".txt")

_Key = tuple[str, str]  # split, or empty for any, and name or file


@dataclass(frozen=True)
class KnownLabels:
    """Labelled images of a collection.

    Attributes:
        labelled: (N,) bool.
        labels: (N,) int64, position in `classes`; -1 if unknown.
        classes: Names of the classes.
        notes: Sentences for the user.
    """

    labelled: Bool[Tensor, "n"]
    labels: Int[Tensor, "n"]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def known_labels(collection: Collection, labelled: str | Path | None) -> KnownLabels:
    """Return which images are labelled.

    Args:
        collection: The images.
        labelled: "data": images with a label in the data; "none"; a .csv, .tsv or .txt list of images, with or without
            their classes; or features of `inbatch embed`, of which those with a label count, by split and name if both
            have splits. By default as "data" if some images have a label and others have none, else as "none".

    Raises:
        ConfigError: For another kind of file.
        DataError: If the file cannot be read, or lists no image of the collection.
    """
    has = collection.labels >= 0
    if labelled is None or labelled in ("data", "none"):
        partial = bool(has.any()) and not bool(has.all())
        if labelled == "none" or (labelled is None and not partial):
            return KnownLabels(torch.zeros_like(has), collection.labels, collection.classes)
        if labelled == "data" and not has.any():
            raise DataError(f"no image of {collection.name} has a label: pass a list of the labelled ones")
        return KnownLabels(has, collection.labels, collection.classes)
    return _of_file(collection, path_of(labelled, "labelled"))


def _of_file(collection: Collection, path: Path) -> KnownLabels:
    if path.suffix.lower() not in LISTS + ENDINGS:
        raise ConfigError(f"{path} is not a list of labelled images: pass a .csv, .tsv or .txt file, features, or data")
    if not path.is_file():
        raise DataError(f"{path} does not exist: pass a list of the labelled images")
    places, divided = _places(collection), any(collection.splits)
    classes = {name: number for number, name in enumerate(collection.classes)}
    labels, mask = collection.labels.clone(), torch.zeros(len(collection), dtype=torch.bool)
    listed, missing = 0, 0
    for keys, label in _features(path, divided) if path.suffix in ENDINGS else _list(path):
        rows = next((places[key] for key in keys if key in places), [])
        listed, missing = listed + 1, missing + (not rows)
        for row in rows:
            mask[row] = True
            if label is not None:
                labels[row] = classes.setdefault(label, len(classes))
    if not mask.any():
        hint = "" if collection.has_images else "; pass the images, too (DATA), to compare whole paths"
        raise DataError(f"none of the {listed:,} labelled images in {path} is an image of {collection.name}{hint}")
    note = f"{many(missing, 'labelled image')} of {path} not among the {len(collection):,} images"
    return KnownLabels(mask, labels, tuple(classes), (note,) if missing else ())


def _places(collection: Collection) -> dict[_Key, list[int]]:
    """Return the positions of the images with a name in a split, and in any split with a name or a file."""
    places = defaultdict[_Key, list[int]](list)
    for row, (split, name) in enumerate(zip(collection.splits, collection.paths, strict=True)):
        file = collection.file_of(row) if collection.has_images else None
        for key in {(split, name), ("", name), ("", file or name)}:
            places[key].append(row)
    return dict(places)


def _list(path: Path) -> Iterator[tuple[tuple[_Key, ...], str | None]]:
    """Iterate over file and name of each listed image, and its class."""
    for split in distinct(splits(path)):
        source = open_data(path, split)
        for i, label in enumerate(source.labels.tolist()):
            keys = ("", source.file_of(i) or ""), ("", source.identity(i))
            yield keys, source.classes[label] if label >= 0 else None


def _features(path: Path, divided: bool) -> Iterator[tuple[tuple[_Key, ...], str | None]]:
    """Iterate over the name of each image with a label, in its split if the collection is `divided`, and its class."""
    table = read_features(path)
    for split, name, label in zip(table.splits, table.paths, table.labels.tolist(), strict=True):
        if label >= 0:
            yield ((split if divided else "", name),), table.classes[label]
