"""Open the features of a collection of images, and its images, from a run or a file of `inbatch embed`.

Features of a run are computed once and kept in its folder `features`, under a name that depends on the weights of the
encoder and on the images, so that changed images or another encoder are never mixed up.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from inbatch.data import Source, find_split, open_data, splits
from inbatch.data.decoding.image_file import decoders
from inbatch.data.source import LazyImage
from inbatch.data.sources.split_names import distinct
from inbatch.errors import ConfigError, DataError, InbatchError, many
from inbatch.evaluation import write_embeddings
from inbatch.evaluation.embed import readable
from inbatch.evaluation.feature_table import FeatureTable, read_features
from inbatch.models import Encoder
from inbatch.models.shipped_weights import is_shipped
from inbatch.runtime.device import device_for
from inbatch.runtime.files import check_writable, read_json, write_json
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.remote import public
from inbatch.runtime.terminal import counted
from inbatch.training.data_places import located, opening
from inbatch.training.run import recipe_of
from inbatch.training.run_embedding import embed_splits, images_for
from inbatch.training.run_encoder import load_run_encoder

ENDINGS = (".npz", ".parquet")
"""File extensions of features."""


@dataclass(frozen=True)
class Collection(FeatureTable):
    """Features of images, and the images if they are known.

    Attributes:
        name: The run, the data if they are not those of the run, or the file of features, for messages.
        sources: Images of each split; empty if they are unknown.
        origin: Where the features come from, for JSON.
        unreadable: A message for each image that could not be read and is left out.
        notes: Sentences about the features, for the user.
        encoder: The encoder of a run or folder; None for a file of features.
    """

    name: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    encoder: Encoder | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes, and a sentence on unreadable images if there are any."""
        if not self.unreadable:
            return self.notes
        few = "; ".join(self.unreadable[:3])
        return *self.notes, f"{many(len(self.unreadable), 'unreadable image')} left out: {few}"

    @property
    def has_images(self) -> bool:
        """Whether the pixels of the images are available."""
        return bool(self.sources)

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """Return the pixels of image i, in the channels that the encoder reads; DataError if they are unavailable."""
        return self._source(i).image(int(self.index[i]))

    def open(self, i: int) -> LazyImage:
        """Open image i without decoding it; DataError if it is unavailable."""
        return self._source(i).open(int(self.index[i]))

    def file_of(self, i: int) -> str | None:
        """Return the absolute path of image i; None if it has no file of its own."""
        return self._source(i).file_of(int(self.index[i]))

    def class_of(self, i: int) -> str | None:
        """Return the name of the class of image i; None if it is unknown."""
        label = int(self.labels[i])
        return self.classes[label] if label >= 0 else None

    def row(self, i: int) -> dict[str, Any]:
        """Return the names of image i, for JSON."""
        return {"path": self.paths[i], "split": self.splits[i], "index": int(self.index[i]), "class": self.class_of(i)}

    def _source(self, i: int) -> Source:
        if not self.has_images:
            raise DataError(f"{self.name} holds features without their images: pass the images, too (DATA)")
        return self.sources[self.splits[i]]


def open_collection(
    features: str | Path, data: Any = None, *, split: str | None = None, device: str = "auto", quiet: bool = True,
    image_column: str | None = None, label_column: str | None = None, reading: Mapping[str, Any] | None = None,
) -> Collection:  # fmt: skip
    """Return the features of images, computed or read, and the images.

    Args:
        features: A run, finished or stopped; the folder of an encoder; the name of weights of the package; or a .npz
            or .parquet file of `inbatch embed`.
        data: The images. By default those of the run; with a file of features, none.
        split: The only split to use; None for every image.
        device: Device on which features are computed, or "auto".
        quiet: Print no progress to stderr.
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.
        reading: Further reading options of the images, with a file of features, which does not state them.

    Raises:
        ConfigError: If there are neither a run, an encoder nor features, or if an encoder's folder is given without
            images.
        DataError: If features or images cannot be read, or do not belong together.
    """
    path, data = path_of(features, "features"), joined_paths(data)
    if holds_features(path):
        columns = {"image_column": image_column, "label_column": label_column}
        return _from_file(path, data, split, columns | dict(reading or {}))
    name = str(path if data is None else data)
    loaded = load_run_encoder(path)
    encoder = loaded.encoder.to(device_for(device))
    if data is None:
        if not (path / "recipe.json").is_file():
            raise ConfigError(f"{path} is the folder of an encoder, which has no images of its own: pass DATA")
        own = located(path, recipe_of(path))
        with opening(path, own):
            sources = images_for(path, encoder, own.data, split, image_column, label_column)
        data = own.data
    else:
        sources = images_for(path, encoder, data, split, image_column, label_column)
    table, unreadable, kept, reused = _load_or_embed(path, encoder, sources, quiet)
    origin = {
        "features": str(path),
        "data": public(str(data)),
        **loaded.stage(),
        "file": kept and str(kept),
        "reused": reused,
    }
    notes = [loaded.note] if loaded.note else []
    if kept is None:
        where = "the package" if is_shipped(path) else path / "features"
        notes.append(f"the features are computed again by every command: they cannot be kept in {where}")
    return Collection(
        **vars(table), name=name, sources=sources, origin=origin, unreadable=unreadable, notes=tuple(notes),
        encoder=encoder,
    )  # fmt: skip


