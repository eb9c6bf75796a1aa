"""Choose a recipe for a time budget by timing real steps of candidate encoders on this data and this machine."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from statistics import median
from typing import Any

import torch

from inbatch.batch import Batch
from inbatch.data import Loader, Source
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import distributed
from inbatch.runtime.resources import cores
from inbatch.runtime.threads import beside_others
from inbatch.training.auto_context import resolve, within_memory
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents, build
from inbatch.training.plan import check_one_length, natural_size, resolve_recipe
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.timing import growth, step_seconds

SHARE, MOST = 0.05, 60.0
"""Calibration takes at most this share of the budget, and at most this many seconds."""
WIDTHS = (24, 32, 48)
"""Candidate widths of the encoder `fast`, narrowest first."""
WORTH = {24: 0, 32: 700_000, 48: 4_000_000}
"""Number of views from which each width is worth its cost (docs/fast.md)."""
TRAINED = 0.85
"""Planned share of the budget for training; startup, evaluation and checkpoints take the rest."""
DECODED = 0.15
"""Share of the budget that decoding may take before the first step; larger data sets are subsampled."""
SHORTEST = 10.0
"""Approximate minimum duration of calibration in seconds: building an encoder, and four steps at each image size."""
ROUGH = 0.15
"""Share of the budget above which whole steps are not timed before the run; a slice of a batch is timed instead."""
FEWEST, FEW = 5, 20
"""Number of steps below which a budget is refused, and below which the user is warned that the run is short."""
_SLICE = 4
"""Number of samples in the timed slice."""
_LOOKS = 8
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
    """

    name: str
    seconds: float
    steps: int
    views: int
    small: float = 1.0


@dataclass(frozen=True)
class Choice:
    """The recipe chosen for a budget, and the timings behind it; `loader` is for the run to reuse."""

    recipe: Recipe
    chosen: Candidate
    tried: tuple[Candidate, ...]
    seconds: float
    notes: tuple[str, ...]
    loader: Loader
    asked: bool

    def sentences(self) -> list[str]:
        """Return lines for the user: the choice, the candidates and the reason."""
        r, c = self.recipe, self.chosen
        tried = "; ".join(f"{x.name}: {x.seconds:.2f} s a step, {x.views:,} views" for x in self.tried)
        why = "as requested" if self.asked else "the widest with enough views"
        return [
            *self.notes,
            f"Budget of {duration(r.budget or 0)}: {c.name} ({why}), {r.image_size} pixels, batch {r.batch_size}, "
            f"{c.steps:,} steps of about {c.seconds:.2f} s, {c.steps / self.loader.steps:.3g} passes over the images. "
            f"Calibrated in {duration(self.seconds)} ({tried}).",
        ]

    def json(self) -> dict[str, Any]:
        """Return the timings as plain values."""
        return {
            "seconds": self.seconds, "chosen": self.chosen.name, "small": self.chosen.small,
            "tried": [asdict(one) for one in self.tried], "notes": list(self.notes),
        }  # fmt: skip


