"""Decide the recipe of a run from settings, images, time budget and machine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from inbatch.data import Loader, Source
from inbatch.training.auto_context import ContextSize, resolve, within_memory
from inbatch.training.budget_plan import Choice, plan_budget
from inbatch.training.recipe import Recipe, Settings
from inbatch.training.requested_settings import needs_plan, requested_data, with_default_budget
from inbatch.training.resolve import resolve_recipe
from inbatch.training.run_encoder import with_encoder_of_init


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
        images: Signature of the images of a resumed run, in its checkpoint; None without one.
    """

    recipe: Recipe
    source: Source
    data: Any
    choice: Choice | None = None
    context: ContextSize | None = None
    memory: str = ""
    here: Recipe | None = None
    images: str | None = None

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
    recipe, context = resolve(plan.recipe, plan.source, device, workers)
    memory = ""
    if check_memory and plan.choice is None:
        recipe, memory = within_memory(recipe, plan.source, device, workers)
    return replace(plan, recipe=recipe, context=context, memory=memory)
