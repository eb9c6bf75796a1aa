"""Images of Python objects: map-style data sets of PyTorch, lists of images of any sizes, iterables with a length.

An item is an image, (image, label, ...), or a dict with an image and perhaps a label. An image is of Pillow, a uint8
array (h, w) or (h, w, C), or a uint8 tensor (h, w) or (C, h, w).
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from inbatch.data.pixels import Levels, from_pillow, to_bytes
from inbatch.data.source import Reading, Source, signed, unlabelled
from inbatch.data.sources.arrays import Pixels, is_array
from inbatch.data.sources.columns import image_column, label_column
from inbatch.data.sources.groups import check_group_column, groups_of_values
from inbatch.data.sources.labels import NO_LABELS, Labels, from_array
from inbatch.errors import DataError, reason, type_name
from inbatch.runtime.spacing import spaced

_SAMPLED = 32
"""Evenly spaced images whose pixels are part of the signature."""


class ItemSource(Source):
    """The items of an object, read again at every access.

    Args:
        items: The object, with `__getitem__` and `__len__`.
        name: Name of its kind.
        reading: See `Reading`; the columns are keys of items that are dicts.
        labels: Labels of all items, if they are passed separately.

    Raises:
        DataError: If an item is not an image, or another one each time it is read, or if the labels cannot be used.
    """

    def __init__(self, items: Any, name: str, reading: Reading, labels: Any = None):
        self.items, self.levels, self.name = items, reading.levels, name
        if not (count := len(items)):
            raise DataError(f"The {name} holds no image (its length is 0)")
        first = self._item(0)
        self.keys = _keys(first, reading, name)
        picture = self._picture(first, 0)
        own = _channels(picture)
        super().__init__(name, reading.channels or own, unlabelled(count), ())
        pixels = self._pixels(picture)
        if not torch.equal(pixels, self._pixels(self._picture(self._item(0), 0))):
            raise DataError(
                f"The {name} gives another image each time that item 0 is read: leave out random transforms, which "
                "belong to the views"
            )
        known = self._labels(labels, first, reading)
        self.labels, self.classes, self.ids, self.label_note = known.numbers, known.classes, known.ids, known.note
        if reading.group_column is not None:
            self.groups = self._groups(reading.group_column, first)

    def open(self, i: int) -> Pixels:
        return Pixels(self._pixels(self._picture(self._item(i), i), self.identity(i)))

    def identity(self, i: int) -> str:
        return f"item {i}"

    def signature(self) -> str:
        places = spaced(len(self), _SAMPLED).tolist()
        digest = hashlib.sha256()
        for i in places:
            try:
                digest.update(self.image(i).contiguous().numpy().tobytes())
            except DataError as error:  # counted when all images are read
                digest.update(str(error).encode())
        return signed(self, digest.digest())

    def _item(self, i: int) -> Any:
        try:
            return self.items[i]
        except Exception as error:  # of any code
            raise DataError(f"item {i} of the {self.name} cannot be read: {reason(error)}") from error

    def _picture(self, item: Any, i: int) -> Any:
        if self.keys is None:
            return item
        try:
            return item[self.keys[0]]
        except (LookupError, TypeError):
            raise DataError(
                f"item {i} of the {self.name} is {type_name(item)} without {self.keys[0]!r}, unlike item 0"
            ) from None

    def _values(self, key: Any) -> list[Any]:
        """Return the label or the group of every item; None for items that have none or cannot be read."""
        values = []
        for i in range(len(self.items)):
            value = None
            with suppress(DataError, LookupError, TypeError):  # DataError: the image is counted as unreadable
                value = self._item(i)[key]
            values.append(value)
        return values

    def _pixels(self, picture: Any, which: str = "item 0") -> UInt8[Tensor, "c h w"]:
        try:
            return pixels_of(picture, self.channels, self.levels)
        except ValueError as error:
            raise DataError(f"{which} of the {self.name} is not an image: {error}") from None

    def _labels(self, labels: Any, first: Any, reading: Reading) -> Labels:
        """Return the labels: those passed, of the attribute `targets`, or of every item, which are then all read.

        `targets` and `classes` are not used if the label has another key than the usual one, or is transformed.
        """
        what, count = f"The labels of the {self.name}", len(self.items)
        names = getattr(self.items, "classes", None)
        names = tuple(map(str, names)) if isinstance(names, list | tuple) else ()
        if reading.label_column == NO_LABELS:
            return Labels(unlabelled(count))
        if labels is not None:
            return from_array(labels, count, what)
        if self.keys is None or self.keys[1] is None:
            return Labels(unlabelled(count))
        usual = _keys(first, replace(reading, label_column=None), self.name)
        changed = usual != self.keys or getattr(self.items, "target_transform", None) is not None
        names = () if changed else names
        targets = None if changed else getattr(self.items, "targets", None)
        if targets is None or not hasattr(targets, "__len__") or len(targets) != count:
            targets = self._values(self.keys[1])
            targets = [one.item() if isinstance(one, Tensor) and one.numel() == 1 else one for one in targets]
        if any(isinstance(one, Tensor | np.ndarray) for one in targets):
            return Labels(unlabelled(count), note=f"{what} are arrays, several for each image")
        return from_array(targets, count, what, names)

    def _groups(self, key: str, first: Mapping[Any, Any]) -> Tensor:
        """Return the groups under a key of the items, which are all read."""
        check_group_column(list(map(str, first)), key, self.name)
        own = next(one for one in first if str(one) == key)
        values = [one.item() if getattr(one, "ndim", None) == 0 else one for one in self._values(own)]
        return groups_of_values(values, f"The groups of the {self.name}")


def _keys(item: Any, reading: Reading, name: str) -> tuple[Any, Any] | None:
    """Return the keys of image and label in an item, None for no label; None if the items are images themselves."""
    if isinstance(item, Mapping):
        types = {str(key): type_name(value) for key, value in item.items()}
        keys = {str(key): key for key in item}
        image = image_column([key for key in types if _is_image(item[keys[key]])], types, reading.image_column, name)
        label = label_column(list(types), [], reading.label_column, image, name)
        return keys[image], None if label is None else keys[label]
    if (reading.image_column or reading.group_column) or reading.label_column not in (None, NO_LABELS):
        raise DataError(
            f"image_column, label_column and group_column: the items of the {name} are not dicts; leave them out"
        )
    if isinstance(item, tuple | list):
        if not item or not _is_image(item[0]):
            raise DataError(
                f"item 0 of the {name} is {_forms(item)}: an item is an image, (image, label) or a dict with an image"
            )
        return (0, 1) if len(item) > 1 else (0, None)
    return None


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (is_array(value) and len(value.shape) in (2, 3))


def _forms(item: Any) -> str:
    return f"({', '.join(map(type_name, item))})"


def _channels(picture: Any) -> int:
    """Return the number of channels of an image: 3 for those of Pillow, as for files."""
    if isinstance(picture, Tensor) and picture.ndim == 3:
        return int(picture.shape[0])
    if is_array(picture):
        return int(picture.shape[2]) if len(picture.shape) == 3 else 1
    return 3


def pixels_of(picture: Any, channels: int, levels: Levels | None) -> UInt8[Tensor, "c h w"]:
    """Return the pixels of an image of Pillow, NumPy or torch; ValueError if it is none, or of other channels."""
    if isinstance(picture, Image.Image):
        rows = from_pillow(ImageOps.exif_transpose(picture), channels, levels)
        return torch.from_numpy(np.ascontiguousarray(rows.transpose(2, 0, 1)))
    if not is_array(picture):
        raise ValueError(f"it is {type_name(picture)}: return a Pillow image, a uint8 array or a uint8 tensor")
    values = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape is {values.shape}, neither (h, w) nor that of one image with channels")
    if values.dtype != np.uint8 and levels is None:
        raise ValueError(f"it has {values.dtype} values: return uint8, 0 to 255 (leave out ToTensor and Normalize)")
    values = to_bytes(values, levels)
    if values.ndim == 2:
        values = values[None]
    elif not isinstance(picture, Tensor):
        values = values.transpose(2, 0, 1)
    if len(values) == 1 and channels == 3:
        values = values.repeat(3, 0)
    if len(values) != channels:
        raise ValueError(
            f"it has {len(values)} channels, {channels} are read (a run with --set channels={len(values)} reads them)"
        )
    return torch.from_numpy(np.ascontiguousarray(values))


def find_own_data(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the split of an object of images, or of a pair (list of images, labels); return None for anything else."""
    items, labels = data, None
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], list) and _is_images(data[0]):
        items, labels = data
    if isinstance(items, str | bytes | Mapping) or is_array(items) or hasattr(items, "__fspath__"):
        return None
    if type(items).__module__.partition(".")[0] == "datasets":  # of Hugging Face, with columns and splits
        return None
    if isinstance(items, list | tuple):
        if not _is_images(items):
            return None
        name = "list of images"
    elif hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        name = type(items).__name__
    elif hasattr(items, "__iter__") and hasattr(items, "__len__"):
        name = type(items).__name__
        return {"train": lambda: ItemSource(_read_once(items, name), name, reading, labels)}
    else:
        return None
    return {"train": lambda: ItemSource(items, name, reading, labels)}


def _is_images(items: object) -> bool:
    """Return whether a list holds images, or (image, label), or dicts; a list of paths is another kind of data."""
    if not isinstance(items, list | tuple) or not items:
        return False
    first = items[0]
    inside = first[0] if isinstance(first, tuple | list) and first else first
    return _is_image(inside) or (isinstance(first, Mapping) and any(map(_is_image, first.values())))


def _read_once(items: Any, name: str) -> list[Any]:
    """Return the items of an iterable; DataError if it gives another number of items than its length."""
    read = list(items)
    if len(read) != len(items):
        raise DataError(
            f"The {name} says that its length is {len(items):,}, and gives {len(read):,} items: correct its __len__"
        )
    return read
