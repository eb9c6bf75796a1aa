"""Select the images of a collection that are worth labelling next."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.apps.collection.features import Collection, open_collection, write_list
from inbatch.apps.collection.known_labels import KnownLabels, known_labels
from inbatch.apps.reports.captioned_grid import Tile, save_captioned
from inbatch.apps.reports.view_grid import check_picture
from inbatch.errors import ConfigError, DataError, InbatchError, Unwritten, check_whole
from inbatch.evaluation.selection import DEFAULT, STRATEGIES, Selection, select
from inbatch.runtime.files import check_writable
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of

_DRAWN, _COLUMNS = 100, 10


@isolated
def select_images(
    features: str | Path, data: Any = None, *, count: int = 100, strategy: str = DEFAULT,
    labelled: str | Path | None = None, split: str | None = None, write: str | Path | None = None,
    picture: str | Path | None = None, seed: int = 0, device: str = "auto", quiet: bool = True,
    image_column: str | None = None, label_column: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the images to label next, in the order of choice, with the reason for each.

    Args:
        features: A run, an encoder's folder, or a file of `inbatch embed`.
        data: The images; by default those of the run, and none with a file of features.
        count: Number of images to choose.
        strategy: A name of `STRATEGIES`, see `inbatch.evaluation.selection.select`.
        labelled: What is labelled already and never chosen again, see `known_labels`: "data", "none", a list or
            features.
        split: The only split to choose from; None for every image.
        write: A CSV file for path, class, split, rank and reason, which `--data` reads.
        picture: An image file for the first 100 chosen images.
        seed: Seed of draws and of k-means.
        device: Device on which features are computed, or "auto".
        quiet: Print no progress.
        image_column: Column of the images; by default that of the run.
        label_column: Column of the labels, likewise.

    Returns:
        "chosen": rank, path, split, index, class, value and reason of each; "measure": what the value is; the number of
        "images", "labelled" ones and of "candidates"; "notes"; and the settings.

    Raises:
        ConfigError: For an unknown strategy, or more images than can be chosen.
        DataError: If features, images or the list cannot be read or do not belong together.
        Unwritten: If a file cannot be written after the choice.
    """
    check_whole("the number of images to choose", count, least=1)
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    check_outputs(write, picture)
    collection = open_collection(
        features, data, split=split, device=device, quiet=quiet, image_column=image_column, label_column=label_column
    )
    check_images(collection, write, picture)
    known = known_labels(collection, labelled)
    chosen = select(
        collection.vectors, count, strategy, labelled=known.labelled, labels=known.labels, names=known.classes,
        seed=seed,
    )  # fmt: skip
    result = _result(collection, known, chosen)
    result |= {"strategy": strategy, "count": count, "seed": seed, "measure": chosen.measure}
    try:
        if write is not None:
            columns = {"rank": list(range(1, count + 1)), "reason": chosen.reasons}
            write_list(write, _named(collection, known), chosen.rows.tolist(), columns)
            result["written"] = str(path_of(write, "out"))
        if picture is not None:
            _draw(path_of(picture, "out"), collection, chosen)
            result["picture"] = str(path_of(picture, "out"))
    except InbatchError as error:
        raise Unwritten(str(error), result) from error
    return result


def check_outputs(write: str | Path | None, picture: str | Path | None) -> None:
    """Raise ConfigError for a file extension that is not written, InbatchError if a file cannot be written."""
    if write is not None:
        if (path := path_of(write, "out")).suffix.lower() != ".csv":
            raise ConfigError(f"{path}: a list of images is written to a file that ends in .csv")
        check_writable(path)
    if picture is not None:
        check_picture(picture)


def check_images(collection: Collection, write: str | Path | None, picture: str | Path | None) -> None:
    """Raise DataError, before any computation, if a list or a picture needs images and there are features only."""
    if not collection.has_images and (write is not None or picture is not None):
        what = "a list of their files" if write is not None else "a picture"
        raise DataError(f"{collection.name} holds features without their images, and {what} needs them: pass DATA")
    if write is not None and collection.file_of(0) is None:
        raise DataError(f"the images of {collection.origin['data']} have no files of their own that a list could name")


def _named(collection: Collection, known: KnownLabels) -> Collection:
    """Return the collection with the labels of a list."""
    return replace(collection, labels=known.labels, classes=known.classes)


def _result(collection: Collection, known: KnownLabels, chosen: Selection) -> dict[str, Any]:
    """Return the choice for JSON."""
    rows = [
        {"rank": rank} | collection.row(row) | {"value": value, "reason": reason}
        for rank, (row, value, reason) in enumerate(
            zip(chosen.rows.tolist(), chosen.values.tolist(), chosen.reasons, strict=True), 1
        )
    ]
    labelled = int(known.labelled.sum())
    return {
        **collection.origin,
        "images": len(collection),
        "labelled": labelled,
        "candidates": len(collection) - labelled,
        "chosen": rows,
        "notes": [*collection.notes, *known.notes, *chosen.notes],
        "written": None,
        "picture": None,
    }


def _draw(path: Path, collection: Collection, chosen: Selection) -> None:
    tiles = [
        Tile(collection.image(row), (f"{rank}", collection.class_of(row) or ""))
        for rank, row in enumerate(chosen.rows[:_DRAWN].tolist(), 1)
    ]
    save_captioned(path, [tiles[at : at + _COLUMNS] for at in range(0, len(tiles), _COLUMNS)])
