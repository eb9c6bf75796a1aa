"""The time of an adaptation with a budget: equal shares for the runs of what start and verdict leave."""

import time

import torch

from inbatch.apps.adaptation.hits import BATCH, measure_hits
from inbatch.errors import ConfigError, many
from inbatch.evaluation import embed
from inbatch.training.budget import LEAST, duration
from inbatch.training.evaluation_plan import JUDGED
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.monitors.online_evaluation import limited
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import make_encoder, seeded, starting_weights

_TIMED = (256, 128)
"""Numbers of images of bank and queries on which the verdict is timed."""
_SLOWER = 1.25
"""Factor on its measured time: the linear probe of more images can need more iterations."""
_RESERVE = 0.04
"""Share of the time of the runs that is kept for runs that end late."""


def check_budget(budget: float, seeds: int) -> None:
    """Raise ConfigError if a budget is too short for the runs alone."""
    if budget / seeds < LEAST:
        raise ConfigError(
            f"a budget of {duration(budget)} leaves {budget / seeds:.0f} s for each of {seeds} seeds, and a run needs "
            f"at least {LEAST:.0f} s: give at least {duration(LEAST * seeds)}, or fewer seeds"
        )


def run_seconds(budget: float, used: float, verdict: float, seeds: int) -> float:
    """Return the seconds of each run so that all of them and the verdict end within the budget.

    Args:
        budget: Seconds of the whole command.
        used: Seconds since its start.
        verdict: Expected seconds of the verdict.
        seeds: Number of runs.

    Raises:
        ConfigError: If they are too few.
    """
    share = (1 - _RESERVE) * (budget - used - verdict) / seeds
    if share < LEAST:
        least = used + verdict + seeds * LEAST / (1 - _RESERVE)
        raise ConfigError(
            f"a budget of {duration(budget)} is too short here: the start took {duration(used)}, the verdict takes "
            f"about {duration(verdict)}, and each of {many(seeds, 'run')} needs at least {LEAST:.0f} s. Give at least "
            f"{duration(1.1 * least + 10)}, or fewer seeds"
        )
    return round(share, 1)


def verdict_seconds(
    recipe: Recipe, split: EvaluationSplit | None, budget: float, seeds: int, device: torch.device
) -> float:
    """Return about how long the verdict takes: the initial encoder and that of every run are evaluated.

    The initial encoder is evaluated on a part of the images, and its time is scaled to as many as the runs will be
    evaluated on, which are fewer if their time is short.

    Args:
        recipe: Recipe of the runs.
        split: Labelled images; None without labels.
        budget: Seconds of the whole command.
        seeds: Number of runs.
        device: Device of the evaluation.
    """
    if split is None:
        return 0.0
    with seeded(recipe, device):
        encoder = make_encoder(recipe, starting_weights(recipe, [])).to(device).eval()
    part = limited(split, *_TIMED)
    measure_hits(encoder, part, recipe, device)  # loads what it needs
    began = time.perf_counter()
    embed(encoder, part.queries, batch=BATCH)
    embedded = time.perf_counter()
    measure_hits(encoder, part, recipe, device)
    each = (time.perf_counter() - embedded) / (len(part.bank) + len(part.queries))
    affordable = JUDGED * budget / seeds / ((embedded - began) / len(part.queries))
    return _SLOWER * (seeds + 1) * each * min(len(split.bank) + len(split.queries), affordable)


def planned_share(
    budget: float, seeds: int, began: float, recipe: Recipe, split: EvaluationSplit | None, device: torch.device
) -> float:
    """Return the seconds of each run, with the time of the verdict measured now.

    Args:
        budget: Seconds of the whole command.
        seeds: Number of runs.
        began: Start time of the command (`time.perf_counter`).
        recipe: Recipe of the runs.
        split: Labelled images; None without labels.
        device: Device of the evaluation.

    Raises:
        ConfigError: If they are too few.
    """
    verdict = verdict_seconds(recipe, split, budget, seeds, device)
    return run_seconds(budget, time.perf_counter() - began, verdict, seeds)
