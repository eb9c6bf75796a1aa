"""Time real steps of candidate encoders for a time budget, on the images of a run and on this machine."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

import torch

from inbatch.batch import Batch
from inbatch.data import Loader, Source
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import distributed
from inbatch.runtime.resources import cores
from inbatch.runtime.spacing import spaced
from inbatch.runtime.threads import beside_others
from inbatch.training.auto_context import resolve, within_memory
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents, build
from inbatch.training.extra_passes import ExtraPasses, fitting_steps, run_seconds, survey_seconds
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.timing import growth, plain_share, step_seconds

SHARE, MOST = 0.05, 60.0
"""Calibration takes at most this share of the budget, and at most this many seconds."""
WIDTHS = (24, 32, 48)
"""Candidate widths of the encoder `fast`, narrowest first."""
MIN_VIEWS = {24: 0, 32: 700_000, 48: 4_000_000}
"""Number of views from which each width is worth its cost (docs/fast.md)."""
TRAINED = 0.85
"""Planned share of the budget for training; startup, evaluation and checkpoints take the rest."""
SHORTEST = 10.0
"""Approximate minimum duration of calibration in seconds: building an encoder, and four steps at each image size."""
ROUGH = 0.15
"""Share of the budget above which whole steps are not timed before the run; a slice of a batch is timed instead."""
FEWEST = 5
"""Number of steps below which a budget is refused."""
_SLICE = 4
"""Number of samples in the timed slice."""
_WARM = 2
"""Number of warm-up steps before timing: memory is allocated, and views are compiled."""


@dataclass(frozen=True)
class Candidate:
    """An encoder that was timed.

    Attributes:
        name: Name of the encoder, with its width if widths are compared.
        seconds: Mean duration of a step over the run.
        steps: Number of steps that fit into the budget.
        views: Number of views in these steps.
        small: Cost of a step at the reduced image size, relative to one at full size.
        plain: Cost of a step without curation, relative to one with it.
        survey: Seconds of a survey of the data set (PCL's clusters, a sampler's neighbours); 0 without one.
    """

    name: str
    seconds: float
    steps: int
    views: int
    small: float = 1.0
    plain: float = 1.0
    survey: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A timed encoder with the settings of its run.

    Attributes:
        candidate: Its figures.
        settings: Settings of the run, with the context that fits in memory.
        note: How the context was determined; empty if the settings state it.
    """

    candidate: Candidate
    settings: Settings
    note: str


@dataclass(frozen=True)
class Calibration:
    """The timed encoders, narrowest first.

    Attributes:
        trials: One per encoder, at least one.
        loader: Loader of these images, for the run to reuse.
        seconds: Duration of the calibration.
        note: Which encoders were not timed; empty if all were.
    """

    trials: tuple[Trial, ...]
    loader: Loader
    seconds: float
    note: str

    @property
    def best(self) -> Trial:
        """The widest encoder with enough views."""
        enough = [x for x in self.trials if x.candidate.views >= MIN_VIEWS.get(x.settings.get("encoder.width", 0), 0)]
        return enough[-1] if enough else self.trials[0]


def limit_seconds(budget: float) -> float:
    """Return the seconds of a budget that calibration may take."""
    return min(SHARE * budget, MOST)


def calibrate(
    settings: Settings, compare_widths: bool, source: Source, budget: float, began: float, *, device: torch.device,
    workers: int | None,
) -> Calibration:  # fmt: skip
    """Time real steps of the encoder of these settings, or of several widths of it, on the images of a run.

    Every rank must call it, and all get the same figures.

    Args:
        settings: Complete settings of the run, except its length.
        compare_widths: Time the encoder at each of `WIDTHS` that the time allows.
        source: Images to train on.
        budget: Budget of the run in seconds.
        began: Start time of the command (`time.perf_counter`).
        device: Device of the networks.
        workers: Number of processes that decode images.

    Raises:
        ConfigError: If not even `FEWEST` steps fit into the budget.
    """
    limit = limit_seconds(budget) / 12  # two sizes for each of up to three encoders, and a factor of 2
    loader, trials, note, start = None, list[Trial](), "", time.perf_counter()
    for options in [{"encoder.width": width} for width in WIDTHS] if compare_widths else [{}]:
        if trials and not _time_for_another(start, trials[-1].candidate.seconds, budget):
            wide = f"Widths from {options['encoder.width']} on were"
            note = f"{wide} not tried: the budget of {duration(budget)} leaves no time for it."
            break
        own = settings | options | {"steps": 10**6, "epochs": 10**6}
        recipe, context_note = _in_memory(make(own), source, device, workers)
        own["context"] = recipe.context
        built = build(recipe, source, device=device, workers=workers, loader=loader)
        loader = built.loader
        with beside_others(device):
            seconds, small, plain = distributed.broadcast_object(_costs(built, limit))
            extra = distributed.broadcast_object(ExtraPasses(plain, survey_seconds(built)))
        left = distributed.broadcast_object(budget - (time.perf_counter() - began))
        steps = fitting_steps(built, TRAINED * left, seconds, extra)
        if steps < FEWEST and not trials:
            started = settings.get("encoder.init") is not None
            chosen = "Set" if compare_widths else "Leave out encoder and preset, set"  # of the widths, the least
            advice = "The encoder is that of --init: set" if started else chosen
            raise ConfigError(
                f"budget = {duration(budget)} is too short for {built.encoder.name}, "
                f"{recipe.image_size} pixels and batch {built.recipe.batch_size}: "
                f"a step takes about {seconds:,.1f} s. {advice} a "
                f"smaller batch, or give at least {duration(max(2 * budget, 40 * seconds))}"
            )
        steps = max(1, steps)
        views = steps * built.recipe.batch_size * len(built.views)
        name = f"{built.encoder.name} {options['encoder.width']}" if options else built.encoder.name
        mean = run_seconds(built, steps, seconds, extra) / steps
        trials.append(Trial(Candidate(name, mean, steps, views, small, plain, extra.survey), own, context_note))
    assert loader is not None
    return Calibration(tuple(trials), loader, time.perf_counter() - start, note)


