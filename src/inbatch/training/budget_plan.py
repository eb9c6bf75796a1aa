"""The recipe that makes the best use of a time budget on this machine."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from inbatch.data import Loader, Source
from inbatch.runtime import distributed
from inbatch.training.budget import duration
from inbatch.training.calibration import SHORTEST, Candidate, calibrate, decode_seconds, limit_seconds
from inbatch.training.image_size import small_size
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.requested_settings import check_one_length
from inbatch.training.resolve import resolve_recipe

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
