"""Sources of images and the loader that turns them into batches."""

import os
from collections.abc import Callable

from inbatch import draws
from inbatch.data import arrays, digits, folder, parquet
from inbatch.data.folder import write_folder
from inbatch.data.loader import Loader
from inbatch.data.resident import Resident, decode_all
from inbatch.data.source import Source, Subset
from inbatch.errors import DataError

__all__ = ["OPENERS", "Loader", "Resident", "Source", "Subset", "decode_all", "open_data", "splits", "write_folder"]

OPENERS: dict[str, Callable[[object, int | None], dict[str, Callable[[], Source]] | None]] = {
    "an array, a tensor or a pair (images, labels)": arrays.find,
    "digits-canvas or digits-canvas-colour": digits.find,
    "a Parquet file, or a folder with train.parquet": parquet.find,
    "a folder of images": folder.find,
}
"""Every kind of data. A finder gets (data, channels) and returns {split: function that opens it}, or None if the
data is not of its kind; the first that answers wins. A further kind is one file with a finder and one line here."""

_SUBSET_SEED = 0  # not the run's: every run on "10,000 images" sees the same ones


def splits(data: object) -> tuple[str, ...]:
    """Which splits the data has: ("train",) or ("train", "test"). DataError if nothing can open it."""
    return tuple(_find(data, None))


def open_data(data: object, split: str = "train", *, subset: int | None = None, channels: int | None = None) -> Source:
    """Open one split of a path, a name or an in-memory array (`OPENERS` lists the kinds).

    subset: only that many images, the first of a fixed permutation, in the source's order.
    channels: 1 or 3 for files (3 by default); arrays and embedded data must agree with it.
    Raises DataError if there is no such data, split or number of images.
    """
    found = _find(data, channels)
    if split not in found:
        raise DataError(f"{_name(data)} has no split {split!r}, only {', '.join(found)}")
    source = found[split]()
    if subset is None:
        return source
    if not 0 < subset <= len(source):
        raise DataError(f"{subset:,} images of {source.name} were asked for; it has {len(source):,}")
    chosen = draws.permutation(_SUBSET_SEED, 0, len(source))[:subset].sort().values
    return Subset(source, chosen, "a fixed random choice")


def _find(data: object, channels: int | None) -> dict[str, Callable[[], Source]]:
    for find in OPENERS.values():
        if (found := find(data, channels)) is not None:
            return found
    if isinstance(data, str | os.PathLike) and not os.path.exists(data):
        raise DataError(f"{_name(data)} does not exist; data can be {'; '.join(OPENERS)}")
    raise DataError(f"{_name(data)} cannot be opened; data can be {'; '.join(OPENERS)}")


def _name(data: object) -> str:
    return repr(os.fspath(data)) if isinstance(data, str | os.PathLike) else f"A {type(data).__name__}"