def plan_budget(
    data: Any, given: Settings, began: float, *, device: torch.device, workers: int | None, download: bool,
    tell: Callable[[str], None] = lambda sentence: None,
) -> tuple[Choice, Source]:  # fmt: skip
    """Return the recipe that makes the best use of a budget on this machine, and the opened data.

    Every rank must call it, and all get the same result.

    Args:
        data: Data to learn from, as for `open_data`.
        given: Settings, including "budget". Values in them (encoder, size, batch, method, ...) are not changed.
        began: Start time of the command (`time.perf_counter`).
        device: Device of the networks.
        workers: Number of processes that decode images.
        download: Whether missing data may be downloaded.
        tell: Called with a sentence on rank 0 before steps are timed.
    """
    check_one_length(given)
    given, notes = dict(given), list[str]()
    chosen_by_user = any(given.get(key) is not None for key in ("encoder.name", "encoder.width", "preset"))
    if given.get("encoder.name", "fast") == "fast":
        given.setdefault("preset", "fast")
    recipe, source = resolve_recipe(data, given, download)
    budget = recipe.budget or 0.0
    if given.get("image_size") is None and recipe.preset == "fast":
        given["image_size"] = small_size(source, device)
        recipe = make(given | {"data": recipe.data, "channels": recipe.channels})
    recipe, source = _decodable(data, given, recipe, source, download, budget, notes)
    given |= {
        "data": recipe.data,
        "channels": recipe.channels,
        "image_size": recipe.image_size,
        "subset": recipe.subset,
    }
    given["batch_size"] = recipe.batch_size if given.get("batch_size") is not None else _batch(recipe, source)

    widths = [{}] if chosen_by_user else [{"encoder.width": width} for width in WIDTHS]
    limit = min(SHARE * budget, MOST)
    if distributed.rank() == 0:
        tell(f"Budget of {duration(budget)}: timing real steps, for about {duration(max(limit, SHORTEST))}.")
    limit /= 12  # two sizes for each of up to three encoders, and a factor of 2
    loader, tried, start = None, list[tuple[Candidate, Settings]](), time.perf_counter()
    contexts: list[str] = []
    for options in widths:
        if tried and not _time_for_another(start, tried[-1][0].seconds, budget):
            wide = f"Widths from {options['encoder.width']} on were"
            notes.append(f"{wide} not tried: the budget of {duration(budget)} leaves no time for it.")
            break
        settings = given | options | {"steps": 10**6, "epochs": 10**6}
        trial, found = _in_memory(make(settings), source, device, workers)
        settings["context"] = trial.context
        built = build(trial, source, device=device, workers=workers, loader=loader)
        loader = built.loader
        with beside_others(device):
            seconds, small = distributed.broadcast_object(_both(built, limit))
        left = distributed.broadcast_object(budget - (time.perf_counter() - began))
        steps = int(TRAINED * left / seconds)
        if steps < FEWEST and not tried:
            raise ConfigError(
                f"budget = {duration(budget)} is too short for {built.encoder.name}, "
                f"{recipe.image_size} pixels and batch {built.recipe.batch_size}: "
                f"a step takes about {seconds:,.1f} s. Leave out encoder and preset, set a "
                f"smaller batch, or give at least {duration(max(2 * budget, 40 * seconds))}"
            )
        steps = max(1, steps)
        views = steps * built.recipe.batch_size * len(built.views)
        name = f"{built.encoder.name} {options['encoder.width']}" if options else built.encoder.name
        tried.append((Candidate(name, seconds, steps, views, small), settings))
        contexts.append(found)
    assert loader is not None
    best = 0
    for number, (candidate, settings) in enumerate(tried):
        if candidate.views >= WORTH.get(settings.get("encoder.width", 0), 0):
            best = number
    candidate, settings = tried[best]
    notes += [contexts[best]] if contexts[best] else []
    if candidate.steps < FEW:
        notes.append(
            f"The budget leaves time for {candidate.steps} steps only: the preset fast, a smaller batch or a longer "
            "budget make more."
        )
    epochs = max(1, -(-candidate.steps // loader.steps))
    settings |= {
        "steps": candidate.steps,
        "epochs": epochs,
        "evaluate_every": given.get("evaluate_every") or max(1, round(epochs / _LOOKS)),
        "checkpoint_every": given.get("checkpoint_every") or max(1, round(epochs / 20)),
    }
    settings["schedule.warmup_epochs"] = given.get(
        "schedule.warmup_epochs", round(0.05 * candidate.steps / loader.steps, 6)
    )
    names = tuple(one for one, _ in tried)
    return Choice(
        make(settings), candidate, names, time.perf_counter() - start, tuple(notes), loader, chosen_by_user
    ), source


def _in_memory(recipe: Recipe, source: Source, device: torch.device, workers: int | None) -> tuple[Recipe, str]:
    """Return the recipe with a context that fits in memory, before any step, and a sentence if one was determined."""
    recipe, fitted = resolve(recipe, source, device, workers)
    if fitted is not None:
        return recipe, fitted.sentence()
    return within_memory(recipe, source, device, workers)


def small_size(source: Source, device: torch.device) -> int:
    """Return the image side for a budget on a CPU: the natural size up to 64 pixels, else 64."""
    natural = natural_size(source)
    return natural if natural <= 64 or device.type != "cpu" else 64


def time_steps(built: RunComponents, limit: float) -> float:
    """Return the mean seconds of a step over the run, from real steps on the first batches at reduced and at full size.

    Args:
        built: The run.
        limit: Seconds to spend on steps of one size; at least four are made.
    """
    with beside_others(built.loader.device):
        return _both(built, limit)[0]


def _both(built: RunComponents, limit: float) -> tuple[float, float]:
    """Return the mean seconds of a step, and the cost of a step on small images relative to one at full size."""
    until, budget = built.recipe.grow_until, built.recipe.budget or math.inf
    if budget < math.inf:
        rough = distributed.broadcast_object(step_seconds(built, _SLICE))
        if rough * (_WARM + 2) * 2 > ROUGH * budget:  # whole steps would take too much of the budget
            return rough, growth(built, _SLICE)[0][1] if until else 1.0
    full = _timed(built, built.total - 1, limit)
    small = min(full, _timed(built, 0, limit)) if until else full
    return full * (1 - until) + small * until, small / full


def _timed(built: RunComponents, step: int, seconds: float) -> float:
    """Return the median seconds of a step at a position of the run, timed for this many seconds after the warm-up."""
    times: list[float] = []
    began = time.perf_counter()
    for batch in _batches(built):
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
    return bool(distributed.broadcast_object(time.perf_counter() - start + expected <= min(SHARE * budget, MOST)))


def _batch(recipe: Recipe, source: Source) -> int:
    """Return the preset's batch size, or the largest power of two that does not exceed the number of images."""
    return max(2, min(recipe.batch_size, 1 << len(source).bit_length() - 1))


def _decodable(
    data: Any, given: Settings, recipe: Recipe, source: Source, download: bool, budget: float, notes: list[str]
) -> tuple[Recipe, Source]:
    """Return the recipe and source with as many images as can be decoded in a share of the budget."""
    if recipe.subset is not None:
        return recipe, source
    each = distributed.broadcast_object(_decode_seconds(source, 2 * recipe.image_size))
    most = int(DECODED * budget / each) if each > 0 else len(source)
    if len(source) <= most:
        return recipe, source
    most = max(2, most)
    notes.append(
        f"Learning from {most:,} of {len(source):,} images, drawn by a fixed seed: decoding all of them takes about "
        f"{duration(each * len(source))}. A longer budget takes more of them."
    )
    return resolve_recipe(
        data, given | {"subset": most, "image_size": recipe.image_size, "batch_size": recipe.batch_size}, download
    )


def _decode_seconds(source: Source, canvas: int) -> float:
    """Return the seconds to decode one image on all cores, estimated from evenly spaced images."""
    chosen = torch.linspace(0, len(source) - 1, min(16, len(source))).long().tolist()
    began, done = time.perf_counter(), 0
    for i in chosen:
        try:
            with source.open(i) as picture:
                picture.tensor(canvas)
            done += 1
        except DataError:
            continue  # counted and reported when all images are read
    return (time.perf_counter() - began) / max(1, done) / cores()
