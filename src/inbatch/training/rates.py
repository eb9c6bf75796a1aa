"""The learning rates of a step, and the steps in which the encoder does not learn."""

from torch.optim import Optimizer

from inbatch.errors import ConfigError, many
from inbatch.nn.schedules import step_decay, warmup_cosine
from inbatch.training.budget import Timeline
from inbatch.training.optim import set_learning_rate
from inbatch.training.recipe import Recipe


def set_rates(recipe: Recipe, steps: int, timeline: Timeline, optimizer: Optimizer, step: int) -> None:
    """Set the learning rates of a step; a pure function of its position (`steps`: steps per epoch)."""
    s, total, place = recipe.schedule, timeline.planned, timeline.place(step)
    warmup = warmup_steps(recipe, steps, total)
    if s.name == "cosine" or place < warmup:
        factor = warmup_cosine(place, total, warmup, 1.0, s.end)
    else:
        factor = step_decay(place, 1.0, [m * total for m in s.milestones]) if s.name == "step" else 1.0
    set_learning_rate(optimizer, factor)


def warmup_steps(recipe: Recipe, steps: int, planned: int) -> float:
    """Return the number of steps of the warm-up: at most a tenth of a run with a length in steps.

    `recipe.make` limits a warm-up that is not set in the same way if the length is in epochs.

    Args:
        recipe: The recipe.
        steps: Steps per epoch.
        planned: Steps of the run, before a budget changes its length.

    Raises:
        ConfigError: If the warm-up is longer than the run.
    """
    epochs = recipe.schedule.warmup_epochs
    warmup = min(epochs * steps, planned / 10) if recipe.steps else epochs * steps
    if warmup > planned:
        raise ConfigError(
            f"schedule.warmup_epochs = {epochs:g} is longer than the run of {many(recipe.epochs, 'epoch')}: choose "
            "fewer epochs for it, or a longer run"
        )
    return warmup


def frozen_steps(recipe: Recipe, steps: int, planned: int) -> int:
    """Return the number of steps at the start in which the encoder does not learn.

    Args:
        recipe: The recipe.
        steps: Steps per epoch.
        planned: Steps of the run, before a budget changes its length.

    Raises:
        ConfigError: If these are all steps of the run.
    """
    epochs = recipe.schedule.freeze_encoder_epochs
    frozen = round(min(epochs * steps, planned / 10 if recipe.steps else epochs * steps))
    if frozen >= planned:
        raise ConfigError(
            f"schedule.freeze_encoder_epochs = {epochs:g} freezes the encoder in all {many(planned, 'step')} of the "
            "run: choose fewer epochs for it, or a longer run"
        )
    return frozen


def logged_rate(optimizer: Optimizer, lr: float) -> float:
    """Return the learning rate of a step: of the parameters whose rate before the schedule is `lr`."""
    groups = [group for group in optimizer.param_groups if group["base_lr"] == lr and not group["constant"]]
    rate: float = (groups or optimizer.param_groups)[0]["lr"]
    return rate
