"""Plan a comparison: the recipe of every variant, the same images, evaluation and seeds for all, and the time."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons.metrics import METRICS, Metric
from inbatch.apps.comparisons.runner import ComparisonRunner
from inbatch.apps.comparisons.variants import Variant, named
from inbatch.apps.papers.spec import Cell, Column, Row, Scale, Table, cells
from inbatch.errors import ConfigError, DataError
from inbatch.methods import METHODS
from inbatch.runtime.files import check_writable, read_json, to_json, write_json
from inbatch.training.budget import LEAST, duration
from inbatch.training.build_checks import check_labels
from inbatch.training.holdout import evaluation_split
from inbatch.training.plan import resolve_recipe
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.requested_settings import check_one_length, with_default_budget
from inbatch.training.run_encoder import with_encoder_of_init
from inbatch.training.settings_file import read_settings

SCALE = "own"
KEPT = 0.1
"""Share of a budget that is kept for planning and for the evaluation on all images."""
DEFAULT = 3600.0
"""Seconds of a run on a CPU if nothing determines its length, as of `inbatch pretrain`."""
_TIMED = 6
"""Variants of which real steps are timed for the expected duration; others are counted as the mean of these."""
_OF_FIRST = ("image_size", "subset")
"""Settings that a budget chooses for the first variant and that then apply to all, with its encoder."""


@dataclass(frozen=True)
class Request:
    """A requested comparison.

    Attributes:
        variants: The variants.
        place: Location of the images, or the name of a data set.
        seeds: Seeds of every variant.
        common: Settings of all variants, which a variant may override.
        budget: Seconds for all runs together; None without a budget.
        download: Download a torchvision data set that is missing.
    """

    variants: tuple[Variant, ...]
    place: str
    seeds: tuple[int, ...]
    common: Settings = field(default_factory=dict)
    budget: float | None = None
    download: bool = False

    @property
    def name(self) -> str:
        """Name of the images in the names of files: the last part of their location."""
        first = self.place.split(os.pathsep)[0].rstrip("/")
        return re.sub(r"[^\w.-]+", "-", Path(first).name or first).strip("-.") or "data"


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
        share: Seconds of one run with a budget.
        process: Seconds that a process of a comparison with a budget needs for its start and for a few steps, measured
            when the runs were planned; None if that is unknown.
    """

    table: Table
    metric: Metric
    recipes: tuple[Recipe, ...]
    images: int
    held_out: str | None
    notes: tuple[str, ...]
    share: float | None = None
    process: float | None = None

    @property
    def cells(self) -> list[Cell]:
        """Every run, the first seed of all variants first."""
        return list(cells(self.table, SCALE))


