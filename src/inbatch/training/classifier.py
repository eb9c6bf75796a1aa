"""Train a classifier on labelled images: a linear layer on the features of a run, or a fine-tuned encoder."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inbatch.data import Source
from inbatch.errors import ConfigError, DataError, listed
from inbatch.evaluation import Embeddings, Finetune, Lbfgs, Sgd, embed, few_labels, tune
from inbatch.evaluation.class_figures import ClassFigures
from inbatch.evaluation.confidence import calibrate, fit_temperature
from inbatch.evaluation.embeddings import check_one_label, matched_labels
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.probe_presets import PROBES
from inbatch.models import Classifier, Encoder, save_classifier
from inbatch.models.classifier import holds_classifier, linear_layer
from inbatch.models.export import own_files
from inbatch.runtime.device import device_for
from inbatch.runtime.files import check_writable
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.training.data_places import located, opening
from inbatch.training.holdout import EvaluationSplit, Images, evaluation_split, lack_of_classes
from inbatch.training.monitors.online_evaluation import fit_readout
from inbatch.training.recipe import Recipe, make
from inbatch.training.run import elsewhere, for_encoder, recipe_of, source_of
from inbatch.training.run_encoder import load_run_encoder

MODES = ("probe", "finetune")
STRENGTHS = (1.0, 0.1, 0.01, 0.001)
"""Values of C, from weak to strong regularisation, of which "auto" chooses."""


@isolated
def train_classifier(
    run: str | Path,
    data: Any = None,
    *,
    out: str | Path,
    test: Any = None,
    mode: str = "probe",
    label_fraction: float = 1.0,
    probe: str | Lbfgs | Sgd | None = None,
    tuning: str | Finetune | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Train a classifier on the encoder of a run and labelled images, write it to a folder, and return its figures.

    The figures, and the temperature that calibrates the probabilities, are of labelled images that the classifier was
    not trained on: `test`, else the test split of the data (without one, the validation split), else a tenth of the
    images. `load_classifier(out)` reads the folder, `predict` applies it to images.

    Args:
        run: A run, finished or stopped, or an encoder's folder.
        data: Labelled images; None for those of the run.
        out: Folder to write; an existing one is replaced only if it is empty or holds a classifier.
        test: Labelled images for the figures.
        mode: "probe": a linear layer on the features. "finetune": all weights are trained, too.
        label_fraction: Share of the labels of every class to train on, at least one image of each.
        probe: Of the mode "probe", see `evaluation.linear_probe`. None or "auto": logistic regression with the C of
            `STRENGTHS` that fits a fifth of the training images best if it is trained on the others.
        tuning: Of the mode "finetune", see `evaluation.finetune`; None for "small".
        seed: Seed of the choice of the labels, and of the training.
        device: Name of the device, or "auto".
        workers: Processes that decode images.
        image_column: Column of the images; by default that of the run, if the data have it.
        label_column: Column of the labels, likewise.

    Returns:
        "classifier" (the folder), "mode", "classes", "train" (number of images, unreadable ones, and the protocol),
        "test" (see `ClassFigures`, with "held_out", the origin of the images), and "calibration" (see `calibrate`).

    Raises:
        ConfigError: For unknown settings, or a folder that holds something else.
        DataError: If the images have no labels, several labels each, or fewer than two classes.
        TrainingError: If fine-tuning diverges.
    """
    if isinstance(probe, str) and probe not in ("auto", *PROBES):
        raise ConfigError(f"there is no probe called {probe!r}: choose one of {', '.join(('auto', *PROBES))}")
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}: choose {' or '.join(MODES)}")
    if mode == "probe" and tuning is not None:
        raise ConfigError("a tuning recipe is for the mode finetune (--mode finetune): the mode is probe")
    if mode == "finetune" and probe is not None:
        raise ConfigError("a probe is for the mode probe (--mode probe): the mode is finetune")
    out, run, began = path_of(out, "out"), path_of(run, "run"), time.perf_counter()
    check_replaceable(out)
    loaded = load_run_encoder(run)
    encoder = loaded.encoder.to(device_for(device))
    split = _labelled_images(run, encoder, data, test, image_column, label_column)
    train, queries = (for_encoder(encoder, part) for part in (split.bank, split.queries))
    for part in (train, queries):
        check_one_label(part.labels, part.name)
    classes = _class_names(train)
    work = _Work(encoder, train, len(classes), label_fraction, seed, workers)
    if mode == "probe":
        fit_readout(encoder, train, again=loaded.note is not None)
        trained = _probe(work, "auto" if probe is None else probe)
    else:
        trained = _finetuned(work, "small" if tuning is None else tuning)
    held_out = embed(trained.encoder, queries, workers=workers).labelled()
    labels = matched_labels(train, replace(held_out, name=queries.name))
    calibration = calibrate(trained.logits(held_out.vectors), labels)
    head = trained.layer(calibration["temperature"])
    figures = ClassFigures(classes)
    figures.add(head(held_out.vectors.to(encoder.device)).cpu(), labels)
    test_figures = {"name": queries.name, "held_out": split.description, "unreadable": list(held_out.missing)}
    result = {
        "mode": mode,
        "run": str(run),
        "classes": list(classes),
        "train": {"name": train.name, "signatures": _signatures(train), **trained.protocol},
        "test": test_figures | figures.figures(),
        "calibration": calibration | {"on": f"{len(labels):,} held-out images; after: cross-fitted over two halves"},
        **loaded.stage(),
    }
    temperature = calibration["temperature"]
    save_classifier(Classifier(trained.encoder, head, classes, temperature=temperature, figures=result), out)
    return {"classifier": str(out)} | result | {"seconds": time.perf_counter() - began}


