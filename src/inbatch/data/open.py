"""Open a folder, a file, a named data set or an array as a source of images."""

import os
from collections.abc import Callable

from inbatch import rng
from inbatch.data.source import Reading, Source, Subset
from inbatch.data.sources import (
    arrays,
    cifar,
    digits,
    file_lists,
    folder,
    huggingface,
    numpy_files,
    parquet,
    several,
    torchvision_sets,
    webdataset,
)
from inbatch.data.sources.class_lists import choose
from inbatch.data.sources.split_names import find_split
from inbatch.errors import DataError
from inbatch.runtime.path_list import joined_paths

OPENERS: dict[str, Callable[[object, Reading], dict[str, Callable[[], Source]] | None]] = {
    "an array, a tensor or a pair (images, labels)": arrays.find_arrays,
    "digits-canvas or digits-canvas-colour": digits.find_digits,
    "torchvision/NAME, a set by its name": torchvision_sets.find_torchvision,
    "several paths, or a pattern in quotes": lambda data, reading: several.find_several(data, reading, _find),
    "a Parquet file, or a folder with train.parquet": parquet.find_parquet,
    "a .csv, .tsv or .txt list of paths": file_lists.find_file_list,
    "a .npy or .npz file": numpy_files.find_numpy,
    "a folder of CIFAR-10 or CIFAR-100": cifar.find_cifar,
    "a folder of Hugging Face datasets, or hf/NAME": huggingface.find_huggingface,
    "a .tar, shards-{000..003}.tar or a folder of .tar files": webdataset.find_webdataset,
    "a folder of images": folder.find_folder,
}
"""Finders of all data kinds, by description.

A finder gets (data, reading) and returns {split: function that opens it}, or None if the data are of another kind; the
first match wins. To add a kind, write one file with a finder and add one line here.
"""

_SUBSET_SEED = 0  # independent of the run's seed: every run on "10,000 images" uses the same images


def splits(data: object) -> tuple[str, ...]:
    """Return the splits of the data, such as ("train", "val", "test"); raise DataError if the data cannot be opened."""
    return tuple(_find(data, Reading()))


def open_data(
    data: object,
    split: str = "train",
    *,
    subset: int | None = None,
    channels: int | None = None,
    classes: str | None = None,
    levels: tuple[float, float] | None = None,
    download: bool = False,
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

    Raises:
        DataError: If the data or the split does not exist, or if `subset` exceeds the number of images.
    """
    found = _find(data, Reading(channels, levels, download))
    if (name := find_split(split, found)) is None:
        way = "" if split != "train" else f": to learn from another one, pass --set split={next(iter(found))}"
        raise DataError(f"{_name(data)} has no split {split!r}, only {', '.join(found)}{way}")
    source = found[name]()
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
    for find in OPENERS.values():
        if (found := find(data, reading)) is not None:
            return found
    if isinstance(data, str | os.PathLike) and not os.path.exists(data):
        raise DataError(f"{_name(data)} does not exist; data can be {'; '.join(OPENERS)}")
    raise DataError(f"{_name(data)} cannot be opened; data can be {'; '.join(OPENERS)}")


def _name(data: object) -> str:
    return repr(os.fspath(data)) if isinstance(data, str | os.PathLike) else f"A {type(data).__name__}"