def with_length(request: Request, device: Any, jobs: int) -> Request:
    """Return the request, on a CPU with a budget of an hour a run if no variant sets length or encoder.

    Raises:
        ConfigError: If some variants set a length and others do not.
    """
    if request.budget is not None:
        return request
    own = [{**request.common, **variant.settings} for variant in request.variants]
    lacking = [with_default_budget(one, request.place, device, configured=False) is not one for one in own]
    if any(lacking) and not all(lacking):
        name = request.variants[lacking.index(True)].name
        raise ConfigError(f"variant {name!r} sets no length and others do: add --epochs or --budget for all")
    rounds = -(-len(own) * len(request.seeds) // jobs)
    return replace(request, budget=DEFAULT * rounds / (1 - KEPT)) if all(lacking) else request


def resolved(request: Request) -> tuple[list[Settings], list[Recipe], Any]:
    """Return requested settings and recipe of every variant, and the images; errors name the variant.

    All variants get the number of neighbours of the first one's preset, so that their evaluation is the same.
    """
    settings, recipes, source = list[Settings](), list[Recipe](), None
    for variant in request.variants:
        own = {**request.common, **variant.settings}
        try:
            own = with_encoder_of_init(own)
            if request.budget is not None:
                check_one_length(own | {"budget": request.budget})
            recipe, opened = resolve_recipe(request.place, own, request.download)
            if recipes and "knn_k" not in own and recipe.knn_k != recipes[0].knn_k:
                own = own | {"knn_k": recipes[0].knn_k}
                recipe, _ = resolve_recipe(request.place, own, request.download)
        except ConfigError as error:  # an error of the images is not the variant's
            raise ConfigError(named(f"pretrain {variant.name}", error)) from None
        source = source or opened
        settings.append(own)
        recipes.append(recipe)
    return settings, recipes, source


def plan_comparison(request: Request, metric: Metric | None, runner: ComparisonRunner) -> Plan:
    """Return the plan of a comparison; with a budget, the length of every variant is planned by real steps.

    Without a metric it is k-NN, or for images without labels the share of images that are found again.

    The plan is stored in the folder of the runs, so that a repeated command continues the same runs.

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
    planned, process = _stored(runner.work, facts)
    split = evaluation_split(recipes[0], source, request.place, download=request.download)
    metric = metric or METRICS["same_image" if split is None else "knn"]
    if split is None and metric.labels:
        raise DataError(
            f"{source.name} has no labels{source.why_unlabelled()}, which the metric needs: use --metric same_image or "
            "rankme, which are not accuracies, or labelled --set test=FOLDER"
        )
    share, plans = None, runner.work / "plan.json"
    check_writable(plans)
    if request.budget is not None:
        share = run_share(request.budget, len(recipes) * len(request.seeds), runner.jobs or 1)
        recipes, seconds = _within_budget(request, settings, recipes, share, runner, planned)
        process = sum(seconds) / len(seconds) if seconds else process
    write_json(plans, facts | {"schema": 1, "planned": planned, "process_seconds": process})
    held_out = None if split is None else split.description
    table = _table(request, recipes, metric)
    notes = tuple(_unequal(request, recipes, held_out))
    return Plan(table, metric, tuple(recipes), len(source), held_out, notes, share, process)


def run_share(budget: float, runs: int, jobs: int) -> float:
    """Return the seconds of one run, if `jobs` of them run at a time; ConfigError if they are too few."""
    rounds = -(-runs // jobs)
    share = (1 - KEPT) * budget / rounds
    if share < LEAST:
        least = duration(LEAST * rounds / (1 - KEPT))
        raise ConfigError(
            f"a budget of {duration(budget)} for {runs} runs, {jobs} at a time, leaves {share:.0f} s for a run, which "
            f"needs at least {LEAST:.0f} s: give at least {least}, or fewer variants or seeds"
        )
    return share


def _within_budget(
    request: Request, settings: Sequence[Settings], recipes: Sequence[Recipe], share: float,
    runner: ComparisonRunner, stored: dict[str, Any],
) -> tuple[list[Recipe], list[float]]:  # fmt: skip
    """Return recipes of equal duration, by timed steps of every variant, with the encoder of the first one.

    The second value is the duration of each process that timed steps.
    """
    planned, seconds = list[Recipe](), list[float]()
    for variant, own, recipe in zip(request.variants, settings, recipes, strict=True):
        own = own | {"budget": share, "knn_k": recipes[0].knn_k}
        if planned:
            chosen = planned[0].flat()
            named_encoder = any(key.startswith("encoder.") or key == "preset" for key in own)
            first = () if named_encoder else [key for key in chosen if key.startswith("encoder.")]
            own = {key: chosen[key] for key in (*first, *_OF_FIRST) if chosen[key] is not None} | own
        identity = hashlib.sha256(to_json(own | {"seeds": len(request.seeds)}).encode()).hexdigest()[:16]
        if identity not in stored:
            runner.tell(f"Planning {variant.name}: timing real steps for {duration(share)} a run.")
            cell = Cell(variant.name, request.name, 0, recipe.flat() | {"data": request.name})
            began = time.perf_counter()
            try:
                dry = runner.dry_run(cell, own, request.place)
            except ConfigError as error:
                raise ConfigError(named(f"pretrain {variant.name}", error)) from None
            seconds.append(time.perf_counter() - began)
            stored[identity] = dry["recipe"] | {"seed": 0}
        planned.append(make(read_settings(stored[identity] | {"data": request.place})))
    return planned, seconds


def expected_by_budget(plan: Plan, runs: int, jobs: int) -> tuple[float, float]:
    """Return the seconds that runs with a budget will take in all, and those of them outside of one run's share.

    Each run starts two processes, for the training and for the evaluation on all images.
    """
    extra = 2 * (plan.process or 0.0)
    return -(-runs // jobs) * ((plan.share or 0.0) + extra), extra


def _stored(work: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the stored plans of a folder, and the duration of a process; ConfigError for runs on other images."""
    file = work / "plan.json"
    if not file.exists():
        return {}, None
    content = read_json(file)
    for key, what in (("data", "images"), ("test", "test images"), ("images", "number of images"), ("signature", "")):
        if content.get(key) != facts[key]:
            now = f"{what}: {content.get(key)}, now {facts[key]}" if what else "other names or labels"
            raise ConfigError(f"{work} holds runs on other images ({now}): choose another --out")
    planned, process = content.get("planned"), content.get("process_seconds")
    return planned if isinstance(planned, dict) else {}, process if isinstance(process, float) else None


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
        text = to_json({key: value for key, value in recipe.flat().items() if key != "preset"})
        if text in seen:
            raise ConfigError(
                f"the variants {seen[text]!r} and {variant.name!r} are the same recipe and would share every run: "
                "leave one out"
            )
        seen[text] = variant.name


def differing(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return, for each recipe, the settings in which recipes differ, with their values; None without the setting."""
    flat = [json.loads(to_json(recipe.flat())) for recipe in recipes]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    unequal = [key for key in keys if key != "preset" and any(one.get(key) != flat[0].get(key) for one in flat)]
    return [{key: one.get(key) for key in unequal} for one in flat]


def _unequal(request: Request, recipes: Sequence[Recipe], held_out: str | None) -> list[str]:
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


def expected_seconds(plan: Plan, missing: Sequence[Cell], place: str, runner: ComparisonRunner) -> tuple[float, int]:
    """Return the expected seconds of training the missing runs, and the number of variants that were timed."""
    counts: dict[str, int] = {}
    first: dict[str, Cell] = {}
    for cell in missing:
        counts[cell.key] = counts.get(cell.key, 0) + 1
        first.setdefault(cell.key, cell)
    timed = {}
    for key, cell in list(first.items())[:_TIMED]:
        settings = {name: value for name, value in cell.recipe().nested().items() if name != "budget"}
        try:
            timed[key] = float(runner.dry_run(cell, settings, place)["seconds_estimate"]["training"])
        except ConfigError as error:
            raise ConfigError(named(f"pretrain {cell.row}", error)) from None
    mean = sum(timed.values()) / max(1, len(timed))
    return sum(timed.get(key, mean) * count for key, count in counts.items()), len(timed)
