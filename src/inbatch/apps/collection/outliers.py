"""List the images of a collection that are unlike the others, and those that look broken (`inbatch outliers`)."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from inbatch.apps.collection.features import Collection, open_collection
from inbatch.apps.collection.images import by_threads
from inbatch.apps.collection.output_files import check_images, check_outputs, with_files, write_list
from inbatch.apps.reports.captioned_grid import Tile, save_captioned
from inbatch.errors import ConfigError, DataError, check_whole, many
from inbatch.evaluation.image_defects import LIMITS, LONGEST, measures, reason
from inbatch.evaluation.neighbours import check_index
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
    picture: str | Path | None = None, device: str = "auto", quiet: bool = True, image_column: str | None = None,
    label_column: str | None = None,
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
        device: Device on which features are computed.
        quiet: Show no progress on stderr.
        image_column: Column of the images; by default that of the run.
        label_column: Column of the labels, likewise.

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
    check_outputs(write, picture, data)
    collection = open_collection(
        features, data, split=split, device=device, quiet=quiet, image_column=image_column, label_column=label_column
    )
    check_images(collection, write, picture)
    if len(collection) < 2:
        raise DataError(f"{collection.name} has one image: an outlier is unlike the others, so at least 2 are needed")
    if write is not None and count >= len(collection):
        raise _keeps_none(collection, f"-n {count:,} lists", "choose a smaller number")
    broken, unreadable = _find_broken(collection, quiet) if collection.has_images else ({}, [])
    scores = outlier_scores(collection.vectors, min(neighbours, len(collection) - 1), index)
    chosen = getattr(scores, order).argsort(descending=True, stable=True)[:count].tolist()
    left_out = {*broken, *chosen}
    kept = [i for i in range(len(collection)) if i not in left_out]
    if write is not None and not kept:
        listed = f"-n {count:,} with {many(len(broken), 'image')} that look broken lists"
        fix = "choose a smaller number" if len(broken) < len(collection) else "leave it out"
        raise _keeps_none(collection, listed, fix)
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
        "notes": list(collection.notes),
    }  # fmt: skip
    return with_files(result | {"kept": None if write is None else len(kept)}, {
        "written": (write, lambda path: write_list(path, collection, kept)),
        "picture": (picture, lambda path: _draw(path, collection, result, [*broken, *chosen])),
    })  # fmt: skip


def _keeps_none(collection: Collection, listed: str, fix: str) -> ConfigError:
    return ConfigError(
        f"{listed} all {len(collection):,} images of {collection.name}, so that --write would keep none: {fix}"
    )


def _find_broken(collection: Collection, quiet: bool) -> tuple[dict[int, tuple[str, str]], list[str]]:
    """Return the reason and its text for each image that looks broken, and messages on unreadable images."""
    values: dict[int, dict[str, float]] = {}
    unreadable = []
    parts = by_threads(lambda i: _measure_image(collection, i), range(len(collection)))
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


def _measure_image(collection: Collection, i: int) -> dict[str, float] | str:
    try:
        with collection.open(i) as picture:
            height, width = picture.size
            values = measures(picture.tensor(LONGEST))
    except DataError as error:
        return str(error)
    values["side"] = min(height, width)
    if (file := collection.file_of(i)) is not None:
        values["bytes_per_pixel"] = os.path.getsize(file) / (height * width)
    return values


def _row(collection: Collection, scores: OutlierScores, i: int) -> dict[str, Any]:
    row = collection.row(i)
    row["path"] = one_line(row["path"])
    return row | {name: float(getattr(scores, name)[i]) for name in ORDERS}


def _draw(path: Path, collection: Collection, result: dict[str, Any], numbers: list[int]) -> None:
    """Draw images with the reason why they are listed."""
    order = result["order"]
    captions = [one["reason"] for one in result["broken"]]
    captions += [f"{order} {one[order]:.2f}" for one in result["outliers"]]
    tiles = []
    for i, caption in zip(numbers, captions, strict=True):
        with collection.open(i) as picture:
            tiles.append(Tile(picture.tensor(192), (caption,)))
    save_captioned(path, [tiles[at : at + _WIDTH] for at in range(0, len(tiles), _WIDTH)])
