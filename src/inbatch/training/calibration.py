"""From a budget of time to a recipe: real steps of candidate encoders on this data and this machine decide."""

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
"""Calibration takes at most this share of the budget, and at most so many seconds."""
WIDTHS = (24, 32, 48)
"""Of the encoder `fast`, narrowest first: the candidates of a budget."""
WORTH = {24: 0, 32: 700_000, 48: 4_000_000}
"""Views from which on a width pays (docs/fast.md)."""
TRAINED = 0.85
"""Share of the budget that training gets in the plan; start, evaluation and checkpoints take the rest."""
DECODED = 0.15
"""Share of the budget that decoding may take before the first step; of larger sets a part is learned from."""
SHORTEST = 10.0
"""Seconds that calibration takes about at least: building an encoder and four steps at each size of the images."""
ROUGH = 0.15
"""Share of the budget above which whole steps are not made before the run: a slice of one says how long they take."""
FEWEST, FEW = 5, 20
"""Steps below which a budget is refused, and below which a run is said to be too short to learn much."""
_SLICE = 4
"""Samples of that slice."""
_LOOKS = 8
_WARM = 2
"""Steps that are made before one is timed: memory is asked for, and views are compiled."""


@dataclass(frozen=True)
class Candidate:
    """An encoder that was tried.

    seconds: of a step, on the mean of the run. steps: that fit into the budget. views: seen by then. small: what a step
    costs while images are small, relative to one at full size.
    """

    name: str
    seconds: float
    steps: int
    views: int
    small: float = 1.0


@dataclass(frozen=True)
class Choice:
    """What a budget is spent on, and why. loader: for the run to use again."""

    recipe: Recipe
    chosen: Candidate
    tried: tuple[Candidate, ...]
    seconds: float
    notes: tuple[str, ...]
    loader: Loader
    asked: bool

    def sentences(self) -> list[str]:
        """Lines for the user: what was chosen, from what, and why."""
        r, c = self.recipe, self.chosen
        tried = "; ".join(f"{x.name}: {x.seconds:.2f} s a step, {x.views:,} views" for x in self.tried)
        why = "as asked" if self.asked else "the widest that sees enough views"
        return [
            *self.notes,
            f"Budget of {duration(r.budget or 0)}: {c.name} ({why}), {r.size} pixels, batch {r.batch}, {c.steps:,} "
            f"steps of about {c.seconds:.2f} s, {c.steps / self.loader.steps:.3g} passes over the images. "
            f"Calibrated in {duration(self.seconds)} ({tried}).",
        ]

    def json(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return {
            "seconds": self.seconds, "chosen": self.chosen.name, "small": self.chosen.small,
            "tried": [asdict(one) for one in self.tried], "notes": list(self.notes),
        }  # fmt: skip


def plan_budget(
    data: Any, given: Settings, began: float, *, device: torch.device, workers: int | None, download: bool,
    tell: Callable[[str], None] = lambda sentence: None,
) -> tuple[Choice, Source]:  # fmt: skip
    """Return the recipe that spends a budget best here, and the data opened.

    given: settings, of which "budget" is one. What they say (encoder, size, batch, method, ...) stays as it is.
    began: when the command began (`time.perf_counter`). tell: gets a sentence on rank 0 before steps are timed.
    Every rank must call it, and all get the same.
    """
    check_one_length(given)
    given, notes = dict(given), list[str]()
    chosen_by_user = any(given.get(key) is not None for key in ("encoder.name", "encoder.width", "preset"))
    if given.get("encoder.name", "fast") == "fast":
        given.setdefault("preset", "fast")
    recipe, source = resolve_recipe(data, given, download)
    budget = recipe.budget or 0.0
    if given.get("size") is None and recipe.preset == "fast":
        given["size"] = small_size(source, device)
        recipe = make(given | {"data": recipe.data, "channels": recipe.channels})
    recipe, source = _decodable(data, given, recipe, source, download, budget, notes)
    given |= {"data": recipe.data, "channels": recipe.channels, "size": recipe.size, "subset": recipe.subset}
    given["batch"] = recipe.batch if given.get("batch") is not None else _batch(recipe, source)

    widths = [{}] if chosen_by_user else [{"encoder.width": width} for width in WIDTHS]
    limit = min(SHARE * budget, MOST)
    if distributed.rank() == 0:
        tell(f"Budget of {duration(budget)}: timing real steps, for about {duration(max(limit, SHORTEST))}.")
    limit /= 12  # two sizes of up to three encoders, twice over
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
                f"budget = {duration(budget)} is too short for {built.encoder.name}, {recipe.size} pixels and batch "
                f"{built.recipe.batch}: a step takes about {seconds:,.1f} s. Leave out encoder and preset, set a "
                f"smaller batch, or give at least {duration(max(2 * budget, 40 * seconds))}"
            )
        steps = max(1, steps)
        views = steps * built.recipe.batch * len(built.views)
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
    settings["schedule.warmup"] = given.get("schedule.warmup", round(0.05 * candidate.steps / loader.steps, 6))
    names = tuple(one for one, _ in tried)
    return Choice(
        make(settings), candidate, names, time.perf_counter() - start, tuple(notes), loader, chosen_by_user
    ), source