def _in_memory(recipe: Recipe, source: Source, device: torch.device, workers: int | None) -> tuple[Recipe, str]:
    """Return the recipe with a context that fits in memory, before any step, and a sentence if one was determined."""
    recipe, context = resolve(recipe, source, device, workers)
    if context is not None:
        return recipe, context.sentence()
    return within_memory(recipe, source, device, workers)


def time_steps(built: RunComponents, limit: float) -> float:
    """Return the mean seconds of a step over the run, from real steps on the first batches at reduced and at full size.

    Args:
        built: The run.
        limit: Seconds to spend on steps of one size; at least four are made.
    """
    with beside_others(built.loader.device):
        return _costs(built, limit)[0]


def _costs(built: RunComponents, limit: float) -> tuple[float, float, float]:
    """Return the mean seconds of a step, and two relative costs of a step: on small images, and without curation."""
    until, budget = built.recipe.grow_until, built.recipe.budget or math.inf
    if budget < math.inf:
        rough = distributed.broadcast_object(step_seconds(built, _SLICE))
        if rough * (_WARM + 2) * 2 > ROUGH * budget:  # whole steps would take too much of the budget
            return rough, growth(built, _SLICE)[0][1] if until else 1.0, plain_share(built, _SLICE)
    full = _timed(built, built.total - 1, limit)
    small = min(full, _timed(built, built.step.frozen, limit)) if until else full
    plain = 1.0 if built.step.curator is None else min(1.0, _timed(built, built.total - 1, limit, False) / full)
    return full * (1 - until) + small * until, small / full, plain


def _timed(built: RunComponents, step: int, seconds: float, curated: bool = True) -> float:
    """Return the median seconds of a step at a position of the run, timed for this many seconds after the warm-up.

    curated: With the curation of a run that has it, which begins in a later epoch than the first.
    """
    times: list[float] = []
    began = time.perf_counter()
    for batch in _batches(built):
        if curated and built.step.curator is not None:
            batch = replace(batch, epoch=built.step.curator.starts)
        start = time.perf_counter()
        float(built.step(batch, step)["loss"])  # reading the value synchronises with the device
        times.append(time.perf_counter() - start)
        # Ranks make the same number of steps: rank 0 decides when to stop.
        if distributed.broadcast_object(len(times) > _WARM + 1 and time.perf_counter() - began > seconds):
            break
    return median(times[_WARM:])


def _batches(built: RunComponents) -> Iterator[Batch]:
    """Yield batches of the first epochs repeatedly; a small data set has one batch per epoch."""
    for epoch in count():
        yield from built.loader.epoch(epoch, stop=8)


def _time_for_another(start: float, last: float, budget: float) -> bool:
    """Return whether a larger encoder can be timed within the limit; rank 0 decides."""
    expected = 3.0 * last * (_WARM + 2)
    return bool(distributed.broadcast_object(time.perf_counter() - start + expected <= limit_seconds(budget)))


def decode_seconds(source: Source, canvas: int) -> float:
    """Return the seconds to decode one image on all cores, estimated from evenly spaced images."""
    chosen = spaced(len(source), 16).tolist()
    began, done = time.perf_counter(), 0
    for i in chosen:
        try:
            with source.open(i) as picture:
                picture.tensor(canvas)
            done += 1
        except DataError:
            continue  # counted and reported when all images are read
    return (time.perf_counter() - began) / max(1, done) / cores()
