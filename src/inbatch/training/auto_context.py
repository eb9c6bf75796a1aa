"""Resolve `context: auto`: find the largest context group for which a training step fits in memory, by dry steps.

Small groups are measured (`memory_bench`), a straight line through them predicts the largest group that fits, and that
group is measured as well.
"""

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from inbatch.context.mixing import MIXERS
from inbatch.data import Source
from inbatch.errors import ConfigError
from inbatch.runtime import distributed
from inbatch.runtime.memory import release_memory
from inbatch.training.build_checks import local_batch_size
from inbatch.training.memory_bench import FULL, MARGIN, MemoryBench, MemoryProbe, free_device_bytes, predict
from inbatch.training.recipe import Recipe

LIMIT = 0.8
"""Largest share of the free memory that a step may take: allocators leave gaps, and other programs need memory."""
PATIENCE = 20.0
"""Longest time in seconds of one dry step; a group that would take longer is predicted, not measured."""
SMALL = 32
"""Number of samples below which batch norm statistics are noisy, and the user is warned."""

_FIRST, _SECOND = 8, 32
"""Largest number of samples in the first and in the second measurement."""
_CLIMB, _CAREFUL = 8, 2
"""Largest growth factor between two dry steps; the second applies with plug-ins, which may have quadratic cost."""


@dataclass(frozen=True)
class ContextSize:
    """A context group that fits in memory.

    Attributes:
        context: Number of samples in the group.
        share: Number of samples that the context divides: a rank's local batch, or the global batch with sync_norm.
        needed: Bytes that one rank holds during training.
        free: Bytes that are free for one rank.
        larger: The next larger group and its bytes (None if it ran out of memory); None if there is no larger group.
        how: Whether the group itself was measured, as text.
        noisy: Batch norm has few samples per group.
        mixes_samples: Samples of a group interact before the loss (batch norm, plug-ins).
    """

    context: int
    share: int
    needed: int
    free: int
    larger: tuple[int, int | None] | None
    how: str
    noisy: bool
    mixes_samples: bool

    def sentence(self) -> str:
        """Return one line for the user: the context, the reason, its cost, and how to repeat the run."""
        took = f"{_gb(self.needed)} of {_gb(self.free)} free (limit {100 * LIMIT:.0f} %)"
        text = f"context: {self.context:,} of {self.share:,}, {self.how}: {took}"
        if self.larger is not None:
            group, needed = self.larger
            text += f"; {group:,} would " + ("run out of memory" if needed is None else f"take {_gb(needed)}")
        text += "."
        if self.context < self.share:
            text += " One more forward pass per group: about 1.3 times the time per image."
        if self.noisy:
            text += f" Norm statistics of fewer than {SMALL} samples are noisy: a smaller encoder gives more memory."
        if self.mixes_samples:
            text += (
                " The context affects results if samples interact (batch norm, plug-ins): "
                f"to repeat this run on another machine, set context={self.context}."
            )
        return text

    def json(self) -> dict[str, Any]:
        """Return the same information as a dictionary for --json."""
        group, needed = self.larger or (None, None)
        return {
            "context": self.context, "share": self.share, "how": self.how, "needed_bytes": self.needed,
            "free_bytes": self.free, "limit": LIMIT, "larger": group, "larger_needed_bytes": needed,
        }  # fmt: skip


def resolve(
    recipe: Recipe, source: Source, device: torch.device, workers: int | None = None
) -> tuple[Recipe, ContextSize | None]:
    """Return the recipe with a number for `context: auto`, and how it was found; other recipes unchanged, and None.

    Every rank must call it, and all get the same result.

    Raises:
        ConfigError: If not even the smallest group fits.
    """
    if recipe.context != "auto":
        return recipe, None
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()  # the garbage collector then only scans what the dry steps allocate
    try:
        size = fit(recipe, source, device, workers)
    finally:
        if not frozen:
            gc.unfreeze()
    return replace(recipe, context=size.context), size


def within_memory(
    recipe: Recipe, source: Source, device: torch.device, workers: int | None = None
) -> tuple[Recipe, str]:
    """Return the recipe with a context that fits in the free memory, and a sentence if it had to be made smaller.

    The estimate costs one small forward pass; no image is decoded. A context that the recipe sets is not changed.
    Every rank must call it, and all get the same result.

    Raises:
        ConfigError: If the context that the recipe sets does not fit, or no context does.
    """
    if recipe.context == "auto":
        return recipe, ""
    requested, share = recipe.context is not None, local_batch_size(recipe, distributed.world())
    context = int(recipe.context) if isinstance(recipe.context, int) else share
    free = -distributed.all_reduce_max(-free_device_bytes(device))
    needed = MemoryBench(recipe, source, device, workers).trial(context, dry=False).needed
    if needed <= (free if requested else LIMIT * free):
        return recipe, ""
    if requested:
        raise ConfigError(
            f"this run takes about {_gb(needed)}, and {_gb(free)} of memory are free: set a smaller context "
            "(--context auto finds one), a smaller encoder, size or batch, or free some memory"
        )
    smaller, size = resolve(replace(recipe, context="auto"), source, device, workers)
    assert size is not None
    return smaller, (
        f"Memory: with the whole batch at once this run takes about {_gb(needed)}, and {_gb(free)} are free: the "
        f"context is {size.context:,} instead of {share:,}. " + size.sentence()
    )