def _in_memory(recipe: Recipe, source: Source, device: torch.device, workers: int | None) -> tuple[Recipe, str]:
    """The recipe with a context that fits in memory, before any step is made, and a sentence if one was looked for."""
    recipe, fitted = resolve(recipe, source, device, workers)
    if fitted is not None:
        return recipe, fitted.sentence()
    return within_memory(recipe, source, device, workers)


def small_size(source: Source, device: torch.device) -> int:
    """Return the side of the images that a budget on a processor affords: their own up to 64 pixels, else 64."""
    natural = natural_size(source)
    return natural if natural <= 64 or device.type != "cpu" else 64


def time_steps(built: RunComponents, limit: float) -> float:
    """Return the mean seconds of a step over the run: real steps on the first batches, small images and full ones.

    limit: seconds that steps of one size are made; each is made four times at least.
    """
    with beside_others(built.loader.device):
        return _both(built, limit)[0]


def _both(built: RunComponents, limit: float) -> tuple[float, float]:
    """The mean seconds of a step, and the cost of one on small images relative to one at full size."""
    until, budget = built.recipe.grow_until, built.recipe.budget or math.inf
    if budget < math.inf:
        rough = distributed.broadcast_object(step_seconds(built, _SLICE))
        if rough * (_WARM + 2) * 2 > ROUGH * budget:  # whole steps would take too much of it
            return rough, growth(built, _SLICE)[0][1] if until else 1.0
    full = _timed(built, built.total - 1, limit)
    small = min(full, _timed(built, 0, limit)) if until else full
    return full * (1 - until) + small * until, small / full


def _timed(built: RunComponents, step: int, seconds: float) -> float:
    """Seconds of a step at a place of the run: the median of those made in so many seconds, after some that warm up."""
    times: list[float] = []
    began = time.perf_counter()
    for batch in _batches(built):
        start = time.perf_counter()
        float(built.step(batch, step)["loss"])  # reading it waits for the device
        times.append(time.perf_counter() - start)
        # Ranks make the same number of steps: rank 0 says when it is enough.
        if distributed.broadcast_object(len(times) > _WARM + 1 and time.perf_counter() - began > seconds):
            break
    return median(times[_WARM:])


def _batches(built: RunComponents) -> Iterator[Batch]:
    """Batches of the first epochs, again and again: a small set has one to an epoch."""
    for epoch in count():
        yield from built.loader.epoch(epoch, stop=8)


def _time_for_another(start: float, last: float, budget: float) -> bool:
    """Whether another, larger encoder can be timed within the limit; rank 0 decides."""
    expected = 3.0 * last * (_WARM + 2)
    return bool(distributed.broadcast_object(time.perf_counter() - start + expected <= min(SHARE * budget, MOST)))


def _batch(recipe: Recipe, source: Source) -> int:
    """The preset's batch, or the largest power of two that the images fill."""
    return max(2, min(recipe.batch, 1 << len(source).bit_length() - 1))


def _decodable(
    data: Any, given: Settings, recipe: Recipe, source: Source, download: bool, budget: float, notes: list[str]
) -> tuple[Recipe, Source]:
    """As many of the images as can be decoded in a share of the budget."""
    if recipe.subset is not None:
        return recipe, source
    each = distributed.broadcast_object(_decode_seconds(source, 2 * recipe.size))
    most = int(DECODED * budget / each) if each > 0 else len(source)
    if len(source) <= most:
        return recipe, source
    most = max(2, most)
    notes.append(
        f"Learning from {most:,} of {len(source):,} images, drawn by a fixed seed: decoding all of them takes about "
        f"{duration(each * len(source))}. A longer budget takes more of them."
    )
    return resolve_recipe(data, given | {"subset": most, "size": recipe.size, "batch": recipe.batch}, download)


def _decode_seconds(source: Source, canvas: int) -> float:
    """Seconds that one image takes to decode on all cores, by some that are spread evenly."""
    chosen = torch.linspace(0, len(source) - 1, min(16, len(source))).long().tolist()
    began, done = time.perf_counter(), 0
    for i in chosen:
        try:
            with source.open(i) as picture:
                picture.tensor(canvas)
            done += 1
        except DataError:
            continue  # counted and named where all images are read
    return (time.perf_counter() - began) / max(1, done) / cores()
