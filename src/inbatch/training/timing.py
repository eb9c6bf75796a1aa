"""Estimate the duration of a run before its first epoch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from inbatch.errors import many
from inbatch.models.network import NEVER_FUSED, Network, frozen_statistics
from inbatch.runtime import distributed
from inbatch.runtime.threads import beside_others
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents, build
from inbatch.training.mixing import stand_ins
from inbatch.training.registry import Part

_SAMPLES = 16
"""Number of samples in the timed slice of a batch; a ResNet-50 takes seconds for it."""
_DAY = 86400.0
SMALLER = ("resnet18", "resnet10", "fast")
"""Encoders that take less time, in decreasing order of cost."""


def step_seconds(built: RunComponents, samples: int = _SAMPLES) -> float:
    """Return the approximate seconds of a training step, averaged over the run, from a small slice of a batch.

    The run is not changed. The slice runs forward and backward through the network, and forward through a target
    network. Its second pass is timed and scaled to the batch; views, loss and optimiser are small compared with it. The
    passes in which near duplicates are found and views are curated are added.

    Args:
        built: The run.
        samples: Number of samples in the slice; fewer are faster to time and less exact.
    """
    until = built.recipe.grow_until
    with beside_others(built.loader.device):
        full = _step_seconds(built, 1.0, samples)
        return full * (1 - until) + (_step_seconds(built, built.recipe.grow_from, samples) * until if until else 0.0)


def growth(built: RunComponents, samples: int = _SAMPLES) -> list[tuple[float, float]]:
    """Return [(share of the run, relative cost of its steps)] while images are reduced, for `budget.Pace`."""
    until = built.recipe.grow_until
    if not until:
        return []
    small, full = (_step_seconds(built, scale, samples) for scale in (built.recipe.grow_from, 1.0))
    return [(until, min(1.0, small / full))]


def plain_share(built: RunComponents, samples: int = _SAMPLES) -> float:
    """Return the cost of a step without curation, relative to one with it."""
    if built.step.curator is None:
        return 1.0
    return 1 - _extra_seconds(built, 1.0, samples)[1] / _step_seconds(built, 1.0, samples)


def _extra_seconds(built: RunComponents, scale: float, samples: int) -> tuple[float, float]:
    """Return the seconds of a step in which near duplicates are found, and in which views are curated."""
    step, side, curator = built.step, built.recipe.image_size, built.step.curator
    similar = float(step.similar is not None and step.similar.embeds())
    every = sum((view.size / side) ** 2 for view in built.views.views)
    curated = 0.0 if curator is None else every * (1 + curator.redraws())
    if not similar and not curated:
        return 0.0, 0.0
    share, device = built.recipe.batch_size // distributed.world(), built.loader.device
    images = torch.zeros(min(samples, share), built.recipe.channels, side, side, device=device)

    def work() -> float:
        began = time.perf_counter()
        built.network.forward([images], [NEVER_FUSED])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        frozen_statistics(built.network),
        scaled(built.network, scale),
        torch.no_grad(),
    ):
        work()
        each = work() * share / len(images)
    return each * similar, each * curated


def _step_seconds(built: RunComponents, scale: float, samples: int = _SAMPLES) -> float:
    """Return the seconds of a training step at one scale of the images, with curation, if any."""
    share = built.recipe.batch_size // distributed.world()
    count = min(samples, share)
    sizes = [view.size for view in built.views.views]
    device = built.loader.device
    devices = [device] if device.type == "cuda" else []

    def rows(network: Network, numbers: list[int], grad: bool) -> list[Tensor]:
        views = [torch.randn(count, built.recipe.channels, size, size, device=device) for size in sizes]
        images, unfused = stand_ins(built.step.mixer, views, numbers)
        with frozen_statistics(network), scaled(network, scale), torch.set_grad_enabled(grad):
            return list(network.forward(images, unfused).values())

    def work() -> float:
        began = time.perf_counter()
        with frozen_statistics(built.network):  # also while activations are computed again
            learned = rows(built.network, built.step.online_views(), grad=True)
            if built.target is not None:
                rows(built.target, list(built.method.target_views(len(sizes))), grad=False)
            torch.autograd.backward(learned, [torch.ones_like(x) for x in learned])
        built.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with torch.random.fork_rng(devices=devices):
        work()
        seconds = work()
    again = 4 / 3 if built.step.groups > 1 else 1.0  # one additional forward pass
    return seconds * share / count * again + sum(_extra_seconds(built, scale, samples))


@contextmanager
def scaled(network: Network, scale: float) -> Iterator[None]:
    """Set the image scale of the network inside the context."""
    before, network.scale = network.scale, scale
    try:
        yield
    finally:
        network.scale = before


def expectation(built: RunComponents, seconds: float, done: int = 0) -> str:
    """Return a sentence on the duration of the remaining steps, and a suggestion if it exceeds a day."""
    left = built.total - done
    total = left * seconds
    text = (
        f"Expected: about {duration(total)} for {many(left, 'step')} of about {_short(seconds)}, evaluation not counted"
    )
    if total > _DAY and built.recipe.budget is None:
        text += "; --budget 1h fits it into an hour"
    return text + "."


def smaller_choices(built: RunComponents) -> list[tuple[str, float]]:
    """Return (setting, seconds of the whole run) of encoders that take less time than that of this run."""
    now, choices = step_seconds(built) * built.total, []
    after = SMALLER.index(built.encoder.name) + 1 if built.encoder.name in SMALLER else 0
    for name in SMALLER[after:]:
        recipe = replace(
            built.recipe, encoder=Part(name), attend=None, fuse=None, curate=None, negatives=None, mix=None
        )
        other = step_seconds(build(recipe, built.source, device=built.loader.device, loader=built.loader))
        if other * built.total < 0.8 * now:
            choices.append((f"--encoder {name}", other * built.total))
    return choices


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.95 else f"{seconds:.1f} s" if seconds < 90 else duration(seconds)