def candidates(recipe: Recipe, world: int) -> list[int]:
    """Return the contexts that are valid for a recipe on `world` ranks, smallest first.

    Raises:
        ConfigError: If there is none.
    """
    share, apart = local_batch_size(recipe, world), world if recipe.sync_norm else 1
    apart *= MIXERS[recipe.mix.name].parts if recipe.mix else 1
    least = max(2 * apart, recipe.fuse.options.get("bottleneck", 0) if recipe.fuse else 0)
    sizes = [c for c in range(least, share + 1) if share % c == 0 and c % apart == 0]
    if recipe.shuffle_groups:  # a single group cannot be shuffled
        sizes = [c for c in sizes if c < recipe.batch_size]
    if not sizes:
        raise ConfigError(f"context = auto: no group of {least} samples or more divides {share:,}: use another batch")
    return sizes


def fit(recipe: Recipe, source: Source, device: torch.device, workers: int | None = None) -> ContextSize:
    """Return the largest group that divides a rank's share of the batch and trains within `LIMIT` of the free memory.

    The ranks agree: the bytes needed are those of the rank that needs most, the free bytes those of the rank that has
    least.

    Args:
        recipe: Recipe with `context: auto`.
        source: Images to train on.
        device: Device of the networks.
        workers: Number of processes that will decode images; they hold batches as well.

    Raises:
        ConfigError: If not even the smallest group fits.
    """
    sizes = candidates(recipe, distributed.world())
    free = -distributed.all_reduce_max(-free_device_bytes(device))
    limit, bench = int(LIMIT * free), MemoryBench(recipe, source, device, workers)
    tried: dict[int, MemoryProbe] = {}

    def next_group(top: int, goal: int) -> int:
        """Return the next group to measure between one that fits and one that should fit."""
        most = top * (_CLIMB if recipe.fuse is None and recipe.attend is None else _CAREFUL)
        near = [c for c in sizes if top < c <= min(goal, most)]
        return near[-1] if near else next(c for c in sizes if c > top)

    first = max((c for c in sizes if c <= _FIRST), default=sizes[0])
    while True:  # a step that cannot fit is counted, not run
        trial = bench.trial(first, dry=False)
        if trial.needed <= free:
            trial = tried[first] = bench.trial(first)
        smaller = [c for c in sizes if c < first]
        if trial.needed <= limit:
            break
        if not smaller:
            raise ConfigError(_nothing_fits(recipe, first, trial.needed, bench.batch, free))
        first = smaller[-1]
    # The straight line needs two points.
    second = [c for c in sizes if first < c <= _SECOND and predict(tried, c) <= limit]
    if trial.seconds is not None and (second or smaller):
        at = (second or smaller)[-1]
        tried[at] = bench.trial(at)

    # A rank that runs out of memory would leave the others waiting.
    together = (recipe.sync_norm or recipe.shard) and distributed.world() > 1
    how = "found by a dry step"
    while True:
        best = max(c for c in sizes if predict(tried, c) <= limit)
        top = max(c for c in tried if tried[c].needed <= limit)
        if best > top:
            step = next_group(top, best)
        else:  # near the limit a prediction is not reliable: measure the next group as well if memory permits
            step = next((c for c in sizes if c > best), best)
            if step in tried or trial.seconds is None or predict(tried, step) > free:
                break
        if together or (tried[top].seconds or 0) * step / top > PATIENCE:
            how = how if best == top else "predicted by dry steps of smaller groups"
            break
        tried[step] = bench.trial(step)
    if trial.seconds is None:
        how = f"counted with a margin of {100 * (MARGIN - 1):.0f} %, as this system does not report peak memory"
    release_memory(device)
    larger = next((c for c in sizes if c > best), None)
    more = predict(tried, larger) if larger else 0
    return ContextSize(
        context=best, share=local_batch_size(recipe, distributed.world()), needed=predict(tried, best), free=free,
        how=how,
        larger=(larger, more if more < FULL else None) if larger else None, noisy=trial.norm and best < SMALL,
        mixes_samples=trial.norm or any(part is not None for part in (recipe.fuse, recipe.attend, recipe.mix)),
    )  # fmt: skip


def _nothing_fits(recipe: Recipe, context: int, needed: int, batch: int, free: int) -> str:
    takes = "runs out of memory" if needed >= FULL else f"takes {_gb(needed)}"
    return (
        f"context = auto: even a group of {context:,} {takes} ({_gb(batch)} of it for the images and rows of a batch "
        f"of {recipe.batch_size:,}), and {100 * LIMIT:.0f} % of the {_gb(free)} free may be taken: free some memory, "
        "or use a smaller encoder, smaller images (image_size), a smaller batch, or precision bf16"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
