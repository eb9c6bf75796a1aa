"""Find identical and nearly identical images of a collection, and leaks between its splits (`inbatch duplicates`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.apps.collection.contents import ImageContents, read_contents
from inbatch.apps.collection.features import Collection
from inbatch.apps.collection.images import numbered, open_images
from inbatch.apps.collection.output_files import check_images, check_outputs, with_files, write_list
from inbatch.apps.reports.captioned_grid import Tile, save_captioned
from inbatch.errors import ConfigError, DataError, check_whole
from inbatch.evaluation.near_duplicates import (
    open_pairs,
    representatives,
    similar_pairs,
    unique_pairs,
)
from inbatch.evaluation.neighbours import check_index, nearest_others
from inbatch.evaluation.selected_rows import AnyRows, SelectedRows
from inbatch.evaluation.thumbnail_alignment import THRESHOLD, compare
from inbatch.runtime.device import device_for
from inbatch.runtime.isolation import isolated
from inbatch.runtime.text import one_line

_SHOWN = 24  # pairs above and as many below the threshold in the picture
_COLUMNS = 4  # pairs per row of the picture


@dataclass
class _Pairs:
    """Pairs of images that were compared: positions in `ImageContents.readable`, values, and whether mirrored."""

    places: Int[Tensor, "p 2"]
    similarity: Float[Tensor, "p"]
    check: Float[Tensor, "p"]
    mirrored: Tensor


@isolated
def find_duplicates(
    data: Any, features: str | Path | None = None, *, candidates: str | None = None,
    threshold: float | None = None, neighbours: int = 5, index: str = "exact", split: str | None = None,
    write: str | Path | None = None, picture: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, device: str = "auto", quiet: bool = True,
    image_column: str | None = None, label_column: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the groups of identical and nearly identical images, ready for JSON, those across splits first.

    Near duplicates are confirmed by the pixels: `evaluation.thumbnail_alignment`. Candidates are the nearest images
    by thumbnails, and by features if these are given. No image is changed or deleted.

    Args:
        data: The images, as in `open_data`; with a run, None for its own.
        features: A run, the folder of an encoder, or a file of `inbatch embed`.
        candidates: What names candidates: "thumbnails", "features" or "both"; by default all there is.
        threshold: Least value of the check of near duplicates, above -1, at most 1; `THRESHOLD` by default.
        neighbours: Candidates of each image by each search.
        index: How neighbours are searched, "exact" or "approximate".
        split: The only split; all by default.
        write: CSV file to write with the images to keep, which `data` reads: of each group its representative.
        picture: Image file to write with the pairs around the threshold.
        settings: Further reading options, without features or with a file of them: channels, levels.
        device: Device on which features are computed.
        quiet: Show no progress on stderr.
        image_column: Column of the images; with features, by default that of the run.
        label_column: Column of the labels, likewise.

    Raises:
        ConfigError: If a setting is invalid.
        DataError: If there are no readable images, or they cannot be listed in a file.
        Unwritten: If a file cannot be written; the error holds the result.
    """
    limit = THRESHOLD if threshold is None else threshold
    if not (isinstance(limit, int | float) and -1 < limit <= 1):
        raise ConfigError(f"the threshold is {limit!r}: choose a correlation above -1, at most 1, such as {THRESHOLD}")
    check_whole("neighbours", neighbours, 1)
    sources = _candidate_sources(candidates, features)
    check_index(index)
    device_for(device)  # also without features, which alone are computed on it
    check_outputs(write, picture, data)
    reading = dict(settings or {}) | {"image_column": image_column, "label_column": label_column}
    collection = open_images(data, features, split, reading, device, quiet)
    if not collection.has_images:
        raise ConfigError(f"{collection.name} holds features without their images, which are compared: pass DATA")
    check_images(collection, write, picture)
    images = read_contents(collection, quiet)
    if not len(images.readable):
        raise DataError(f"{collection.name} has no readable image: {'; '.join(images.unreadable[:3])}")
    places, similarity = _candidates(collection, images, (neighbours, index), sources)
    collection = replace(collection, vectors=torch.zeros(len(collection), 0))  # frees them, or the pages of their file
    pairs = _compare_pairs(images, places, similarity, limit)
    groups = _groups(collection, images, pairs, limit)
    near = (pairs.check >= limit).nonzero()[:, 0].tolist()
    leaks = [group for group in groups if len(group["splits"]) > 1]
    result: dict[str, Any] = {
        **collection.origin,
        "images": len(collection),
        "splits": {name: collection.splits.count(name) for name in collection.sources},
        "unreadable": [one_line(why) for why in images.unreadable],
        "threshold": limit,
        "candidates": {"by": sources, "neighbours": neighbours,
                       "index": index, "pairs": len(pairs.places)},
        "duplicates": sum(len(group["duplicates"]) for group in groups),
        "identical": sum(map(len, images.copies.values())),
        "leaks": len(leaks),
        "groups": groups,
        "pairs": [_pair(collection, images, pairs, i) for i in near],
    }  # fmt: skip
    kept, notes = _kept_rows(collection, images, groups), list(collection.notes)
    if picture is not None and not len(pairs.places):
        notes.append("there is no picture, because no two images are similar enough to be compared")
    return with_files(result | {"kept": len(kept), "notes": notes}, {
        "written": (write, lambda path: write_list(path, collection, kept)),
        "picture": (picture if len(pairs.places) else None, lambda path: _draw(path, collection, images, pairs, limit)),
    })  # fmt: skip


