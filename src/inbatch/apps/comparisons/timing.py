"""The time of a comparison: the shares of a budget, and the expected duration without one."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from inbatch.apps.comparisons.metrics import Metric
from inbatch.apps.comparisons.request import KEPT, Request
from inbatch.apps.comparisons.runner import ComparisonRunner
from inbatch.apps.comparisons.variants import Variant, named
from inbatch.apps.papers.spec import Cell
from inbatch.errors import ConfigError, many
from inbatch.runtime.files import to_json
from inbatch.training.budget import LEAST, duration
from inbatch.training.budget_plan import planned_length
from inbatch.training.calibration import FEWEST
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.settings_file import read_settings

_TIMED = 6
"""Variants of which real steps are timed for the expected duration; others are counted as the mean of these."""
_OF_FIRST = ("image_size", "subset")
"""Settings that a budget chooses for the first variant and that then apply to all, with its encoder."""
_SLOWER = 1.25
"""Factor on the measured time to start and evaluate a run: other runs take place at the same time."""
_RESERVE = 0.04
"""Share of the time after planning that is kept for runs that end late and for the table."""
FEW_PROBES, RETRIEVAL = 3.0, 2.0
"""Duration of the protocols few and retrieval, at most, as multiples of that of the default protocols."""


@dataclass(frozen=True)
class Shares:
    """The runs of a comparison with a budget.

    Attributes:
        recipes: Recipe of each variant, all of the same duration.
        run: Seconds of one run.
        extra: Seconds outside of it that a run needs: the evaluation on all images, and its start.
    """

    recipes: tuple[Recipe, ...]
    run: float
    extra: float


def run_share(budget: float, runs: int, jobs: int) -> float:
    """Return the seconds of one run before anything is measured; ConfigError if they are too few."""
    rounds = -(-runs // jobs)
    share = (1 - KEPT) * budget / rounds
    if share < LEAST:
        least = duration(LEAST * rounds / (1 - KEPT))
        raise ConfigError(
            f"a budget of {duration(budget)} for {runs} runs, {jobs} at a time, leaves {share:.0f} s for a run, which "
            f"needs at least {LEAST:.0f} s: give at least {least}, or fewer variants or seeds"
        )
    return share


def plan_shares(
    request: Request, settings: Sequence[Settings], recipes: Sequence[Recipe], metric: Metric,
    runner: ComparisonRunner, stored: dict[str, Any], began: float,
) -> Shares:  # fmt: skip
    """Return recipes of equal duration that end within the budget, by timed steps and evaluations of every variant.

    All get the encoder, image size and subset of the first one, unless they name another encoder.

    Args:
        request: The comparison.
        settings: Requested settings of the variants.
        recipes: Recipes of the variants without a budget.
        metric: The tested figure.
        runner: Makes the processes that time steps.
        stored: Plans of earlier commands in this folder, to which this adds its own.
        began: Start of the command (`time.perf_counter`).

    Raises:
        ConfigError: If the budget is too short for the runs.
    """
    budget, jobs, runs = request.budget or 0.0, runner.jobs or 1, len(recipes) * len(request.seeds)
    if metric.protocol is not None and metric.protocol not in _PROTOCOL_COST:
        raise ConfigError(f"the duration of {metric.heading} is not known before the runs: use --epochs, not --budget")
    rough = run_share(budget, runs, jobs)
    facts = [own | {"budget": rough, "knn_k": recipes[0].knn_k} for own in settings]
    text = to_json([facts, len(request.seeds), metric.protocol])
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    if identity not in stored:
        plans, extra, share = list[tuple[Settings, dict[str, Any]]](), 0.0, rough
        for plan in _timed_plans(request, facts, recipes, runner):
            plans.append(plan)
            extra = max(extra, _SLOWER * _evaluation_seconds(plan[1]["seconds_estimate"], metric))
            share = _final_share(budget, time.perf_counter() - began, runs, jobs, extra)
        fitted = [
            _scaled_recipe(variant, own, dry, share / rough)
            for variant, (own, dry) in zip(request.variants, plans, strict=True)
        ]
        stored[identity] = {"recipes": fitted, "run": share, "extra": extra}
    planned = stored[identity]
    final = tuple(make(read_settings(recipe | {"data": request.place})) for recipe in planned["recipes"])
    return Shares(final, planned["run"], planned["extra"])


def _timed_plans(
    request: Request, facts: Sequence[Settings], recipes: Sequence[Recipe], runner: ComparisonRunner
) -> Iterator[tuple[Settings, dict[str, Any]]]:
    """Yield the settings of each variant, and what a process finds that times its steps and an evaluation."""
    chosen: Settings = {}
    for variant, own, recipe in zip(request.variants, facts, recipes, strict=True):
        if chosen:
            named_encoder = any(key.startswith("encoder.") or key == "preset" for key in own)
            first = () if named_encoder else [key for key in chosen if key.startswith("encoder.")]
            own = {key: chosen[key] for key in (*first, *_OF_FIRST) if chosen[key] is not None} | own
        runner.notify(f"Planning {variant.name}: timing real steps and an evaluation.")
        cell = Cell(variant.name, request.name, 0, recipe.flat() | {"data": request.name})
        try:
            dry = runner.dry_run(cell, own, request.place)
        except ConfigError as error:
            raise ConfigError(named(f"pretrain {variant.name}", error)) from None
        chosen = chosen or make(read_settings(dry["recipe"])).flat()
        yield own, dry


_PROTOCOL_COST = {"few": FEW_PROBES, "retrieval": RETRIEVAL}


def _evaluation_seconds(estimate: dict[str, float], metric: Metric) -> float:
    """Return the seconds that the evaluation of a run takes after its share, with the start of its processes."""
    start, evaluation = estimate["start"], estimate["evaluation"]
    own = 0.0 if metric.protocol is None else start + _PROTOCOL_COST[metric.protocol] * evaluation
    return start + evaluation + own


def _final_share(budget: float, used: float, runs: int, jobs: int, extra: float) -> float:
    """Return the seconds of one run so that all end within the budget; ConfigError if they are too few."""
    rounds = -(-runs // jobs)
    share = (1 - _RESERVE) * (budget - used) / rounds - extra
    if share < LEAST:
        least = used + rounds * (LEAST + extra) / (1 - _RESERVE)
        raise ConfigError(
            f"a budget of {duration(budget)} is too short here: planning took {duration(used)}, and each of "
            f"{many(runs, 'run')}, {jobs} at a time, needs {LEAST:.0f} s and {duration(extra)} to start and evaluate "
            f"it. Give at least {duration(1.1 * least + 30)}, or fewer variants or seeds"
        )
    return round(share, 1)


def _scaled_recipe(variant: Variant, own: Settings, dry: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Return the recipe of a timed plan, with another duration."""
    planned = dry["recipe"]
    steps = int(planned["steps"] * ratio)
    if steps < FEWEST:
        raise ConfigError(
            named(f"pretrain {variant.name}", ConfigError(
                f"the budget leaves {many(steps, 'step')} of about {dry['seconds_estimate']['step']:,.1f} s for a run: "
                "give a longer one, a smaller batch or a smaller encoder"
            ))
        )  # fmt: skip
    length = planned_length(own, steps, dry["steps_per_epoch"])
    schedule = planned["schedule"] | {"warmup_epochs": length.pop("schedule.warmup_epochs")}
    return planned | length | {"schedule": schedule, "budget": round(planned["budget"] * ratio, 1), "seed": 0}


def expected_by_budget(shares: Shares, runs: int, jobs: int) -> float:
    """Return the seconds that runs with a budget will take in all."""
    return -(-runs // jobs) * (shares.run + shares.extra)


def budget_sentence(shares: Shares, runs: int, jobs: int, left: float) -> str:
    """Return the expected duration of runs with a budget.

    Args:
        shares: The shares of the runs.
        runs: Number of runs to make.
        jobs: Number of concurrent runs.
        left: Seconds of the budget that are left.
    """
    seconds = expected_by_budget(shares, runs, jobs)
    return (
        f"Expected: about {duration(seconds)} from now, {duration(shares.run)} for each run and at most "
        f"{duration(shares.extra)} to start and evaluate it; {duration(left)} of the budget are left."
    )


def expected_seconds(missing: Sequence[Cell], place: str, runner: ComparisonRunner) -> tuple[float, int]:
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
