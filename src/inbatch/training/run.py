"""Operations on a run directory: load its encoder, evaluate and replay."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from inbatch.data import SKIPPED, GreyAsRGB, Source, open_data, splits
from inbatch.errors import ConfigError, DataError, not_a_run
from inbatch.evaluation.embedding_parts import digest
from inbatch.models import Encoder
from inbatch.models.shipped_weights import is_shipped, with_shipped
from inbatch.runtime import distributed, own_parts, shared_work, tuning
from inbatch.runtime.device import device_for
from inbatch.runtime.files import read_json
from inbatch.runtime.isolation import briefly_isolated, isolated
from inbatch.runtime.own_parts import OwnPart
from inbatch.runtime.paths import path_of
from inbatch.runtime.process_group import assert_equal_across_ranks, process_group
from inbatch.training.data_places import located, opening
from inbatch.training.head_evaluation import evaluate_head
from inbatch.training.holdout import Images, columns_of_other, evaluation_split, lack_of_classes
from inbatch.training.machine import machine
from inbatch.training.own_requests import with_own_encoder
from inbatch.training.recipe import Recipe, make
from inbatch.training.registry import without_addresses
from inbatch.training.replay import replay
from inbatch.training.run_encoder import initial_name, load_run_encoder
from inbatch.training.run_evaluation import PROTOCOLS, before_training, evaluate_labelled, evaluate_unlabelled
from inbatch.training.settings_file import read_file

AnyImages = TypeVar("AnyImages", bound=Images)


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, recipe and result, and the parts that are code of the user."""

    directory: Path
    recipe: Recipe
    result: dict[str, Any]
    own: Mapping[str, OwnPart] = field(default_factory=dict, repr=False, compare=False)

    @property
    @briefly_isolated
    def encoder(self) -> Encoder:
        """The trained encoder, in evaluation mode."""
        with own_parts.using(self.own):
            return load_run_encoder(self.directory).encoder


@briefly_isolated
@with_own_encoder
def load(path: str | Path) -> Encoder:
    """Return the encoder of a run, of a folder that `save_encoder` or `export_run` wrote, or of the package.

    Warns, with the step of the encoder, if the run has not finished.

    Args:
        path: Run directory, finished or stopped; the folder; or the name of weights of the package
            ("inbatch/cifar10-fast").
        encoder: Your own module, or a class or function that makes it, if the run learned with one (docs/own-parts.md);
            its weights are replaced.
    """
    loaded = load_run_encoder(path)
    if loaded.note:
        warnings.warn(loaded.note, stacklevel=3)
    return loaded.encoder


@briefly_isolated
def load_run(path: str | Path) -> Run:
    """Return the finished run in a directory; raise ConfigError if there is none."""
    recipe, path = recipe_of(path), path_of(path)
    if not (path / "result.json").is_file():
        where = shlex.quote(str(path))
        raise ConfigError(
            f"the run in {path} has not finished: continue it with inbatch pretrain --resume {where}, or use its "
            f"current encoder (inbatch.load, inbatch evaluate {where}, inbatch export {where} -o FOLDER)"
        )
    return Run(path, recipe, read_json(path / "result.json"))


def recipe_of(path: str | Path) -> Recipe:
    """Return the recipe of a run, finished or not; raise ConfigError if there is no run."""
    path = path_of(path)
    if is_shipped(path) and with_shipped(path).is_dir():
        raise ConfigError(
            f"{path} are weights of the package, not a run: inbatch train-classifier and inbatch embed take them, and "
            "inbatch pretrain --init continues from them"
        )
    if not (path / "recipe.json").is_file():
        raise not_a_run(path)
    return make(read_file(path / "recipe.json"))


