"""Find likely label errors in a collection."""

from pathlib import Path
from typing import Any

from inbatch.apps.collection.features import Collection, open_collection
from inbatch.apps.collection.output_files import check_images, check_outputs, with_files, write_list
from inbatch.apps.reports.captioned_grid import Tile, save_captioned
from inbatch.errors import DataError, check_whole
from inbatch.evaluation.label_errors import LabelErrors, check_labels
from inbatch.runtime.isolation import isolated

_DRAWN, _SHOWN = 60, 5
"""Suspects in a picture, and neighbours of each that are listed."""
_RELIABLE = 0.7
"""Share of predicted labels below which many suspects were right labels in docs/after/labels.md."""


@isolated
def find_label_errors(
    features: str | Path, data: Any = None, *, count: int | None = None, folds: int = 5, neighbours: int = 30,
    split: str | None = None, write: str | Path | None = None, picture: str | Path | None = None, seed: int = 0,
    device: str = "auto", quiet: bool = True, image_column: str | None = None, label_column: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the images whose labels are likely wrong, the most likely error first, with the suggested classes.

    Every label is checked by other images only: see `inbatch.evaluation.label_errors.check_labels`.

    Args:
        features: A run, an encoder's folder, or a file of `inbatch embed`.
        data: The images; by default those of the run, and none with a file of features.
        count: Largest number of suspects; None for all.
        folds: Parts of the cross-validation.
        neighbours: Number of neighbours.
        split: The only split to check; None for every image.
        write: A CSV file for path, class, split, suggested class and margin of the suspects.
        picture: An image file for the first 60 suspects with a neighbour of the suggested class each.
        seed: Seed of the folds.
        device: Device on which features are computed, or "auto".
        quiet: Print no progress.
        image_column: Column of the images; by default that of the run.
        label_column: Column of the labels, likewise.

    Returns:
        "suspects": for each, path, split, index, class, suggested class, margin, probabilities of both by probe and
        neighbours, and the nearest images; "suspected": their number before `count`; "agreement": share of the labels
        that the other images predict; number of "images" and of "checked" ones; "notes"; and the settings.

    Raises:
        ConfigError: For fewer than 2 folds.
        DataError: If features or images cannot be read, or if fewer than two classes have three images.
        Unwritten: If a file cannot be written after the search.
    """
    if count is not None:
        check_whole("the number of suspects", count, least=1)
    check_outputs(write, picture, data)
    collection = open_collection(
        features, data, split=split, device=device, quiet=quiet, image_column=image_column, label_column=label_column
    )
    if not (collection.labels >= 0).any():
        raise DataError(f"no image of {collection.name} has a label: pass labelled images")
    check_images(collection, write, picture)
    errors = check_labels(collection.vectors, collection.labels, folds=folds, k=neighbours, seed=seed)
    result = _result(collection, errors, count) | {"folds": folds, "neighbours": neighbours, "seed": seed}
    places = errors.suspects[:count].tolist()
    rows = errors.checked[places].tolist()
    columns = {key: [one[key] for one in result["suspects"]] for key in ("suggested", "margin")}
    return with_files(result, {
        "written": (write, lambda path: write_list(path, collection, rows, columns)),
        "picture": (picture if rows else None, lambda path: _draw(path, collection, errors, places[:_DRAWN])),
    })  # fmt: skip


def _result(collection: Collection, errors: LabelErrors, count: int | None) -> dict[str, Any]:
    """Return the suspects for JSON."""
    notes = [*collection.sentences, *errors.notes]
    if errors.agreement < _RELIABLE:
        notes.append(
            f"the other images predict only {errors.agreement:.0%} of the labels: unless many are wrong, the "
            "features separate the classes badly, and most suspects are labelled correctly; check the first ones"
        )
    return {
        **collection.origin,
        "images": len(collection),
        "checked": len(errors.checked),
        "classes": len(collection.classes),
        "agreement": errors.agreement,
        "suspected": len(errors.suspects),
        "suspects": [_suspect(collection, errors, place) for place in errors.suspects[:count].tolist()],
        "notes": notes,
    }


def _suspect(collection: Collection, errors: LabelErrors, place: int) -> dict[str, Any]:
    row = int(errors.checked[place])
    near = errors.neighbours[place, :_SHOWN].tolist()
    return collection.row(row) | {
        "suggested": collection.classes[int(errors.suggested[place])],
        "margin": round(errors.margin[place].item(), 4),
        "probe": _pair(errors.probe[place].tolist()),
        "neighbours": _pair(errors.votes[place].tolist()),
        "nearest": [{"path": collection.paths[i], "class": collection.class_of(i)} for i in near],
    }


def _pair(values: list[float]) -> dict[str, float]:
    return {"label": round(values[0], 4), "suggested": round(values[1], 4)}


def _draw(path: Path, collection: Collection, errors: LabelErrors, places: list[int]) -> None:
    """Draw three suspects per row, each with its nearest image of the suggested class."""
    tiles = []
    for place in places:
        row, suggested = int(errors.checked[place]), int(errors.suggested[place])
        tiles.append(Tile(collection.image(row), ("labelled", collection.class_of(row) or ""), "#d55e00"))
        like = next((i for i in errors.neighbours[place].tolist() if int(collection.labels[i]) == suggested), None)
        name = collection.classes[suggested]
        tiles.append(Tile(None if like is None else collection.image(like), ("suggested, as", name), "#0072b2"))
    save_captioned(path, [tiles[at : at + 6] for at in range(0, len(tiles), 6)], gap_every=2)
