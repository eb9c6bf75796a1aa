"""Compare the trained encoder with the encoder before training, with and without labels."""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inbatch.data import Source
from inbatch.errors import InbatchError
from inbatch.evaluation import evaluate
from inbatch.models import Encoder
from inbatch.runtime import distributed
from inbatch.training.build import RunComponents
from inbatch.training.holdout import EvaluationSplit, Images
from inbatch.training.monitors.label_free import IMAGES, Chosen, compared, embed_all
from inbatch.training.monitors.neighbour_grid import save_neighbour_grid
from inbatch.training.monitors.online_evaluation import fit_readout
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import initial_encoder, initial_name, kept_initial
from inbatch.training.run_views import views_of

PROTOCOLS = ("knn", "linear", "clustering")
COSTLY = ("finetune", "corruptions")
"""Protocols that are not applied to the encoder before training: each takes minutes and is of little use for it."""


def compare_with_initial(
    built: RunComponents, split: EvaluationSplit | None, out: Path, images: int = IMAGES
) -> dict[str, Any]:
    """Compare the encoder of a run with its initial encoder; return entries of result.json.

    Rank 0 draws neighbours.png.

    Args:
        built: The run.
        split: Images of the evaluation; None without labels.
        out: Run directory.
        images: Largest number of images to embed for the picture and for the measures without labels.

    Returns:
        "initial": name of the initial encoder. "untrained": its figures, None without labels. "unlabelled": measures
        that need no labels. "comparison_seconds": duration of the comparison.
    """
    began, recipe = time.perf_counter(), built.recipe
    before = _initial(built, out)
    options: dict[str, Any] = {"k": recipe.knn_k, "seed": recipe.seed, "workers": built.loader.workers}
    fit_readout(before, built.loader.source if split is None else split.bank)
    untrained = None if split is None else evaluate(before, split.bank, split.queries, **options)
    source = Chosen(built.loader.source, built.loader.held, recipe.seed, images)
    embedded = embed_all({"before": before, "after": built.encoder}, built.views, source, recipe.seed)
    if distributed.rank() == 0:
        shown = source.only(embedded["after"].number)
        near = min(5, len(shown) - 1)
        old, new = (embedded[name].neighbour_rows(embedded[name].clean) for name in ("before", "after"))
        save_neighbour_grid(shown, new, out / "neighbours.png", 8, near, before=old)
    return {
        "initial": initial_name(recipe),
        "untrained": untrained,
        "unlabelled": compared(embedded["before"], embedded["after"]),
        "comparison_seconds": time.perf_counter() - began,
    }


def _initial(built: RunComponents, out: Path) -> Encoder:
    """Return the initial encoder on every rank; one that the run has saved is read by rank 0 only."""
    if not distributed.broadcast_object(kept_initial(out) is not None):
        return initial_encoder(built.recipe, out, built.loader.device)
    main = distributed.rank() == 0
    encoder = initial_encoder(built.recipe, out, built.loader.device) if main else copy.deepcopy(built.encoder).eval()
    distributed.broadcast_(encoder.state_dict().values())
    return encoder


def images_within(built: RunComponents, seconds: float, images: int | None = None) -> tuple[int, float]:
    """Return how many images `compare_with_initial` can embed in this many seconds, and about how long they take.

    Args:
        built: The run.
        seconds: Time limit.
        images: Fixed number of images, for a resumed run.
    """
    sample = Chosen(built.loader.source, built.loader.held, built.recipe.seed, 64)
    each = 0.0
    for _ in range(2):  # the first pass is a warm-up
        began = time.perf_counter()
        number = embed_all({"it": built.encoder}, built.views, sample, built.recipe.seed, False)["it"].number
        each = 2 * (time.perf_counter() - began) / len(number)
    most = min(IMAGES, len(built.loader.source))
    if images is None:
        images = next((n for n in (IMAGES, 1000, 500, 250, 125) if min(n, most) * each <= seconds), 64)
    return images, 1.0 + min(images, most) * each


def before_training(recipe: Recipe, run: Path, device: torch.device) -> tuple[Encoder | None, str | None]:
    """Return the initial encoder of a run; None and the reason if the weights that its recipe names are missing."""
    try:
        return initial_encoder(recipe, run, device), None
    except InbatchError as error:
        return None, f"the encoder before training cannot be created: {error}"


def evaluate_labelled(
    before: Encoder | None,
    encoder: Encoder,
    bank: Images,
    queries: Images,
    protocols: Sequence[str],
    options: Mapping[str, Any],
    stopped: bool = False,
) -> dict[str, Any]:
    """Return the figures of an encoder, and as "untrained" those of the encoder before training by the same protocols.

    The encoder before training is not evaluated by the protocols in `COSTLY`; "untrained" is None if only these are
    requested.

    Args:
        before: The encoder before training; None if it cannot be created.
        encoder: The encoder to evaluate.
        bank: Labelled images for k-NN and the probes.
        queries: Labelled images to classify.
        protocols: Names of the protocols.
        options: Options of `evaluate`.
        stopped: The encoder is of an unfinished run, so that its readout was fitted at an earlier step.
    """
    for one in (encoder, before):
        if one is not None:
            fit_readout(one, bank, again=stopped and one is encoder)
    figures = evaluate(encoder, bank, queries, protocols=protocols, **options)
    cheap = [name for name in protocols if name not in COSTLY]
    untrained = evaluate(before, bank, queries, protocols=cheap, **options) if cheap and before is not None else None
    return figures | {"untrained": untrained}


def evaluate_unlabelled(
    recipe: Recipe, before: Encoder | None, encoder: Encoder, source: Source, seed: int, stopped: bool = False
) -> dict[str, Any]:
    """Return the measures that need no labels, of both encoders; entries of evaluation.json.

    Args:
        recipe: Recipe of the run.
        before: The encoder before training; None if it cannot be created.
        encoder: The encoder to evaluate.
        source: The images.
        seed: Seed of the sample of images and of their views.
        stopped: As in `evaluate_labelled`.
    """
    encoders = {"after": encoder} | ({} if before is None else {"before": before})
    for one in encoders.values():
        fit_readout(one, source, again=stopped and one is encoder)
    embedded = embed_all(encoders, views_of(recipe, encoder.mean, encoder.std), Chosen(source, None, seed), seed)
    return {"unlabelled": compared(embedded.get("before"), embedded["after"]), "images": len(embedded["after"].clean)}