@isolated
@with_own_encoder
def evaluate_run(
    path: str | Path, data: Any = None, test: Any = None, *, protocols: Sequence[str] | None = None,
    from_: str = "features", device: str = "auto", image_column: str | None = None, label_column: str | None = None,
    dist_timeout: float = 1800.0, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the encoder of a run, finished or stopped, on its own or other data; writes nothing.

    Several ranks share the work, and all return the figures of rank 0.

    The encoder before training is also evaluated ("untrained"); "step", "steps" and "note" state the step of the
    encoder. Without labels the result contains only the measures of `monitors.label_free` ("unlabelled").

    Args:
        path: Run directory.
        data: Images of any classes and sizes; greyscale ones are read in three channels if the encoder takes three.
            None for the data of the run.
        test: Test data, as for `evaluation_split`.
        protocols: k-NN, linear probe and clustering if None.
        from_: "head" also evaluates the clusters that the method's head assigns, in addition to k-means on the
            features.
        device: Name of the device, or "auto".
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.
        dist_timeout: Seconds after which a dead or hanging rank ends the others.
        **options: Options of `evaluate`.

    Raises:
        ConfigError: If protocols are requested but no image is labelled.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    with process_group(None, device_for(device).type, dist_timeout, "with the same command"):
        with shared_work.sharing():
            result = _evaluated(path, data, test, protocols, from_, device, columns, options)
        return distributed.broadcast_object(result)


def _evaluated(
    path: str | Path, data: Any, test: Any, protocols: Sequence[str] | None, from_: str, device: str,
    columns: Mapping[str, str | None], options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    if from_ not in ("features", "head"):
        raise ConfigError(f"unknown source of clusters {from_!r}: choose features or head")
    if from_ == "head" and "clustering" not in (protocols or PROTOCOLS):
        raise ConfigError("clusters of the head need the protocol clustering: add it to --protocol")
    path = path_of(path)
    own = located(path, recipe_of(path))
    loaded = load_run_encoder(path)
    named: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
    here = replace(own, **named)
    with opening(path, own) if data is None else nullcontext():
        recipe, source = (here, source_of(here, None)) if data is None else elsewhere(own, data, named)
    split = evaluation_split(recipe, source, recipe.data if data is None else data, test)
    encoder, stopped = loaded.encoder.to(device_for(device)), loaded.note is not None
    options = {"k": recipe.knn_k, "seed": recipe.seed} | options
    before, why = before_training(own, path, encoder.device)
    origin = {"run": str(path), "held_out": split and split.description, "initial": initial_name(own)} | loaded.stage()
    origin["environment"] = machine(encoder.device, torch.float32)
    origin["note"] = ". ".join(filter(None, (loaded.note, why))) or None
    if distributed.world() > 1:
        parts = [source] if split is None else [split.bank, split.queries]
        assert_equal_across_ranks(_facts(encoder, before, parts, without_addresses([protocols, from_, options])))
    if split is None:
        if protocols is not None or from_ == "head":
            raise ConfigError(
                f"{source.name} {lack_of_classes(source)}: pass --data with two or more class sub-folders"
            )
        why = source.label_note or ("all images are of one class" if source.classes else "")
        left_out = f"{why}: {SKIPPED}" if why else None
        origin["note"] = ". ".join(filter(None, (origin["note"], left_out))) or None
        images = for_encoder(encoder, source)
        return evaluate_unlabelled(own, before, encoder, images, options["seed"], stopped) | origin
    bank, queries = (for_encoder(encoder, part) for part in (split.bank, split.queries))
    head = {"head": evaluate_head(path, encoder, queries)} if from_ == "head" else {}
    return evaluate_labelled(before, encoder, bank, queries, protocols or PROTOCOLS, options, stopped) | head | origin


def _facts(encoder: Encoder, before: Encoder | None, parts: Sequence[Images], settings: str) -> dict[str, str]:
    """Return what decides the figures of an encoder: values that are equal on all ranks."""
    return {
        "encoder": digest(encoder.state_dict()),
        "encoder before training": "none" if before is None else digest(before.state_dict()),
        "numbers of images": ", ".join(f"{len(part):,}" for part in parts),
        "images": digest({}, *(part.signature() for part in parts if isinstance(part, Source))),
        "settings": settings,
        "version": f"{version('inbatch')}, torch {version('torch')}",
    }


def for_encoder(encoder: Encoder, source: AnyImages) -> AnyImages | GreyAsRGB:
    """Return the source with as many channels as the encoder takes."""
    if isinstance(source, Source) and (source.channels, encoder.channels) == (1, 3):
        return GreyAsRGB(source)
    return source


@isolated
@with_own_encoder
def replay_run(path: str | Path, *, device: str = "auto") -> dict[str, Any]:
    """Repeat a run's captured step, and find where its numbers stop being finite (`replay.replay`)."""
    tuning.ready()
    return replay(path_of(path), device_for(device))


def source_of(recipe: Recipe, data: Any) -> Source:
    """Return the images of a recipe, or those at their current location `data`."""
    if data is not None:
        return open_data(data, splits(data, **recipe.columns)[0], **recipe.reading)
    return open_data(recipe.data, recipe.split, subset=recipe.subset, **recipe.reading)


def elsewhere(recipe: Recipe, data: Any, columns: dict[str, Any]) -> tuple[Recipe, Source]:
    """Return a run's recipe as far as it applies to the images of another data set, and these images."""
    recipe = replace(recipe, test=None, **(columns_of_other(recipe, data) | columns))
    recipe = replace(recipe, split=splits(data, **recipe.columns)[0])
    first = None
    for classes in dict.fromkeys((recipe.classes, None)):  # the run's list of classes, if these images have them
        for channels in (3, 1) if recipe.channels == 3 else (recipe.channels,):  # 1: no colour
            tried = replace(recipe, classes=classes, channels=channels)
            try:
                return tried, source_of(tried, data)
            except DataError as error:
                first = first or error
    raise first or DataError(f"{data} cannot be read")
