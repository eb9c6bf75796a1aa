"""The learning rates of a step."""

from torch.optim import Optimizer

from inbatch.nn.schedules import step_decay, warmup_cosine
from inbatch.training.budget import Timeline
from inbatch.training.optim import set_learning_rate
from inbatch.training.recipe import Recipe


def set_rates(recipe: Recipe, steps: int, timeline: Timeline, optimizer: Optimizer, step: int) -> None:
    """Set the learning rates of a step; a pure function of its position (`steps`: steps per epoch)."""
    s, total, place = recipe.schedule, timeline.planned, timeline.place(step)
    # At most a tenth of a run with a length in steps; `recipe.make` ensures it for a length in epochs.
    warmup = min(s.warmup_epochs * steps, total / 10) if recipe.steps else s.warmup_epochs * steps
    if s.name == "cosine" or place < warmup:
        factor = warmup_cosine(place, total, warmup, 1.0, s.end)
    else:
        factor = step_decay(place, 1.0, [m * total for m in s.milestones]) if s.name == "step" else 1.0
    set_learning_rate(optimizer, factor)
