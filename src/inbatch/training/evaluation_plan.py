"""Choose what a run is evaluated on, as large as a share of its time budget allows."""

import math
import time
from dataclasses import dataclass, replace

from inbatch.evaluation import evaluate
from inbatch.runtime import distributed, shared_work
from inbatch.training.budget import Pace, RunClock
from inbatch.training.build import RunComponents
from inbatch.training.extra_passes import combined
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.monitors.online_evaluation import (
    affordable,
    choose_online_subsets,
    fit_readout,
    limited,
    make_online_evaluator,
)
from inbatch.training.run_evaluation import IMAGES, images_within
from inbatch.training.timing import growth, plain_share
from inbatch.training.train_state import EvaluationSizes, TrainState

JUDGED = 0.03
"""Share of a budget that embedding the images of one evaluation may take."""
_TIMED = (256, 128)
"""Numbers of images of bank and queries on which a whole evaluation is timed."""
SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch without a budget; with a budget, a twentieth of it."""


@dataclass(frozen=True)
class RunEvaluations:
    """What a run is evaluated on, and the pace that leaves time for it.

    Attributes:
        online: Images of the online evaluation; None without labels.
        final: Images of the evaluation at the end; None without labels.
        compared: Number of images on which the encoder is compared with the one before training.
        pace: Pace of a run with a budget; that of rank 0 counts.
        seconds: Duration of an online evaluation of a run with a budget.
    """

    online: EvaluationSplit | None
    final: EvaluationSplit | None
    compared: int = IMAGES
    pace: Pace | None = None
    seconds: float = 0.0

    def clock(self, progress: TrainState) -> RunClock:
        """Return the monitor of the run's clock."""
        clock = RunClock(self.pace, lambda: progress.wall, SAVE_EVERY if self.pace is None else self.pace.seconds / 20)
        clock.evaluation_seconds = self.seconds
        clock.survey_seconds = (progress.calibration or {}).get("survey", 0.0)
        return clock


def plan_evaluations(built: RunComponents, split: EvaluationSplit | None, progress: TrainState) -> RunEvaluations:
    """Return the images of the online and the final evaluation, the same on every rank."""
    plan = RunEvaluations(split, split) if built.recipe.budget is None else _within_budget(built, split, progress)
    if plan.final is None:
        return plan
    online, final = choose_online_subsets(built, plan.final)
    return replace(plan, online=online, final=final)


def _within_budget(built: RunComponents, split: EvaluationSplit | None, progress: TrainState) -> RunEvaluations:
    """Return the evaluations of a run with a budget, as large as a share of it allows.

    The duration of all this is measured in advance; the encoder before training is also evaluated. The measurements of
    rank 0 count on all ranks.
    """
    budget, calibration, sizes = built.recipe.budget or 0.0, progress.calibration, progress.sizes
    left = max(1.0, budget - progress.wall)
    began = time.perf_counter()
    with built.gathered():
        if split is not None:
            part = split if sizes or distributed.rank() else affordable(built, split, JUDGED * left)
            bank, queries = distributed.broadcast_object(
                (sizes.bank, sizes.queries) if sizes else (len(part.bank), len(part.queries))
            )
            split = limited(split, bank, queries)
        evaluation = time.perf_counter()
        with shared_work.sharing():
            make_online_evaluator(built, split)()
        evaluation, seconds = (time.perf_counter() - since for since in (evaluation, began))
        images, comparison = distributed.broadcast_object(
            (0, 0.0) if distributed.rank() else images_within(built, JUDGED * left, sizes.compared if sizes else None)
        )
    progress.sizes = EvaluationSizes(len(split.bank) if split else 0, len(split.queries) if split else 0, images)
    until = built.recipe.grow_until
    costs = [(until, calibration["small"])] if calibration and until else growth(built)
    if built.step.curator is not None:
        plain = (calibration or {}).get("plain") or plain_share(built)
        costs = combined(costs, [(min(1.0, built.step.curator.starts * built.loader.steps / built.total), plain)])
    pace = Pace(budget, 3.0 * seconds + comparison + 0.01 * left + 2.0, costs)
    return RunEvaluations(split, split, images, pace, evaluation)


def evaluation_seconds(built: RunComponents, split: EvaluationSplit | None) -> float:
    """Return about how long `inbatch evaluate` computes for a run: both encoders, by the default protocols.

    An evaluation of a part of the images is timed, after one that loads what the protocols need, and scaled to all.
    """
    if split is None:
        return images_within(built, math.inf)[1]
    part = limited(split, *_TIMED)

    def once() -> float:
        began = time.perf_counter()
        fit_readout(built.encoder, part.bank, again=True)
        evaluate(built.encoder, part.bank, part.queries, k=built.recipe.knn_k, seed=built.recipe.seed)
        return time.perf_counter() - began

    first = once()
    scale = (len(split.bank) + len(split.queries)) / (len(part.bank) + len(part.queries))
    return first + 2 * scale * once()
