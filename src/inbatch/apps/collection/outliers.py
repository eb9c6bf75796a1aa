"""List the images of a collection that are unlike the others, and those that look broken (`inbatch outliers`)."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.apps.collection.features import Collection, open_collection
from inbatch.apps.collection.images import COLUMNS, attempted, by_threads, check_index, check_list, write_kept
from inbatch.apps.reports.view_grid import check_picture, check_place, save_sheet
from inbatch.errors import ConfigError, DataError, Unwritten, check_whole
from inbatch.evaluation.image_defects import LIMITS, LONGEST, measures, reason
from inbatch.evaluation.outliers import OutlierScores, outlier_scores
from inbatch.runtime.isolation import isolated
from inbatch.runtime.terminal import counted
from inbatch.runtime.text import one_line

ORDERS = ("distribution", "distance", "density")
"""Scores of images by which outliers can be listed, the default first."""

_WIDTH = 10  # images per row of the picture


@isolated
def find_outliers(
    features: str | Path, data: Any = None, *, count: int = 50, order: str = "distribution", neighbours: int = 20,
    index: str = "exact", split: str | None = None, write: str | Path | None = None,
    picture: str | Path | None = None, settings: Mapping[str, Any] | None = None, device: str = "auto",
    quiet: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Return the images that are least like the others, and those that look broken, ready for JSON.

    `outliers` are ranked by their distance from the distribution of all images, their distance to their neighbours, or
    their relative density (`evaluation.outliers.outlier_scores`). `broken` are the images with a reason of
    `evaluation.image_defects.LIMITS`; they need the pixels, so that this list is None for features without images. No
    image is changed or deleted.

    Args:
        features: A run, the folder of an encoder, or a file of `inbatch embed`.
        data: The images; those of the run by default, none with a file.
        count: Number of outliers to list.
        order: What the list is ordered by, "distribution", "distance" or "density".
        neighbours: Number of neighbours.
        index: How neighbours are searched, "exact" or "approximate".
        split: The only split; all by default.
        write: CSV file to write with all other images, which `data` reads.
        picture: Image file to write with the listed images, broken ones first.
        settings: image_column and label_column of the images.
        device: Device on which features are computed.
        quiet: Show no progress on stderr.

    Raises:
        ConfigError: If a setting is invalid.
        DataError: If there are fewer than two images.
        Unwritten: If a file cannot be written; the error holds the result.
    """
    check_whole("count", count, 1)
    check_whole("neighbours", neighbours, 1)
    if order not in ORDERS:
        raise ConfigError(f"outliers are ordered by {', '.join(ORDERS)}, not {order!r}")
    check_index(index)
    check_list(write)
    if picture is not None:
        check_picture(picture)
        check_place(picture, data)
    columns = {key: (settings or {}).get(key) for key in COLUMNS}
    collection = open_collection(features, data, split=split, device=device, quiet=quiet, **columns)
    if (write or picture) and not collection.has_images:
        raise ConfigError(f"{collection.name} holds features without their images, which are to be written: pass DATA")
    if len(collection) < 2:
        raise DataError(f"{collection.name} has one image: an outlier is unlike the others, so at least 2 are needed")
    broken, unreadable = _broken(collection, quiet) if collection.has_images else ({}, [])
    scores = outlier_scores(collection.vectors, min(neighbours, len(collection) - 1), index)
    chosen = getattr(scores, order).argsort(descending=True, stable=True)[:count].tolist()
    result: dict[str, Any] = {
        **collection.origin,
        "images": len(collection),
        "neighbours": min(neighbours, len(collection) - 1),
        "index": index,
        "order": order,
        "outliers": [_row(collection, scores, i) for i in chosen],
        "reasons": dict(Counter(name for name, _ in broken.values())),
        "broken": [_row(collection, scores, i) | {"reason": name, "measured": text}
                   for i, (name, text) in broken.items()] if collection.has_images else None,
        "unreadable": [one_line(why) for why in (*collection.unreadable, *unreadable)],
        "kept": None, "written": None, "picture": None,
    }  # fmt: skip
    return _written(result, collection, [*broken], chosen, write, picture)


def _broken(collection: Collection, quiet: bool) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """Return the reason and its text for each image that looks broken, and messages on unreadable images."""
    values: dict[int, dict[str, float]] = {}
    unreadable = []
    parts = by_threads(lambda i: _measured(collection, i), range(len(collection)))
    for part in parts if quiet else counted(parts, len(collection), "examined"):
        for i, measured in part:
            if isinstance(measured, str):
                unreadable.append(measured)
            else:
                values[i] = measured
    usual = float(np.median([one["side"] for one in values.values()])) if values else 1.0
    broken = {}
    for i, one in values.items():
        if (why := reason(one | {"relative_side": one["side"] / usual})) is not None:
            broken[i] = why
    names = list(LIMITS)
    return dict(sorted(broken.items(), key=lambda item: (names.index(item[1][0]), item[0]))), unreadable


def _measured(collection: Collection, i: int) -> dict[str, float] | str:
    try:
        with collection.open(i) as picture:
            height, width = picture.size
            found = measures(picture.tensor(LONGEST))
    except DataError as error:
        return str(error)
    found["side"] = min(height, width)
    if (file := collection.file_of(i)) is not None:
        found["bytes_per_pixel"] = os.path.getsize(file) / (height * width)
    return found


def _row(collection: Collection, scores: OutlierScores, i: int) -> dict[str, Any]:
    row = collection.row(i)
    row["path"] = one_line(row["path"])
    return row | {name: float(getattr(scores, name)[i]) for name in ORDERS}


def _written(
    result: dict[str, Any], collection: Collection, broken: list[int], chosen: list[int], write: Any, picture: Any
) -> dict[str, Any]:
    """Write the requested files and return the result with them; raise Unwritten for the first that fails."""
    errors = []
    if write is not None:
        errors.append(attempted(lambda: write_kept(write, collection, {*broken, *chosen})))
        result["kept"] = len(collection) - len({*broken, *chosen})
        result["written"] = None if errors[-1] else str(write)
    if picture is not None:
        captions = [one["reason"] for one in result["broken"]]
        captions += [f"{result['order']} {one[result['order']]:.2f}" for one in result["outliers"]]
        errors.append(attempted(lambda: _draw(collection, [*broken, *chosen], captions, picture)))
        result["picture"] = None if errors[-1] else str(picture)
    if failed := [error for error in errors if error]:
        raise Unwritten(str(failed[0]), result) from failed[0]
    return result


def _draw(collection: Collection, numbers: list[int], captions: list[str], out: Any) -> None:
    tiles = []
    for i in numbers:
        with collection.open(i) as picture:
            tiles.append(picture.tensor(192))
    starts = range(0, len(tiles), _WIDTH)
    save_sheet(out, [tiles[at : at + _WIDTH] for at in starts], [captions[at : at + _WIDTH] for at in starts])
