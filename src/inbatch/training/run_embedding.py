"""Embed images with the encoder of a run, by one or several ranks."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inbatch.data import Source, find_split, open_data, splits
from inbatch.data.sources.split_names import distinct
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, Tokens, embed_stream
from inbatch.evaluation.embedding_parts import BATCH, EmbeddingParts, digest
from inbatch.models import Classifier, Encoder
from inbatch.models.feature_maps import TokenEncoder
from inbatch.runtime import distributed
from inbatch.runtime.device import device_for
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import check_not_read
from inbatch.runtime.paths import path_of
from inbatch.runtime.process_group import assert_equal_across_ranks, process_group
from inbatch.runtime.terminal import counted, progress
from inbatch.training.holdout import columns_of_other
from inbatch.training.own_requests import with_own_encoder
from inbatch.training.run import for_encoder, recipe_of
from inbatch.training.run_encoder import load_run_encoder


@isolated
@with_own_encoder
def embed_run(
    path: str | Path, data: Any, out: str | Path, *, split: str | None = None, device: str = "auto", quiet: bool = True,
    missing: dict[int, str] | None = None, stage: dict[str, Any] | None = None, plain: bool = False,
    image_column: str | None = None, label_column: str | None = None, tokens: bool = False, float16: bool = False,
    dist_timeout: float = 1800.0,
) -> int:  # fmt: skip
    """Write path, index, label, features and split of every image to a .parquet or .npz file; return their number.

    A label is the integer that the data have; labelled images also get the name of their class. Several ranks share the
    images, and the file has the same bytes. Finished parts in OUT.parts are not embedded again after an interruption.

    Args:
        path: A run, finished or stopped, or an encoder's folder.
        data: Images to embed.
        out: File to write.
        split: The only split to embed; None for every image. Splits that unite others, such as torchvision's
            `trainval`, are then left out.
        device: Name of the device, or "auto".
        quiet: Print no progress to stderr.
        missing: Receives the unreadable images (number over all splits: reason), which are omitted. If None, they raise
            DataError.
        stage: Receives the "step" of the encoder, the number of "steps", a "note" if the run has not finished, and the
            number of embedded images of each of the "splits". If None, the note is a warning.
        plain: Write features before whitening (`encoder.whiten`), for clustering; no effect without whitening.
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.
        tokens: Write patch tokens, or the last feature map, instead of one vector per image (`write_embeddings`).
        float16: Write tokens in half precision.
        dist_timeout: Seconds without progress after which a dead or hanging rank ends the others.

    Raises:
        ConfigError: If float16 is requested without tokens, or if the encoder has no feature map.
    """
    if float16 and not tokens:
        raise ConfigError("--float16 halves the files of --tokens: add it; vectors are written in float32")
    place = device_for(device)
    check_not_read(path_of(out, "out"), data)
    with (
        process_group(None, place.type, dist_timeout, "with the same command"),
        progress(quiet) as (say, _),
    ):
        loaded = load_run_encoder(path)
        if stage is not None:
            stage |= loaded.stage()
        elif loaded.note:
            warnings.warn(loaded.note, stacklevel=3)
        encoder = loaded.encoder.to(place)
        sources = images_for(path, encoder, data, split, image_column, label_column)
        if stage is not None:
            stage["splits"] = {name: len(source) for name, source in sources.items()}
        dense = TokenEncoder(encoder) if tokens else None
        layout = None if dense is None else Tokens(dense.grid, dense.width, float16)
        facts = _facts(encoder, sources, f"{layout}, plain {plain}")
        assert_equal_across_ranks(facts)
        facts["images"] += "".join(str(source.fingerprint()) for source in sources.values())
        with encoder.plain() if plain else nullcontext():
            parts = EmbeddingParts(dense or encoder, sources, path_of(out, "out"), layout, facts)
            shown = partial(counted, what="embedded", quiet=quiet or distributed.rank() > 0)
            count = parts.write(missing, say, shown)
        if stage is not None and missing:
            stage["splits"] = _readable(stage["splits"], missing)
        return count


def _readable(sizes: Mapping[str, int], missing: Iterable[int]) -> dict[str, int]:
    """Return the sizes of splits without the missing images, which are numbered over all splits."""
    counts, first = dict[str, int](), 0
    for name, size in sizes.items():
        counts[name] = size - sum(first <= i < first + size for i in missing)
        first += size
    return counts


def _facts(encoder: Encoder, sources: dict[str, Source], settings: str) -> dict[str, str]:
    """Return what decides the features of images: values that are equal on all ranks."""
    preparation = (encoder.name, encoder.size, encoder.channels, encoder.levels, encoder.mean, encoder.std)
    images = ((name, len(source), source.signature()) for name, source in sources.items())
    return {
        "encoder": digest(encoder.state_dict(), *preparation),
        "images": digest({}, *images),
        "settings": settings,
        "device": encoder.device.type,
        "version": f"{version('inbatch')}, torch {version('torch')}",
    }


def images_for(
    path: str | Path | None, encoder: Encoder, data: Any, split: str | None = None, image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Source]:  # fmt: skip
    """Return the images of data by split, as the encoder of a run or of an encoder's folder reads them.

    Args:
        path: A run, or an encoder's folder; None for neither.
        encoder: Its encoder.
        data: The images.
        split: The only split; None for every image, without splits that unite others.
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.
    """
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    path = None if path is None else path_of(path)
    if path is not None and (path / "recipe.json").is_file():  # an encoder's folder has none
        own = columns_of_other(recipe_of(path), data)
        columns = {key: own[key] if column is None else column for key, column in columns.items()}
    reading: dict[str, Any] = {"channels": encoder.channels, "levels": encoder.levels} | columns
    every = splits(data, **columns)
    names = distinct(every) if split is None else [find_split(split, every) or split]
    return {name: _in_channels(encoder, data, name, reading) for name in names}


def _in_channels(encoder: Encoder, data: Any, split: str, reading: dict[str, Any]) -> Source:
    """Return the images of a split; grey arrays are read in three channels if the encoder takes three."""
    for channels in (3, 1) if encoder.channels == 3 else (encoder.channels,):
        with suppress(DataError):
            return for_encoder(encoder, open_data(data, split, **reading | {"channels": channels}))
    return open_data(data, split, **reading)  # raises the error of the encoder's own number of channels


def embed_splits(
    encoder: Encoder | TokenEncoder | Classifier, sources: dict[str, Source], missing: dict[int, str] | None
) -> Iterator[Embeddings]:
    """Yield the embeddings of all splits in chunks; unreadable images are numbered over all splits."""
    before = 0
    for name, source in sources.items():
        bad: dict[int, str] | None = None if missing is None else {}
        for chunk in embed_stream(encoder, source, batch=BATCH, missing=bad):
            yield replace(chunk, split=name)
        if missing is not None and bad is not None:
            missing |= {before + i: why for i, why in bad.items()}
        before += len(source)
