"""Decide the recipe of a run from settings, images, time budget and machine."""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.data import Loader, Source, open_data
from inbatch.data.views import own_views, sizes_of
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import distributed, own_parts
from inbatch.runtime.remote import public
from inbatch.training.auto_context import ContextSize, resolve, within_memory
from inbatch.training.budget import duration
from inbatch.training.calibration import SHORTEST, Candidate, calibrate, decode_seconds, limit_seconds
from inbatch.training.image_size import natural_size, small_size
from inbatch.training.presets import default_method, method_named
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.registry import shown
from inbatch.training.requested_settings import (
    check_one_length,
    chosen_reading,
    needs_plan,
    requested_data,
    with_default_budget,
)
from inbatch.training.run_encoder import with_encoder_of_init

DECODED = 0.15
"""Share of the budget that decoding may take before the first step; larger data sets are subsampled."""
SHORT_RUN = 20
"""Number of steps below which the user is warned that a run with a budget is short."""
_EVALUATIONS = 8
"""Number of online evaluations of a run with a budget."""


@dataclass(frozen=True)
class Choice:
    """The recipe chosen for a budget, and the timings behind it; `loader` is for the run to reuse."""

    recipe: Recipe
    chosen: Candidate
    tried: tuple[Candidate, ...]
    seconds: float
    notes: tuple[str, ...]
    loader: Loader
    encoder_requested: bool

    def sentences(self) -> list[str]:
        """Return lines for the user: the choice, the candidates and the reason."""
        r, c = self.recipe, self.chosen
        tried = "; ".join(f"{x.name}: {x.seconds:.2f} s a step, {x.views:,} views" for x in self.tried)
        why = "as requested" if self.encoder_requested else "the widest with enough views"
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
            "plain": self.chosen.plain, "survey": self.chosen.survey,
            "tried": [asdict(one) for one in self.tried], "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class RunPlan:
    """The recipe of a run and its images.

    Attributes:
        recipe: The complete recipe.
        source: Images to train on.
        data: Data that `source` was opened from.
        choice: How the recipe was chosen for its budget; None without a budget.
        context: The context size, if it was searched for.
        memory: A sentence if the context was reduced to fit in memory, else empty.
        here: The recipe of a resumed run with the paths at which its data are now; None if they are as in `recipe`.
    """

    recipe: Recipe
    source: Source
    data: Any
    choice: Choice | None = None
    context: ContextSize | None = None
    memory: str = ""
    here: Recipe | None = None

    @property
    def loader(self) -> Loader | None:
        """The loader of a calibration, to be reused; else None."""
        return self.choice.loader if self.choice else None


def plan_run(
    data: Any, settings: Settings, *, device: torch.device, workers: int | None, download: bool, began: float,
    configured: bool, notify: Callable[[str], None] = lambda sentence: None,
) -> RunPlan:  # fmt: skip
    """Return the recipe of a new run, except a context that must be searched for (`with_context`), and its images.

    Args:
        data: Data to learn from; None for those of the settings.
        settings: Requested settings.
        device: Device of the networks.
        workers: Number of processes that decode images.
        download: Whether missing data may be downloaded.
        began: Start time of the command (`time.perf_counter`).
        configured: The settings come from a file, which defines the run.
        notify: Called with a sentence on rank 0 before steps are timed for a budget.
    """
    data = requested_data(data, settings)
    settings = with_encoder_of_init(with_default_budget(settings, data, device, configured))
    if not needs_plan(settings):
        return plan_without_budget(data, settings, download)
    choice, source = plan_budget(
        data, settings, began, device=device, workers=workers, download=download, notify=notify
    )
    return RunPlan(choice.recipe, source, data, choice)


def plan_without_budget(data: Any, settings: Settings, download: bool = False) -> RunPlan:
    """Return the recipe of a new run as `plan_run` does, but do not plan for a time budget."""
    data, settings = requested_data(data, settings), with_encoder_of_init(settings)
    recipe, source = resolve_recipe(data, settings, download)
    return RunPlan(recipe, source, data)


