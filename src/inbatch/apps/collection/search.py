"""Search a collection for the images that are nearest to given images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.apps.collection.features import ENDINGS, Collection, open_collection
from inbatch.apps.reports.view_grid import check_place
from inbatch.data import Source
from inbatch.data.source import Reading, Subset, unlabelled
from inbatch.data.sources.folder_scan import EXTENSIONS
from inbatch.data.sources.path_source import PathsSource
from inbatch.errors import ConfigError, DataError, InbatchError, check_whole, many, type_name
from inbatch.evaluation import embed, embed_stream
from inbatch.evaluation.neighbour_index import fingerprint
from inbatch.evaluation.neighbours import NeighbourIndex, check_index, nearest
from inbatch.models import Encoder
from inbatch.runtime.device import device_for
from inbatch.runtime.files import check_writable
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of
from inbatch.training.monitors.neighbour_grid import BLACK, RIGHT, UNKNOWN, Cell, draw_grid
from inbatch.training.run_embedding import images_for
from inbatch.training.run_encoder import load_run_encoder

SHOWN, DRAWN = 10, 50
"""Largest number of neighbours of a query, and of queries, in the picture."""
_SAME = 0.99  # least similarity of an image's features to those that are stored for it


@dataclass(frozen=True)
class _Query:
    """An image to search for."""

    source: Source
    number: int
    path: str
    vector: Float[Tensor, "f"]

    def itself(self, collection: Collection, i: int) -> bool:
        """Return whether image i of the collection is the same file."""
        own_file = self.source.file_of(self.number)
        other_file = collection.file_of(i) if collection.has_images and own_file is not None else None
        return other_file is not None and os.path.realpath(own_file or "") == os.path.realpath(other_file)


@isolated
def search_images(
    run: str | Path, images: Any, data: Any = None, *, k: int = 20, features: str | Path | None = None,
    index: str = "exact", exclude_self: bool = False, split: str | None = None, out: str | Path | None = None,
    device: str = "auto", quiet: bool = True, image_column: str | None = None, label_column: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the images of a collection that are nearest to each query image, by cosine similarity.

    Args:
        run: A run, finished or stopped, or the folder of an encoder; it embeds the queries.
        images: Paths of query images, or of folders of them; or one such path.
        data: The collection; by default the images of the run. With `features`, its images, for the picture.
        k: Neighbours of each query; fewer if the collection has fewer images.
        features: Features of the collection, a .npz or .parquet file of `inbatch embed` with the encoder of `run`.
        index: "exact", or "approximate" (extra `index`).
        exclude_self: Leave out the query itself, if it is a file of the collection.
        split: The only split of the collection to search; None for every image.
        out: PNG file for a picture of the first neighbours.
        device: Device on which features are computed, or "auto".
        quiet: Print no progress to stderr.
        image_column: Column of the images of the collection.
        label_column: Column of their labels.

    Returns:
        "queries": for each its "path" and "neighbours" (rank, similarity, path, split, index, class, whether it is the
        query "itself"); "images" of the collection, "k", "index", "origin" of the features, messages on "unreadable"
        images and unreadable "unreadable_queries", "notes", and "out".

    Raises:
        ConfigError: For settings that cannot be used.
        DataError: If images or features cannot be read, or if the features are those of another encoder.
    """
    check_whole("k", k, 1)
    check_index(index)
    picture, paths = None if out is None else _png(out), _paths_of(images)
    if picture is not None:
        for read in (data, *paths):
            check_place(picture, read)
    if path_of(run, "RUN").suffix in ENDINGS:
        raise ConfigError(f"{run} holds features without an encoder for the queries: pass RUN, and --features {run}")
    columns = {"image_column": image_column, "label_column": label_column}
    own = None if features is None else load_run_encoder(run).encoder.to(device_for(device))
    collection = open_collection(
        run if features is None else features, data, split=split, device=device, quiet=quiet, **columns,
        reading=None if own is None else {"levels": own.levels},
    )  # fmt: skip
    if exclude_self and not collection.has_images:
        raise ConfigError("--exclude-self compares files: pass the images of the features, too (--data)")
    encoder = collection.encoder or own
    assert encoder is not None  # a file of features has none, and then the run has been opened
    if features is not None:
        _check_encoder(encoder, collection, run)
    if picture is not None and not collection.has_images:
        raise ConfigError(f"a picture needs the images of {collection.name}: pass them, too (--data)")
    queries, unreadable = _queries(run, encoder, paths)
    rows, wanted = torch.stack([query.vector for query in queries]), min(k + exclude_self, len(collection))
    notes = [*collection.sentences, *_reuse_notes(collection)]
    if index == "exact":
        similarity, place = nearest(rows, collection.vectors, wanted)
    else:
        similarity, place = _index(collection, notes).nearest(rows, wanted)
    listed = [
        _neighbours(query, collection, values, places, k, exclude_self)
        for query, values, places in zip(queries, similarity.tolist(), place.tolist(), strict=True)
    ]
    if picture is not None:
        _draw(picture, queries, collection, listed)
    return {
        "queries": [
            {"path": query.path, "neighbours": [near for _, near in hits]}
            for query, hits in zip(queries, listed, strict=True)
        ],
        "images": len(collection),
        "k": k,
        "index": index,
        "origin": dict(collection.origin),
        "unreadable": list(collection.unreadable),
        "unreadable_queries": unreadable,
        "notes": notes,
        "out": picture and str(picture),
    }


