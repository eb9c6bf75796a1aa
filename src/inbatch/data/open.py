"""Open a folder, a file, a named data set or an array as a source of images."""

import os
from collections.abc import Callable
from dataclasses import replace

from inbatch import rng
from inbatch.data.source import Reading, Source, Subset, unlabelled
from inbatch.data.sources import (
    arrays,
    cifar,
    digits,
    file_lists,
    folder,
    huggingface,
    numpy_files,
    own_data,
    parquet,
    remote_shards,
    several,
    torchvision_sets,
    webdataset,
)
from inbatch.data.sources.class_lists import choose
from inbatch.data.sources.columns import check_no_columns
from inbatch.data.sources.labels import NO_LABELS
from inbatch.data.sources.split_names import find_split
from inbatch.errors import DataError, type_name
from inbatch.runtime import own_parts
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.remote import public


def _find_several(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    return several.find_several(data, reading, _find)


OPENERS: dict[str, Callable[[object, Reading], dict[str, Callable[[], Source]] | None]] = {
    "a URL of .tar or .parquet files (s3://..., https://...)": remote_shards.find_remote,
    "an array (NumPy, PyTorch, h5py, zarr), or a pair (images, labels)": arrays.find_arrays,
    "a data set of PyTorch, a list of images, or another object with items": own_data.find_own_data,
    "digits-canvas or digits-canvas-colour": digits.find_digits,
    "torchvision/NAME, a set by its name": torchvision_sets.find_torchvision,
    "several paths, or a pattern in quotes": _find_several,
    "a Parquet file, or a folder with train.parquet": parquet.find_parquet,
    "a .csv, .tsv or .txt list of paths": file_lists.find_file_list,
    "a .npy or .npz file": numpy_files.find_numpy,
    "a folder of CIFAR-10 or CIFAR-100": cifar.find_cifar,
    "a Hugging Face Dataset, its folder, or hf/NAME": huggingface.find_huggingface,
    "a .tar, shards-{000..003}.tar or a folder of .tar files": webdataset.find_webdataset,
    "a folder of images": folder.find_folder,
}
"""Finders of all data kinds, by description.

A finder gets (data, reading) and returns {split: function that opens it}, or None if the data are of another kind; the
first match wins. To add a kind, write one file with a finder and add one line here.
"""

_SUBSET_SEED = 0  # independent of the run's seed: every run on "10,000 images" uses the same images


_WITH_COLUMNS = (
    _find_several,  # of which each part is opened by a finder
    remote_shards.find_remote,
    parquet.find_parquet,
    file_lists.find_file_list,
    numpy_files.find_numpy,
    huggingface.find_huggingface,
    webdataset.find_webdataset,
    own_data.find_own_data,
)
"""Finders of data whose images and labels are in columns, or have names of their own."""


def splits(data: object, image_column: str | None = None, label_column: str | None = None) -> tuple[str, ...]:
    """Return the splits of the data, such as ("train", "val", "test"); raise DataError if they cannot be opened.

    image_column, label_column: See `Reading`.
    """
    return tuple(_find(data, Reading(image_column=image_column, label_column=label_column)))


def open_data(
    data: object,
    split: str = "train",
    *,
    subset: int | None = None,
    channels: int | None = None,
    classes: str | None = None,
    levels: tuple[float, float] | None = None,
    download: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
) -> Source:
    """Open one split of a path, a named data set or an in-memory array (`OPENERS` lists the kinds).

    Args:
        data: Path, name, array, tensor or pair (images, labels); a pattern, or a list of paths.
        split: Name of the split; "train", "val" and "test" also name splits that are called otherwise in the data, and
            "test" names the validation images if there are no test images.
        subset: Use only this many images, the first of a fixed permutation, in the source's order.
        channels: See `Reading`; arrays and embedded data must have this number of channels.
        classes: Text file with the names of the classes to use, one per line, in the order of their numbers. Images of
            other classes are left out.
        levels: See `Reading`.
        download: See `Reading`.
        image_column: See `Reading`.
        label_column: See `Reading`; images of any kind are unlabelled with "none".
        group_column: See `Reading`.

    Raises:
        DataError: If the data or the split does not exist, or if `subset` exceeds the number of images.
    """
    openers = _find(data, Reading(channels, levels, download, image_column, label_column, group_column))
    if (name := find_split(split, openers)) is None:
        hint = "" if split != "train" else f": to learn from another one, pass --set split={next(iter(openers))}"
        raise DataError(f"{_name(data)} has no split {split!r}, only {', '.join(openers)}{hint}")
    source = openers[name]()
    if group_column is not None and source.groups is None:
        raise DataError(
            f"group_column = {group_column!r}: groups cannot be read from {source.name}; they are columns of lists, "
            "Parquet files and Hugging Face data, arrays of .npz files, keys of items, members of tar files, or parts "
            "of the paths of files"
        )
    if label_column == NO_LABELS:
        source.labels, source.classes, source.ids = unlabelled(len(source)), (), None
        source.label_note = "label_column = none"
    if classes is not None:
        source = choose(source, classes)
    if subset is None:
        return source
    if not 0 < subset <= len(source):
        raise DataError(f"subset = {subset:,}: {source.name} has {len(source):,} images; choose 1 to {len(source):,}")
    chosen = rng.permutation(_SUBSET_SEED, 0, len(source))[:subset].sort().values
    return Subset(source, chosen, "a fixed random choice")


def _find(data: object, reading: Reading) -> dict[str, Callable[[], Source]]:
    data = joined_paths(data)
    if isinstance(data, str) and not data:
        raise DataError(f"the path of the data is empty; data can be {'; '.join(OPENERS)}")
    if isinstance(data, list | tuple) and not data:
        raise DataError(f"the {type(data).__name__} of images is empty; data can be {'; '.join(OPENERS)}")
    for find in OPENERS.values():
        if (openers := find(data, reading)) is not None:
            if find not in _WITH_COLUMNS:  # a folder has groups by its paths
                without = replace(reading, group_column=None) if find is folder.find_folder else reading
                check_no_columns(without, _name(data))
            return openers
    for name, part in _of_packages().items():
        if (openers := part.maker(data, reading)) is not None:
            if not isinstance(openers, dict) or not all(map(callable, openers.values())):
                raise DataError(f"the source {name} must return {{split: function that opens it}} or None")
            return openers
    if isinstance(data, str | os.PathLike) and not os.path.exists(data):
        raise DataError(f"{_name(data)} does not exist; data can be {'; '.join(OPENERS)}")
    raise DataError(f"{_name(data)} cannot be opened; {_advice(data)}data can be {'; '.join(OPENERS)}")


def _of_packages() -> dict[str, own_parts.OwnPart]:
    """Return the finders of installed packages, entry points of `inbatch.sources`; broken ones are left out."""
    return own_parts.every_installed("source")[0]


def _advice(data: object) -> str:
    """Return how to pass an object that holds images but is not one of the supported kinds; empty for paths."""
    if isinstance(data, str | os.PathLike) or data is None:
        return ""
    if isinstance(data, tuple | list):
        return "stack images of one size to an array (numpy.stack), and pass images and labels as (images, labels); "
    if hasattr(data, "__array_interface__"):
        return "pass numpy.asarray(image)[None] for one image; "
    if hasattr(data, "__getitem__") or hasattr(data, "__iter__"):
        return "pass its images as one array (N, H, W, C) of uint8, or write them to a folder; "
    return ""


def _name(data: object) -> str:
    if isinstance(data, str | os.PathLike):
        return repr(public(os.fspath(data)))
    if isinstance(data, tuple | list) and data:
        return f"A {type(data).__name__} of {' and '.join(dict.fromkeys(map(type_name, data[:2])))}"
    return f"A {type_name(data)}"
