"""Plan a comparison: the recipe of every variant, the same images, evaluation and seeds for all, and the time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons.metrics import METRICS, Metric
from inbatch.apps.comparisons.request import Request, resolved
from inbatch.apps.comparisons.runner import ComparisonRunner
from inbatch.apps.comparisons.timing import Shares, plan_shares
from inbatch.apps.comparisons.variants import Variant
from inbatch.apps.papers.spec import Cell, Column, Row, Scale, Table, cells
from inbatch.apps.papers.spec import key as run_key
from inbatch.errors import ConfigError, DataError
from inbatch.methods import METHODS
from inbatch.runtime.files import check_writable, read_json, to_json, write_json
from inbatch.training.build_checks import check_labels
from inbatch.training.holdout import evaluation_split, lack_of_classes
from inbatch.training.recipe import Recipe

SCALE = "own"


@dataclass(frozen=True)
class Plan:
    """A comparison with all its recipes.

    Attributes:
        table: The variants as rows of a table with one column.
        metric: The tested figure.
        recipes: Recipe of each variant, with seed 0.
        images: Number of images to learn from.
        held_out: Origin of the labelled images for the evaluation; None without labels.
        notes: Sentences about unequal conditions.
        shares: The time of each run with a budget; None without one.
    """

    table: Table
    metric: Metric
    recipes: tuple[Recipe, ...]
    images: int
    held_out: str | None
    notes: tuple[str, ...]
    shares: Shares | None = None

    @property
    def cells(self) -> list[Cell]:
        """Every run, the first seed of all variants first."""
        return list(cells(self.table, SCALE))


def plan_comparison(request: Request, metric: Metric | None, runner: ComparisonRunner, began: float) -> Plan:
    """Return the plan of a comparison; with a budget, the length of every variant is planned by real steps.

    The plan is stored in the folder of the runs, so that a repeated command continues the same runs.

    Args:
        request: The comparison.
        metric: The tested figure; None for k-NN, or for images without labels the share of images that are found again.
        runner: The runner.
        began: Start of the command (`time.perf_counter`), from which a budget counts.

    Raises:
        ConfigError: For invalid settings, equal variants, or a folder that holds runs on other images.
        DataError: If the images cannot be read, or the metric needs labels that they lack.
        InbatchError: If the folder cannot be written.
    """
    settings, recipes, source = resolved(request)
    _check_different(request.variants, recipes)
    for variant, recipe in zip(request.variants, recipes, strict=True):
        try:
            check_labels(recipe, source)
        except DataError as error:  # before the runs of the other variants
            raise DataError(f"variant {variant.name}: {error}") from None
    facts = {
        "data": request.place, "test": recipes[0].test, "images": len(source), "signature": source.signature(),
    }  # fmt: skip
    planned = _stored_plans(runner.work, facts)
    split = evaluation_split(recipes[0], source, request.place, download=request.download)
    metric = metric or METRICS["same_image" if split is None else "knn"]
    if split is None and metric.labels:
        raise DataError(
            f"{source.name} {lack_of_classes(source)}, and the metric needs two classes: use --metric same_image or "
            "rankme, which are not accuracies, or labelled --set test=FOLDER"
        )
    shares, plans = None, runner.work / "plan.json"
    check_writable(plans)
    if request.budget is not None:
        shares = plan_shares(request, settings, recipes, metric, runner, planned, began)
        recipes = list(shares.recipes)
    write_json(plans, facts | {"schema": 1, "planned": planned})
    held_out = None if split is None else split.description
    table = _table(request, recipes, metric)
    notes = tuple(_unequal_conditions(request, recipes, held_out))
    return Plan(table, metric, tuple(recipes), len(source), held_out, notes, shares)


def _stored_plans(work: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the stored plans of a folder; ConfigError for runs on other images."""
    file = work / "plan.json"
    if not file.exists():
        return {}
    content = read_json(file)
    for key, what in (("data", "images"), ("test", "test images"), ("images", "number of images"), ("signature", "")):
        if content.get(key) != facts[key]:
            now = f"{what}: {content.get(key)}, now {facts[key]}" if what else "other names or labels"
            raise ConfigError(f"{work} holds runs on other images ({now}): choose another --out")
    planned = content.get("planned")
    return planned if isinstance(planned, dict) else {}


def _table(request: Request, recipes: Sequence[Recipe], metric: Metric) -> Table:
    """Return the comparison as a table, whose rows are compared with the first."""
    name, rows = request.name, list[Row]()
    for variant, recipe in zip(request.variants, recipes, strict=True):
        own = {key: value for key, value in recipe.flat().items() if key != "seed"} | {"data": name}
        rows.append(Row(variant.name, own, against=request.variants[0].name if rows else None))
    scale = Scale(
        (Column(metric.heading, name, metric.path),), {name: {}}, seeds=request.seeds,
        protocols=() if metric.protocol is None else (metric.protocol,),
    )  # fmt: skip
    return Table("comparison", "Comparison", "inbatch compare", "", tuple(rows), {SCALE: scale})


def _check_different(variants: Sequence[Variant], recipes: Sequence[Recipe]) -> None:
    """Raise ConfigError if two variants are the same recipe: they would share every run."""
    seen: dict[str, str] = {}
    for variant, recipe in zip(variants, recipes, strict=True):
        identity = run_key(recipe)  # that of a run: without settings that do not change what is learned
        if identity in seen:
            raise ConfigError(
                f"the variants {seen[identity]!r} and {variant.name!r} are the same recipe and would share every run: "
                "leave one out"
            )
        seen[identity] = variant.name


def differing(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return, for each recipe, the settings in which recipes differ, with their values; None without the setting."""
    flat = [json.loads(to_json(recipe.flat())) for recipe in recipes]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    unequal = [key for key in keys if key != "preset" and any(one.get(key) != flat[0].get(key) for one in flat)]
    return [{key: one.get(key) for key in unequal} for one in flat]


def _unequal_conditions(request: Request, recipes: Sequence[Recipe], held_out: str | None) -> list[str]:
    """Return sentences about conditions that are not the same for all variants."""
    notes = []
    differences = differing(recipes)
    if request.budget is not None:
        lengths = ", ".join(f"{v.name}: {r.steps:,}" for v, r in zip(request.variants, recipes, strict=True))
        notes.append(
            "Equal time, not equal steps: every run has the same wall time, so a variant with slower steps makes fewer "
            f"({lengths}). For equal steps use --epochs."
        )
    else:
        length = ["epochs", "steps"] if any(recipe.steps is None for recipe in recipes) else ["steps"]
        keys = [key for key in (*length, "batch_size", "image_size") if key in differences[0]]
        notes += [f"The variants differ in {key}, which may explain a difference." for key in keys]
    labelled = [
        v.name
        for v, r in zip(request.variants, recipes, strict=True)
        if getattr(METHODS.get(r.method.name), "labels", False)
    ]
    if labelled and len(labelled) < len(recipes):
        seen = held_out is not None and held_out.startswith("a tenth")
        notes.append(
            f"{', '.join(labelled)}: learns from the labels, the others do not"
            + (", and also from those of the images that evaluate it: pass test images." if seen else ".")
        )
    return notes