def _reuse_notes(collection: Collection) -> list[str]:
    """Return a sentence on features that were kept by an earlier command."""
    return [f"features read from {collection.origin['file']}"] if collection.origin.get("reused") else []


def _index(collection: Collection, notes: list[str]) -> NeighbourIndex:
    """Return the index next to the features, or build and keep it; `notes` receives what was done."""
    kept = collection.origin.get("file")
    file = None if kept is None else Path(kept).with_suffix(".index.safetensors")
    key = fingerprint(collection.vectors)
    if file is not None and (known := NeighbourIndex.load(file, key, collection.vectors)) is not None:
        notes.append(f"index read from {file}")
        return known
    built = NeighbourIndex.build(collection.vectors)
    if file is not None:
        try:
            built.save(file, key)
            notes.append(f"index written to {file}")
        except InbatchError as error:  # a folder that may only be read
            notes.append(f"the index is not kept: {error}")
    return built


def _png(out: str | Path) -> Path:
    path = path_of(out, "out")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path}: the picture is written to a file that ends in .png")
    check_writable(path)
    return path


def _check_encoder(encoder: Encoder, collection: Collection, run: str | Path) -> None:
    """Raise DataError if the features are those of another encoder, as far as it can be seen."""
    own = encoder.width if encoder.readout is None else encoder.readout.width
    if (width := collection.vectors.shape[1]) != own:
        raise DataError(
            f"{collection.name} holds features of {width} numbers, and the encoder of {run} gives {own}: pass features "
            "of this encoder"
        )
    source = collection.sources.get(collection.splits[0])
    if source is not None and source.channels == encoder.channels:
        one = embed(encoder, Subset(source, collection.index[:1], "its features are compared")).vectors
        if float(nearest(one, collection.vectors[:1], 1)[0]) < _SAME:
            raise DataError(f"{collection.name} holds features of another encoder than that of {run}: pass its own")


def _paths_of(images: Any) -> list[Any]:
    """Return one path or several as a list; ConfigError for an object that is neither."""
    if not isinstance(images, str | os.PathLike | Iterable):
        raise ConfigError(f"images must be paths of query images, not {type_name(images)}")
    return [images] if isinstance(images, str | os.PathLike) else list(images)


def _queries(run: str | Path, encoder: Encoder, paths: Sequence[Any]) -> tuple[list[_Query], list[str]]:
    """Return the readable query images with their features, and messages on the others."""
    if not paths:
        raise ConfigError("there is no query: pass the path of an image, or of a folder of images")
    queries, unreadable = list[_Query](), list[str]()
    for source in _sources(run, encoder, [path_of(path, "IMAGE") for path in paths]):
        bad: dict[int, str] = {}
        for chunk in embed_stream(encoder, source, missing=bad):
            for number, path, vector in zip(chunk.index.tolist(), chunk.identities, chunk.vectors, strict=True):
                queries.append(_Query(source, number, path, vector))
        unreadable += bad.values()
    if not queries:
        raise DataError(f"none of {many(len(unreadable), 'query image')} can be read: {'; '.join(unreadable[:3])}")
    return queries, unreadable


def _sources(run: str | Path, encoder: Encoder, paths: Sequence[Path]) -> Iterator[Source]:
    """Yield the images of the paths in their order: those of adjacent image files together."""
    for single, group in groupby(paths, lambda path: path.suffix.lower().encode() in EXTENSIONS and not path.is_dir()):
        if single:
            files = [str(path) for path in group]
            if missing := [file for file in files if not os.path.exists(file)]:
                raise DataError(f"the query {missing[0]} does not exist: pass the path of an image, or of a folder")
            reading = Reading(encoder.channels, encoder.levels)
            yield PathsSource("the queries", Path.cwd(), files, unlabelled(len(files)), (), reading)
        else:
            for path in group:
                yield from images_for(run, encoder, str(path)).values()


def _neighbours(
    query: _Query, collection: Collection, similarity: Sequence[float], places: Sequence[int], k: int, others: bool
) -> list[tuple[int, dict[str, Any]]]:
    """Return position and description of the k nearest images; without the query itself if `others`."""
    rows = list[tuple[int, dict[str, Any]]]()
    for value, i in zip(similarity, places, strict=True):
        itself = query.itself(collection, i)
        if not (itself and others) and len(rows) < k:
            rows.append((i, {"rank": len(rows) + 1, "similarity": value, **collection.row(i), "itself": itself}))
    return rows


def _draw(
    picture: Path, queries: Sequence[_Query], collection: Collection, listed: Sequence[Sequence[tuple[int, dict]]]
) -> None:
    """Draw the first queries, each with its first neighbours; blue frames mark the query itself."""
    table = []
    for query, rows in zip(queries[:DRAWN], listed, strict=False):
        cells = [
            Cell(collection.image(i), RIGHT if near["itself"] else UNKNOWN,
                 f"{near['similarity']:.2f} {near['class'] or Path(near['path']).name}")
            for i, near in rows[:SHOWN]
        ]  # fmt: skip
        table.append([[Cell(query.source.image(query.number), BLACK, Path(query.path).name)], cells])
    more = f"; first {DRAWN} of {len(queries):,} queries" if len(queries) > DRAWN else ""
    draw_grid(picture, f"Nearest of {many(len(collection), 'image')} by cosine similarity{more}", ["query", ""], table)
