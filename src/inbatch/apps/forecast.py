"""Estimate the duration of `inbatch quickstart` and the result of an hour's budget (`inbatch doctor`)."""

import math
import time
from typing import Any

import torch

from inbatch.apps import quickstart
from inbatch.training.advice import Finding
from inbatch.training.budget import duration
from inbatch.training.build import build
from inbatch.training.calibration import TRAINED, time_steps
from inbatch.training.resolve import resolve_recipe

REST = 23.0
"""Seconds of `inbatch quickstart` without its steps: startup, evaluation and plots, measured on two AVX2 cores."""
_EACH = 2.0
"""Seconds for which steps at one image size are timed."""


def forecast(until: float = math.inf) -> list[Finding]:
    """Return the estimated duration of `inbatch quickstart` and the steps of an hour's budget, from a few real steps.

    Args:
        until: Time limit by `time.monotonic`; an estimate that has not begun by then is omitted.
    """
    both = (("quickstart", _quickstart), ("a budget of 1 h", _hour))
    return [
        Finding(what, estimate() if time.monotonic() < until else "not measured: no time is left")
        for what, estimate in both
    ]


def _quickstart() -> str:
    total, each, _ = _steps(quickstart.DATA, {"epochs": quickstart.EPOCHS} | quickstart.SETTINGS)
    return f"about {duration(total * each + REST)}"


def _hour() -> str:
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    _, seconds, batch = _steps(images, {"preset": "fast", "steps": 100, "epochs": 100})
    steps = int(TRAINED * 3600.0 / seconds)
    return (
        f"about {steps:,} steps of {batch} images, {steps * batch / 1e6:,.1f} million images of 32 pixels, with the "
        f"encoder fast ({seconds:.2f} s a step)"
    )


def _steps(data: Any, settings: dict[str, Any]) -> tuple[int, float, int]:
    """Return the number of steps of a run, the seconds of one step, and the images per batch."""
    recipe, source = resolve_recipe(data, settings)
    built = build(recipe, source, device=torch.device("cpu"))
    return built.total, time_steps(built, _EACH), recipe.batch_size