def _candidate_sources(candidates: str | None, features: str | Path | None) -> list[str]:
    """Return what names candidates; ConfigError for an unknown name, or features that are missing."""
    known: dict[str | None, list[str]] = {None: ["thumbnails"] if features is None else ["thumbnails", "features"]}
    known |= {"thumbnails": ["thumbnails"], "features": ["features"], "both": ["thumbnails", "features"]}
    if candidates not in known:
        raise ConfigError(f"candidates are named by thumbnails, features or both, not {candidates!r}")
    if features is None and "features" in known[candidates]:
        raise ConfigError(f"candidates = {candidates}: pass a run or a file of features that names them")
    return known[candidates]


def _candidates(
    collection: Collection, images: ImageContents, search: tuple[int, str], ways: list[str]
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, "p"]]:
    """Return pairs of candidates without the copies of identical images, as positions in `readable`, and similarity."""
    copied = torch.zeros(len(images.readable), dtype=torch.bool)
    copied[[i for others in images.copies.values() for i in others]] = True
    distinct = (~copied).nonzero()[:, 0]
    places, similarity, count = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0), min(search[0], len(distinct) - 1)
    if count and "thumbnails" in ways:
        places, similarity = similar_pairs(_rows(images.thumbnails, distinct), count, search[1])
    if count and "features" in ways:
        near, place = nearest_others(_rows(collection.vectors, images.readable[distinct]), count, index=search[1])
        own = torch.arange(len(distinct))[:, None].expand_as(place)
        more = torch.stack([own, place], 2).view(-1, 2)
        places, similarity = unique_pairs(torch.cat([places, more]), torch.cat([similarity, near.flatten()]))
    return distinct[places], similarity


def _rows(rows: Tensor, places: Tensor) -> AnyRows:
    """Return the rows at places that are in order, without a copy, which can take gigabytes."""
    return rows if len(places) == len(rows) else SelectedRows(rows, places)


def _compare_pairs(
    images: ImageContents, places: Int[Tensor, "p 2"], similarity: Float[Tensor, "p"], limit: float
) -> _Pairs:
    """Compare candidates, and images that confirmed pairs connect."""
    compared, count = compare(images.thumbnails, places), len(images.readable)
    check, mirrored = compared.check, compared.mirrored
    more = open_pairs(count, places[check >= limit])
    more = more[~torch.isin(*(pairs[:, 0] * count + pairs[:, 1] for pairs in (more, places)))]
    if len(more):
        compared = compare(images.thumbnails, more)
        places, check, mirrored = (
            torch.cat(both) for both in ((places, more), (check, compared.check), (mirrored, compared.mirrored))
        )
        similarity = torch.cat([similarity, torch.full((len(more),), torch.nan)])
    return _Pairs(places, similarity, check, mirrored)


