"""Write the map of a collection, or of two runs side by side, as one HTML file (`inbatch explore`)."""

import os
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from inbatch.apps.collection.features import ENDINGS, Collection, open_collection, take
from inbatch.apps.reports.explorer.contents import page_data
from inbatch.apps.reports.explorer.facts import Facts, common_neighbours, gather_facts, near_duplicates
from inbatch.apps.reports.explorer.page import render_page, sprite_json
from inbatch.apps.reports.explorer.projection import choose_projection, project
from inbatch.apps.reports.explorer.sprite import Sprite, draw_sprite
from inbatch.apps.reports.view_grid import check_place
from inbatch.errors import ConfigError, DataError, check_whole, many
from inbatch.evaluation.neighbours import check_index
from inbatch.models.shipped_weights import is_shipped
from inbatch.runtime.files import check_writable, replacing
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of
from inbatch.runtime.text import one_line

NEIGHBOURS = 12
CLUSTERS = 10
LARGEST = 200_000
"""Images above which a page is refused: browsers take minutes to open it."""
_TILES = ((10_000, 64), (LARGEST, 32))
"""Images up to which a thumbnail has this side in pixels by default."""


@dataclass(frozen=True)
class Pictures:
    """How thumbnails are stored.

    Attributes:
        side: Side of a thumbnail in pixels; None for 64 up to 10,000 images, else 32; 0 for no thumbnails.
        inside: Megabytes of thumbnails up to which they are part of the HTML file; more go to a folder.
    """

    side: int | None = None
    inside: float = 30.0

    def __post_init__(self) -> None:
        if self.side is not None:
            check_whole("thumbnails", self.side)
            if self.side != 0 and not 16 <= self.side <= 256:
                raise ConfigError(f"thumbnails = {self.side} pixels: choose 16 to 256, or 0 for none")
        if not self.inside >= 0:
            raise ConfigError(f"inside = {self.inside}: give the megabytes of thumbnails in the file, 0 or more")


def is_features(path: str | Path) -> bool:
    """Return whether a path holds features or an encoder rather than images."""
    place = path_of(path)
    if is_shipped(place):  # also a wrong name, which opening it reports with those that exist
        return True
    if place.is_dir():
        return any((place / name).is_file() for name in ("recipe.json", "encoder/config.json", "model.safetensors"))
    if place.suffix == ".npz" and zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            return "vector.npy" in archive.namelist()
    if place.suffix == ".parquet" and place.is_file() and find_spec("pyarrow"):
        from pyarrow.lib import ArrowInvalid
        from pyarrow.parquet import read_schema

        with suppress(ArrowInvalid):  # opening it as data reports it
            return "vector" in read_schema(place).names
    return False