def with_context(plan: RunPlan, device: torch.device, workers: int | None, check_memory: bool = False) -> RunPlan:
    """Return the plan with a number for `context: auto`; every rank must call it.

    Args:
        plan: The plan.
        device: Device of the networks.
        workers: Number of processes that decode images.
        check_memory: Also reduce a context that is not set and does not fit in memory; a budget has done that already.

    Raises:
        ConfigError: If the context that the recipe sets does not fit in memory, or no context does.
    """
    if plan.recipe.shard and distributed.world() > 1:
        if plan.recipe.context == "auto":
            raise ConfigError(
                "shard and context = auto exclude each other: a rank that runs out of memory in a dry step leaves the "
                "others waiting; set a number (inbatch pretrain --dry-run states the memory)"
            )
        return plan
    recipe, context = resolve(plan.recipe, plan.source, device, workers)
    memory = ""
    if check_memory and plan.choice is None:
        recipe, memory = within_memory(recipe, plan.source, device, workers)
    return replace(plan, recipe=recipe, context=context, memory=memory)


def resolve_recipe(data: Any, settings: Mapping[str, Any], download: bool = False) -> tuple[Recipe, Source]:
    """Return the complete recipe and the opened data; size, channels and preset depend on the images."""
    settings = dict(settings)
    source = open_data(
        data,
        str(settings.get("split", "train")),
        subset=None if settings.get("subset") is None else _whole("subset", settings["subset"]),
        channels=None if settings.get("channels") is None else _whole("channels", settings["channels"]),
        **{
            key: None if settings.get(key) is None else str(settings[key])
            for key in ("classes", "image_column", "label_column", "group_column")
        },
        levels=_levels(settings.get("levels")),
        download=download,
    )
    settings |= chosen_reading(settings, data)
    settings["data"] = public(str(data)) if isinstance(data, str | Path) else source.name
    settings["channels"] = source.channels
    _set_sizes(settings, source)
    if settings.get("image_size") is None:
        method, preset = method_named(default_method(settings)), settings.get("preset")
        own = method.presets.get(preset, {}) if isinstance(preset, str) else {}
        settings["image_size"] = own.get("image_size") or natural_size(source)
    recipe = make(settings)
    if settings.get("preset") is None and settings.get("batch_size") is None:
        # The batch of a paper was not requested: use one that these images fill and a laptop can hold. The learning
        # rate scales with it.
        recipe = make(settings | {"batch_size": max(2, min(recipe.batch_size, 256, 1 << len(source).bit_length() - 1))})
    return recipe, source


def _set_sizes(settings: Settings, source: Source) -> None:
    """Set the sides of the user's own views, and the image size to the largest of them if it is not set."""
    name = settings.get("views.name")
    own = own_parts.find("views", name)
    if own is None or settings.get("views.sizes") is not None:
        return
    options = {key.removeprefix("views."): value for key, value in settings.items() if key.startswith("views.")}
    del options["name"]
    if own_parts.is_maker("views", own.maker) and "size" in inspect.signature(own.maker).parameters:
        settings["image_size"] = settings.get("image_size") or natural_size(source)
        options.setdefault("size", settings["image_size"])
    views = own_views(str(name), options)
    settings["views.sizes"] = sizes_of(views, _first_image(source), str(name))
    settings["image_size"] = settings.get("image_size") or max(settings["views.sizes"])


def _first_image(source: Source) -> Tensor:
    """Return the first image that can be read; DataError if none can."""
    for i in range(len(source)):
        with suppress(DataError):
            return source.image(i)
    return source.image(0)


def _levels(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"levels = {shown(value)}: give two numbers, the lower one first, such as [0, 4095]")
    return low, high


def _whole(key: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} = {shown(value)}: input should be a whole number") from None


