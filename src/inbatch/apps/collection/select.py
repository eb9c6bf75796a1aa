"""Select the images of a collection that are worth labelling next."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.apps.collection.features import Collection, open_collection
from inbatch.apps.collection.known_labels import KnownLabels, known_labels
from inbatch.apps.collection.output_files import check_images, check_outputs, with_files, write_list
from inbatch.apps.reports.captioned_grid import Tile, save_captioned
from inbatch.errors import ConfigError, check_whole
from inbatch.evaluation.selection import DEFAULT, STRATEGIES, Selection, select
from inbatch.runtime.isolation import isolated

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
    check_outputs(write, picture, data, labelled)
    collection = open_collection(
        features, data, split=split, device=device, quiet=quiet, image_column=image_column, label_column=label_column
    )
    known = known_labels(collection, labelled)
    named = replace(collection, labels=known.labels, classes=known.classes)  # with the labels of a list
    check_images(named, write, picture)
    chosen = select(
        collection.vectors, count, strategy, labelled=known.labelled, labels=known.labels, names=known.classes,
        seed=seed,
    )  # fmt: skip
    result = _result(collection, known, chosen)
    result |= {"strategy": strategy, "count": count, "seed": seed, "measure": chosen.measure}
    columns = {"rank": list(range(1, count + 1)), "reason": chosen.reasons}
    return with_files(result, {
        "written": (write, lambda path: write_list(path, named, chosen.rows.tolist(), columns)),
        "picture": (picture, lambda path: _draw(path, collection, chosen)),
    })  # fmt: skip


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
        "notes": [*collection.sentences, *known.notes, *chosen.notes],
    }


def _draw(path: Path, collection: Collection, chosen: Selection) -> None:
    tiles = [
        Tile(collection.image(row), (f"{rank}", collection.class_of(row) or ""))
        for rank, row in enumerate(chosen.rows[:_DRAWN].tolist(), 1)
    ]
    save_captioned(path, [tiles[at : at + _COLUMNS] for at in range(0, len(tiles), _COLUMNS)])