@isolated
def explore_features(
    features: str | Path, data: Any = None, *, other: str | Path | None = None, out: str | Path = "map.html",
    projection: str = "auto", thumbnails: int | None = None, inside: float = 30.0, index: str = "exact", seed: int = 0,
    split: str | None = None, device: str = "auto", quiet: bool = True, image_column: str | None = None,
    label_column: str | None = None, notify: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Write a map of images as an HTML file that opens without a network, and return its description, ready for JSON.

    The page shows images, nearest neighbours, classes, clusters, splits, outlier scores and near duplicates, and
    exports selections as CSV files that can be passed as data.

    Args:
        features: A run, an encoder's folder, or a file of `embed_run`.
        data: The images; by default those of the run. With a file of features they are needed for thumbnails.
        other: Another run or file with features of the same images, which is shown next to the first.
        out: File to write. Thumbnails of more than `inside` megabytes are written to the folder NAME_files next to it.
        projection: auto, pca, tsne, umap or pacmap.
        thumbnails: Side of the thumbnails in pixels, 0 for none; by default 64 for up to 10,000 images, else 32.
        inside: Megabytes of thumbnails that may be part of the HTML file.
        index: How neighbours are searched, "exact" or "approximate" (extra `index`).
        seed: Seed of the projection and of k-means.
        split: The only split to show; None for every image.
        device: Device on which features are computed, or "auto".
        quiet: Print no progress to stderr.
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.
        notify: Receives sentences for the user, such as the projection that was chosen.

    Raises:
        ConfigError: If an argument is invalid or a library is not installed.
        DataError: If features or images cannot be read, or the two sets of features are of different images.
        InbatchError: If the file cannot be written.
    """
    began = time.perf_counter()
    pictures, out = Pictures(thumbnails, inside), _checked_out(out)
    choose_projection(projection, 0)
    check_index(index)
    options: dict[str, Any] = {"split": split, "device": device, "quiet": quiet}
    options |= {"image_column": image_column, "label_column": label_column}
    collections = [open_collection(features, data, **options)]
    if other is not None:
        where = data if data is not None or path_of(other).suffix in ENDINGS else collections[0].origin["data"]
        collections.append(_arranged(open_collection(other, where, **options), collections[0]))
    for text in (note for collection in collections for note in collection.sentences):
        notify(text)
    first, seconds = collections[0], {"features": time.perf_counter() - began}
    if len(first) > LARGEST:
        raise DataError(f"{many(len(first), 'image')} are too many for a page of at most {LARGEST:,}: choose a --split")
    name, why = choose_projection(projection, len(first))
    notify(f"projection: {name}, because {why}" if projection == "auto" else f"projection: {name}")
    facts = [_facts(collection, name, (index, seed), seconds) for collection in collections]
    sprite = _sprite(first, pictures, quiet, seconds)
    groups = None if sprite is None else _groups(sprite, facts, seconds)
    names = _names([str(features), *([str(other)] if other is not None else [])])
    shown = page_data(first, facts, names, name, groups)
    folder = _write(out, first, shown, sprite, pictures)
    seconds["total"] = time.perf_counter() - began
    return _described(out, collections, facts, sprite, groups, folder) | {
        "projection": name, "projection_reason": why, "index": index, "seed": seed,
        "seconds": {what: round(value, 2) for what, value in seconds.items()},
    }  # fmt: skip


def _checked_out(out: str | Path) -> Path:
    path = path_of(out, "out")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path}: a map is written to a file that ends in .html")
    check_writable(path)
    return path


def _arranged(other: Collection, first: Collection) -> Collection:
    """Return the rows of another collection in the order of the first; DataError unless both have the same images."""
    keys = [list(zip(one.splits, one.paths, one.index.tolist(), strict=True)) for one in (other, first)]
    place = {key: i for i, key in enumerate(keys[0])}
    missing = sum(key not in place for key in keys[1])
    if missing or len(other) != len(first):
        raise DataError(
            f"{other.name} has {many(len(other), 'image')} and {first.name} {len(first):,}, of which {missing:,} are "
            "not in the other: two maps need features of the same images; pass DATA"
        )
    table = take(other, [place[key] for key in keys[1]])
    return Collection(
        **vars(table), name=other.name, sources=other.sources, origin=other.origin, unreadable=other.unreadable,
        notes=other.notes, encoder=other.encoder,
    )  # fmt: skip


def _facts(collection: Collection, name: str, how: tuple[str, int], seconds: dict[str, float]) -> Facts:
    (index, seed), began = how, time.perf_counter()
    places = project(collection.vectors, name, seed)
    drawn = time.perf_counter()
    k, clusters = min(NEIGHBOURS, len(collection) - 1), min(CLUSTERS, len(collection))
    facts = gather_facts(collection, places, k=k, clusters=clusters, index=index, seed=seed)
    seconds["projection"] = seconds.get("projection", 0.0) + drawn - began
    seconds["neighbours_and_clusters"] = seconds.get("neighbours_and_clusters", 0.0) + time.perf_counter() - drawn
    return facts


def _sprite(first: Collection, pictures: Pictures, quiet: bool, seconds: dict[str, float]) -> Sprite | None:
    began = time.perf_counter()
    side = pictures.side
    if side is None:
        side = next(size for most, size in _TILES if len(first) <= most)
    sprite = draw_sprite(first, side, quiet) if first.has_images and side else None
    seconds["thumbnails"] = time.perf_counter() - began
    return sprite


def _groups(sprite: Sprite, facts: list[Facts], seconds: dict[str, float]) -> Tensor:
    began = time.perf_counter()
    groups = near_duplicates(sprite, [one.neighbours for one in facts])
    seconds["near_duplicates"] = time.perf_counter() - began
    return groups


def _names(places: list[str]) -> list[str]:
    """Return a short name for each run: the last part of its path, or the whole path if the last parts are equal."""
    short = [Path(place).resolve().name or place for place in places]
    return short if len(set(short)) == len(short) else places


def _write(
    out: Path, first: Collection, data: dict[str, Any], sprite: Sprite | None, pictures: Pictures
) -> Path | None:
    """Write the page and, if they are too large for it, its thumbnails; return their folder."""
    folder, addresses = None, None
    if sprite is not None and sprite.size > pictures.inside * 1e6:
        folder = out.with_name(f"{out.stem}_files")
        _check_place(folder, first)
        for number, sheet in enumerate(sprite.sheets):
            with replacing(folder / f"sheet-{number}.webp") as file:
                file.write(sheet)
        address = quote(os.fsencode(folder.name))
        addresses = [f"{address}/sheet-{number}.webp" for number in range(len(sprite.sheets))]
    data["sprite"] = None if sprite is None else sprite_json(sprite, addresses)
    count, title = many(len(first), "image"), " and ".join(one_line(entry["name"]) for entry in data["maps"])
    page = render_page(f"{title}: {count}", f"Map of {count}.", data)
    with replacing(out) as file:
        file.write(page.encode(errors="backslashreplace"))
    return folder


def _check_place(folder: Path, first: Collection) -> None:
    """Raise ConfigError if the thumbnails would become images of the data."""
    check_place(folder / "sheet-0.webp", first.origin.get("data"))


def _described(
    out: Path, collections: list[Collection], facts: list[Facts], sprite: Sprite | None, groups: Tensor | None,
    folder: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the description of the page for JSON."""
    first = collections[0]
    described: dict[str, Any] = {
        "out": str(out),
        "bytes": out.stat().st_size,
        "images": len(first),
        "classes": len(first.classes),
        "neighbours": facts[0].neighbours.shape[1],
        "clusters": len(facts[0].cluster_names),
        "near_duplicates": None if groups is None else {
            "images": int((groups > 0).sum()), "groups": int(groups.max()),
        },
        "thumbnails": sprite and {
            "side": sprite.tile, "sheets": len(sprite.sheets), "bytes": sprite.size, "unreadable": sprite.missing,
            "folder": folder and str(folder),
        },
        "features": [dict(collection.origin) for collection in collections],
        "unreadable": list(first.unreadable),
    }  # fmt: skip
    if len(facts) == 2:
        common = common_neighbours(facts[0].neighbours, facts[1].neighbours)
        described["common_neighbours"] = float(common.float().mean()) / max(1, facts[0].neighbours.shape[1])
    return described