def plan_budget(
    data: Any, settings: Settings, began: float, *, device: torch.device, workers: int | None, download: bool,
    notify: Callable[[str], None] = lambda sentence: None,
) -> tuple[Choice, Source]:  # fmt: skip
    """Return the recipe that makes the best use of a budget on this machine, and the opened data.

    Every rank must call it, and all get the same result.

    Args:
        data: Data to learn from, as for `open_data`.
        settings: Settings, including "budget". Values in them (encoder, size, batch, method, ...) are not changed.
        began: Start time of the command (`time.perf_counter`).
        device: Device of the networks.
        workers: Number of processes that decode images.
        download: Whether missing data may be downloaded.
        notify: Called with a sentence on rank 0 before steps are timed.
    """
    check_one_length(settings)
    settings, notes = dict(settings), list[str]()
    encoder_requested = any(settings.get(key) is not None for key in ("encoder.name", "encoder.width", "preset"))
    if settings.get("encoder.name", "fast") == "fast":
        settings.setdefault("preset", "fast")
    recipe, source = resolve_recipe(data, settings, download)
    budget = recipe.budget or 0.0
    if settings.get("image_size") is None and recipe.preset == "fast":
        settings["image_size"] = small_size(source, device)
        recipe = make(settings | {"data": recipe.data, "channels": recipe.channels})
    recipe, source = _decodable(data, settings, recipe, source, download, notes)
    settings |= {
        "data": recipe.data,
        "channels": recipe.channels,
        "image_size": recipe.image_size,
        "subset": recipe.subset,
    }
    settings["batch_size"] = recipe.batch_size if settings.get("batch_size") is not None else _batch(recipe, source)

    if distributed.rank() == 0:
        seconds = max(limit_seconds(budget), SHORTEST)
        notify(f"Budget of {duration(budget)}: timing real steps, for about {duration(seconds)}.")
    timed = calibrate(settings, not encoder_requested, source, budget, began, device=device, workers=workers)
    best, per_epoch = timed.best, timed.loader.steps
    notes += filter(None, (timed.note, best.note))
    if best.candidate.steps < SHORT_RUN:
        notes.append(
            f"The budget leaves time for {best.candidate.steps} steps only: the preset fast, a smaller batch or a "
            "longer budget make more."
        )
    recipe = make(best.settings | planned_length(settings, best.candidate.steps, per_epoch))
    tried = tuple(trial.candidate for trial in timed.trials)
    return Choice(recipe, best.candidate, tried, timed.seconds, tuple(notes), timed.loader, encoder_requested), source


def planned_length(settings: Settings, steps: int, per_epoch: int) -> Settings:
    """Return the length of a run with a budget, and the settings that follow from it unless they are requested.

    Args:
        settings: Requested settings.
        steps: Number of steps that fit into the budget.
        per_epoch: Number of steps in an epoch.
    """
    epochs = max(1, -(-steps // per_epoch))
    return {
        "steps": steps,
        "epochs": epochs,
        "evaluate_every": settings.get("evaluate_every") or max(1, round(epochs / _EVALUATIONS)),
        "checkpoint_every": settings.get("checkpoint_every") or max(1, round(epochs / 20)),
        "schedule.warmup_epochs": settings.get("schedule.warmup_epochs", round(0.05 * steps / per_epoch, 6)),
    }


def _batch(recipe: Recipe, source: Source) -> int:
    """Return the preset's batch size, or the largest power of two that does not exceed the number of images."""
    return max(2, min(recipe.batch_size, 1 << len(source).bit_length() - 1))


def _decodable(
    data: Any, settings: Settings, recipe: Recipe, source: Source, download: bool, notes: list[str]
) -> tuple[Recipe, Source]:
    """Return the recipe and source with as many images as can be decoded in a share of the budget."""
    if recipe.subset is not None:
        return recipe, source
    budget = recipe.budget or 0.0
    each = distributed.broadcast_object(decode_seconds(source, 2 * recipe.image_size))
    most = int(DECODED * budget / each) if each > 0 else len(source)
    if len(source) <= most:
        return recipe, source
    most = max(2, most)
    notes.append(
        f"Learning from {most:,} of {len(source):,} images, drawn by a fixed seed: decoding all of them takes about "
        f"{duration(each * len(source))}. A longer budget takes more of them."
    )
    return resolve_recipe(
        data, settings | {"subset": most, "image_size": recipe.image_size, "batch_size": recipe.batch_size}, download
    )