def _groups(collection: Collection, images: ImageContents, pairs: _Pairs, limit: float) -> list[dict[str, Any]]:
    """Return a representative with its duplicates each; groups across splits first, then in the order of the images."""
    near = pairs.check >= limit
    places, check = pairs.places[near], pairs.check[near]
    chosen = representatives(len(images.readable), places, images.pixels.argsort(descending=True, stable=True))
    value = {(min(pair), max(pair)): c for pair, c in zip(places.tolist(), check.tolist(), strict=True)}
    original = torch.arange(len(images.readable))
    for first, others in images.copies.items():
        original[others] = first
    kept, members = chosen[original], dict[int, list[dict[str, Any]]]()
    for i in (kept != torch.arange(len(kept))).nonzero()[:, 0].tolist():
        first, keep = int(original[i]), int(kept[i])
        same = first == keep
        known = 1.0 if same else value[min(first, keep), max(first, keep)]
        members.setdefault(keep, []).append(_row(collection, images, i) | {"identical": same, "check": known})
    order, groups = list(collection.sources), []
    for keep in sorted(members):
        row = _row(collection, images, keep)
        named = {one["split"] for one in (row, *members[keep])}
        groups.append({"splits": sorted(named, key=order.index), "keep": row, "duplicates": members[keep]})
    return sorted(groups, key=lambda group: len(group["splits"]) < 2)


def _row(collection: Collection, images: ImageContents, place: int) -> dict[str, Any]:
    row = collection.row(int(images.readable[place]))
    return row | {"path": one_line(row["path"]), "pixels": int(images.pixels[place])}


def _pair(collection: Collection, images: ImageContents, pairs: _Pairs, i: int) -> dict[str, Any]:
    first, second = (one_line(collection.paths[int(images.readable[at])]) for at in pairs.places[i].tolist())
    splits = [collection.splits[int(images.readable[at])] for at in pairs.places[i].tolist()]
    return {
        "first": first,
        "second": second,
        "splits": splits,
        "similarity": float(pairs.similarity[i]),
        "check": float(pairs.check[i]),
        "mirrored": bool(pairs.mirrored[i]),
    }


def _kept_rows(collection: Collection, images: ImageContents, groups: list[dict[str, Any]]) -> list[int]:
    """Return the positions in the collection of the readable images that are not duplicates."""
    numbers = numbered(collection)
    duplicates = {numbers[one["split"]][one["index"]] for group in groups for one in group["duplicates"]}
    return [i for i in images.readable.tolist() if i not in duplicates]


def _draw(path: Path, collection: Collection, images: ImageContents, pairs: _Pairs, limit: float) -> None:
    """Draw the pairs around the threshold, by falling value of the check."""
    order = pairs.check.argsort(descending=True, stable=True)
    above = int((pairs.check >= limit).sum())
    tiles = []
    for i in order[max(0, above - _SHOWN) : above + _SHOWN].tolist():
        value, mirrored = float(pairs.check[i]), bool(pairs.mirrored[i])
        verdict = ("mirrored copy" if mirrored else "duplicate") if value >= limit else "no" + ", mirrored" * mirrored
        check = f"check {value:.2f}" if value > -1 else "not aligned"
        for at, caption in zip(pairs.places[i].tolist(), (check, verdict), strict=True):
            with collection.open(int(images.readable[at])) as picture:
                tiles.append(Tile(picture.tensor(192), (caption,)))
    width = 2 * _COLUMNS
    save_captioned(path, [tiles[at : at + width] for at in range(0, len(tiles), width)], gap_every=2)