def holds_features(path: str | Path) -> bool:
    """Return whether a path is that of a file of features, and not of a run or an encoder."""
    path = path_of(path, "features")
    return path.suffix in ENDINGS and not path.is_dir()


def _load_or_embed(
    path: Path, encoder: Encoder, sources: Mapping[str, Source], quiet: bool
) -> tuple[FeatureTable, tuple[str, ...], Path | None, bool]:
    """Return the features, unreadable images, the file in which the features are kept, and whether it was there."""
    key = _key(encoder, sources)
    file = None if key is None or is_shipped(path) else path / "features" / f"{key}.npz"
    if file is not None and file.is_file() and (known := _load_kept(file, sources)) is not None:
        return *known, file, True
    if file is not None:
        try:
            check_writable(file)
        except InbatchError:  # a run that may only be read
            file = None
    bad: dict[int, str] = {}
    chunks = embed_splits(encoder, dict(sources), bad)
    count = sum(map(len, sources.values()))
    with TemporaryDirectory() as folder:
        place = file or Path(folder) / "features.npz"
        try:
            write_embeddings(place, chunks if quiet else counted(chunks, count, "embedded"))
        except DataError as error:
            if len(bad) < count:
                raise
            reasons = "; ".join(list(bad.values())[:3])
            raise DataError(f"none of {many(count, 'image')} can be read: {reasons}") from error
        if file is not None:
            write_json(file.with_suffix(".json"), {"unreadable": list(bad.values())})
        return read_features(place), tuple(bad.values()), file, False


def _load_kept(file: Path, sources: Mapping[str, Source]) -> tuple[FeatureTable, tuple[str, ...]] | None:
    """Return features that were kept, and messages on unreadable images; None to embed again.

    This is the case if a file is damaged or missing, or if an image can be read now, as with a decoder installed since.
    """
    try:
        unreadable = read_json(file.with_suffix(".json")).get("unreadable")
        table, messages = read_features(file), tuple(map(str, unreadable if isinstance(unreadable, list) else ()))
    except DataError:
        return None
    lacking = len(table.paths) < sum(map(len, sources.values()))
    return None if lacking and _readable_now(table, sources) else (table, messages)


def _readable_now(table: FeatureTable, sources: Mapping[str, Source]) -> bool:
    """Return whether any image without features can be read."""
    kept = {*zip(table.splits, table.index.tolist(), strict=True)}
    return any(
        next(readable(source, [i for i in range(len(source)) if (split, i) not in kept]), None) is not None
        for split, source in sources.items()
    )


def _key(encoder: Encoder, sources: Mapping[str, Source]) -> str | None:
    """Return a name that depends on the encoder and the pixels and labels of the images; None if these are unknown."""
    preparation = encoder.name, encoder.size, encoder.mean, encoder.std, encoder.levels, decoders()
    digest = hashlib.sha256(repr(preparation).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for split, source in sources.items():
        if (pixels := source.fingerprint()) is None:
            return None
        digest.update(f"{split}\0{source.channels}\0{pixels}\0{source.signature()}\0".encode())
    return digest.hexdigest()[:24]


def _from_file(path: Path, data: Any, split: str | None, reading: dict[str, Any]) -> Collection:
    table = read_features(path)
    if split is not None:
        table = _select_split(table, split, path)
    sources = {} if data is None else _images_of(table, data, path, reading)
    origin = {"features": str(path), "data": None if data is None else public(str(data)), "file": str(path)}
    lacking = sum(map(len, sources.values())) - len(table.paths)
    note = f"{path} lacks {many(lacking, 'image')} of the data: unreadable when it was written, or added later"
    notes = (note,) if lacking > 0 else ()
    return Collection(**vars(table), name=str(path), sources=sources, origin=origin, notes=notes)


def _select_split(table: FeatureTable, split: str, path: Path) -> FeatureTable:
    every = dict.fromkeys(table.splits)
    name = find_split(split, every)
    if name is None:
        raise DataError(f"{path} has no split {split!r}, only {', '.join(every)}")
    chosen = [i for i, one in enumerate(table.splits) if one == name]
    return take(table, chosen)


def take(table: FeatureTable, rows: Sequence[int]) -> FeatureTable:
    """Return some images of a table, in this order."""
    at = torch.tensor(rows, dtype=torch.long)
    paths, names = (tuple(column[i] for i in rows) for column in (table.paths, table.splits))
    return FeatureTable(table.vectors[at], table.labels[at], table.classes, paths, names, table.index[at])


def _images_of(table: FeatureTable, data: Any, path: Path, reading: dict[str, Any]) -> dict[str, Source]:
    """Return the images of features; DataError unless every image has the name that is stored with its features."""
    every = splits(data, image_column=reading["image_column"], label_column=reading["label_column"])
    sources: dict[str, Source] = {}
    for name in dict.fromkeys(table.splits):
        known = (distinct(every)[0] if name == "" else find_split(name, every)) or name
        sources[name] = open_data(data, known, **reading)
    for name, split, i in zip(table.paths, table.splits, table.index.tolist(), strict=True):
        source = sources[split]
        if i >= len(source) or _stored_name(source.identity(i)) != name:
            raise DataError(
                f"{path} holds features of other images than {public(str(data))}: image {i:,} is not {name!r} "
                "there; pass the images of the features, or embed these (inbatch embed)"
            )
    return sources


def _stored_name(identity: str) -> str:
    """Return a name as `write_embeddings` stores it."""
    return identity.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