def _signatures(source: Any) -> list[str]:
    """Return the signatures of the training images and of the data that they are a part of."""
    parts = []
    while source is not None:
        if isinstance(source, Source):
            parts.append(source.signature())
        source = getattr(source, "source", None)
    return list(dict.fromkeys(parts))


@dataclass(frozen=True)
class _Work:
    """What both modes train on."""

    encoder: Encoder
    train: Images | Source
    classes: int
    share: float
    seed: int
    workers: int


@dataclass(frozen=True)
class _Trained:
    """An encoder with a linear layer, before calibration.

    Attributes:
        encoder: The encoder.
        logits: Computes logits from features, on the CPU.
        layer: Returns the linear layer for a temperature.
        protocol: How it was trained, in JSON types.
    """

    encoder: Encoder
    logits: Callable[[Tensor], Tensor]
    layer: Callable[[float], nn.Linear]
    protocol: dict[str, Any]


def _probe(work: _Work, probe: str | Lbfgs | Sgd) -> _Trained:
    features = embed(work.encoder, work.train, workers=work.workers).labelled()
    chosen = features.take(few_labels(features.labels, work.share, work.seed))
    counts = _counts(chosen)
    name = {"probe": "auto"} if probe == "auto" else {}
    if probe == "auto":
        probe = Lbfgs(_strength(chosen, work))
    fitted = fit(chosen, work.classes, probe, seed=work.seed, device=work.encoder.device)

    def layer(temperature: float) -> nn.Linear:
        return linear_layer(fitted.weight, fitted.bias, temperature, fitted.mean, fitted.std)

    used = {"share": work.share, "images": len(chosen), "of_a_class": counts, "unreadable": list(features.missing)}
    return _Trained(work.encoder, lambda rows: fitted.scores(rows).cpu(), layer, fitted.protocol | name | used)


def _strength(chosen: Embeddings, work: _Work) -> float:
    """Return the C with the lowest cross-entropy on held-out training images, after calibration; 1 without any.

    A class with a single image has none to hold out.
    """
    labels = chosen.labels
    several = torch.where(labels.bincount()[labels] > 1, labels, -1)
    if not (several >= 0).any():
        return STRENGTHS[0]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[few_labels(several, 0.2, work.seed)] = True
    train, rest = (chosen.take(part.nonzero()[:, 0]) for part in (~held_out, held_out))

    def loss(c: float) -> float:
        fitted = fit(train, work.classes, Lbfgs(c), seed=work.seed, device=work.encoder.device)
        logits = fitted.scores(rest.vectors).cpu()
        return F.cross_entropy(logits / fit_temperature(logits, rest.labels), rest.labels).item()

    return min(STRENGTHS, key=loss)


def _counts(chosen: Embeddings) -> list[int]:
    """Return the least and the most images of a class; DataError for fewer than two classes."""
    counts = chosen.labels.bincount()
    counts = counts[counts > 0]
    if len(counts) < 2:
        raise DataError(f"{chosen.name} has images of one class only: a classifier needs at least two")
    return [int(counts.min()), int(counts.max())]


def _finetuned(work: _Work, tuning: str | Finetune) -> _Trained:
    tuned = tune(
        work.encoder, work.train, tuning, classes=work.classes, share=work.share, seed=work.seed, workers=work.workers
    )
    weight, bias = tuned.head.weight, tuned.head.bias

    def logits(rows: Tensor) -> Tensor:
        scores: Tensor = tuned.head(rows.to(weight.device))
        return scores.detach().cpu()

    return _Trained(tuned.encoder, logits, lambda temperature: linear_layer(weight, bias, temperature), tuned.protocol)


def _class_names(train: Images | Source) -> tuple[str, ...]:
    """Return the names of the classes of the training images, their numbers if they have none."""
    names = tuple(train.classes)
    return names or tuple(map(str, range(int(train.labels.max()) + 1)))


def _labelled_images(
    run: Path, encoder: Encoder, data: Any, test: Any, image_column: str | None, label_column: str | None
) -> EvaluationSplit:
    """Return the images to train on and those held out; DataError if they have no labels."""
    columns = {"image_column": image_column, "label_column": label_column}
    named: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
    data, test = joined_paths(data), joined_paths(test)
    has_recipe = (run / "recipe.json").is_file()
    if data is None and not has_recipe:
        raise ConfigError(f"{run} is the folder of an encoder, which has no images of its own: pass labelled images")
    own = located(run, recipe_of(run)) if has_recipe else _reading_like(encoder, run)
    here = replace(own, **named)
    with opening(run, own) if data is None else nullcontext():
        recipe, source = (here, source_of(here, None)) if data is None else elsewhere(own, data, named)
    split = evaluation_split(recipe, source, recipe.data if data is None else data, test)
    if split is None:
        raise DataError(
            f"{source.name} {lack_of_classes(source)}, and a classifier needs at least two classes: use class "
            "sub-folders, or a list with a column of labels"
        )
    return split


def _reading_like(encoder: Encoder, folder: Path) -> Recipe:
    """Return a recipe that reads images as an encoder does."""
    return make({"data": str(folder), "channels": encoder.channels, "levels": encoder.levels})


def check_replaceable(out: Path) -> None:
    """Raise an error if a classifier must not or cannot be written to this folder."""
    if out.exists():
        if not out.is_dir():
            raise ConfigError(f"{out} exists and is no folder: choose another place for the classifier")
        inside = own_files(out)
        if inside - {"model.safetensors", "config.json"} or (inside and not holds_classifier(out)):
            there = sorted(entry.name for entry in out.iterdir())
            raise ConfigError(f"{out} exists and holds no classifier ({listed(there)}): choose another folder")
    check_writable(out / "config.json" if out.is_dir() else out)
