"""Resolve `context: auto`: find the largest context group for which a training step fits in memory, by dry steps.

A dry step is the part of a training step that runs the networks, on random images and a temporary copy of the run. It
changes no weight, no norm statistic and no random number of the caller, and writes nothing. Small groups are measured,
a straight line through them predicts the largest group that fits, and that group is measured as well.
"""

import gc
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data import Source
from inbatch.data.loader import PIECE, processes, resides
from inbatch.data.resident import estimate
from inbatch.errors import ConfigError
from inbatch.models.network import norms
from inbatch.runtime import distributed
from inbatch.runtime.memory import forget_peak, free_bytes, held, peak, settle
from inbatch.runtime.resources import launched
from inbatch.training.build import RunComponents, build, local_batch_size
from inbatch.training.recipe import Recipe
from inbatch.training.summary import estimate as count

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
_MARGIN = 1.5
"""Ratio of a step's memory to what a forward pass keeps, assumed until a step is measured."""
_FULL = 2**62
"""Bytes that stand for a step that ran out of memory."""


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
        meets: Samples of a group interact before the loss (batch norm, plug-ins).
    """

    context: int
    share: int
    needed: int
    free: int
    larger: tuple[int, int | None] | None
    how: str
    noisy: bool
    meets: bool

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
        if self.meets:
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


@dataclass(frozen=True)
class MemoryProbe:
    """Memory of one group size.

    Attributes:
        needed: Bytes of everything that is held at once.
        kept: Bytes that grow with the group, as counted.
        seconds: Duration of the dry step; None if there was none.
        norm: The networks have batch norm.
    """

    needed: int
    kept: int
    seconds: float | None = None
    norm: bool = False


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
    free = -distributed.all_reduce_max(-room(device))
    needed = _Bench(recipe, source, device, workers).trial(context, dry=False).needed
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
    free = -distributed.all_reduce_max(-room(device))
    limit, bench = int(LIMIT * free), _Bench(recipe, source, device, workers)
    tried: dict[int, MemoryProbe] = {}

    def climb(top: int, goal: int) -> int:
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

    together = (
        recipe.sync_norm and distributed.world() > 1
    )  # a rank that runs out of memory would leave the others waiting
    how = "found by a dry step"
    while True:
        best = max(c for c in sizes if predict(tried, c) <= limit)
        top = max(c for c in tried if tried[c].needed <= limit)
        if best > top:
            step = climb(top, best)
        else:  # near the limit a prediction is not reliable: measure the next group as well if memory permits
            step = next((c for c in sizes if c > best), best)
            if step in tried or trial.seconds is None or predict(tried, step) > free:
                break
        if together or (tried[top].seconds or 0) * step / top > PATIENCE:
            how = how if best == top else "predicted by dry steps of smaller groups"
            break
        tried[step] = bench.trial(step)
    if trial.seconds is None:
        how = f"counted with a margin of {100 * (_MARGIN - 1):.0f} %, as this system does not report peak memory"
    settle(device)
    larger = next((c for c in sizes if c > best), None)
    more = predict(tried, larger) if larger else 0
    return ContextSize(
        context=best, share=local_batch_size(recipe, distributed.world()), needed=predict(tried, best), free=free,
        how=how,
        larger=(larger, more if more < _FULL else None) if larger else None, noisy=trial.norm and best < SMALL,
        meets=trial.norm or recipe.fuse is not None or recipe.attend is not None,
    )  # fmt: skip


def predict(tried: dict[int, MemoryProbe], context: int) -> int:
    """Return the bytes of a group: as measured, or by a straight line through the last two smaller groups."""
    if context in tried:
        return tried[context].needed
    below = sorted(c for c in tried if c < context)
    if not below:
        return min(trial.needed for trial in tried.values())
    last = below[-1]
    slope = _MARGIN * tried[last].kept / last
    if len(below) > 1:
        a, b = tried[below[-2]], tried[last]
        slope = max(b.needed - a.needed, b.kept - a.kept) / (last - below[-2])
    return min(_FULL, tried[last].needed + math.ceil(slope * (context - last)))


def room(device: torch.device) -> int:
    """Return the free bytes for this rank on the device of its step: GPU memory, else main memory."""
    near = launched("LOCAL_WORLD_SIZE", distributed.world())  # ranks on this machine
    if device.type != "cuda":
        return free_bytes(device, near)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process's allocator
    return torch.cuda.mem_get_info(device)[0] // math.ceil(near / torch.cuda.device_count()) + kept


class _Bench:
    """Measure the memory of context groups.

    Attributes:
        batch: Bytes that do not depend on the group: images, waiting pieces, rows.
        next: Bytes of the next batch, which is assembled between two steps.
    """

    def __init__(self, recipe: Recipe, source: Source, device: torch.device, workers: int | None) -> None:
        self.recipe = replace(recipe, compile=False, cache_on_device=False)  # no image is decoded for a dry step
        self.source, self.device, self.batch, self.next = source, device, 0, 0
        self.world, self.workers, self.resident = distributed.world(), workers, recipe.cache_on_device
        self.free = free_bytes(device, self.world)  # the same value as the loader uses

    def trial(self, context: int, dry: bool = True) -> MemoryProbe:
        """Count the memory that a group keeps and, if `dry`, measure a step; the largest values of all ranks."""
        try:
            probe = self._try(context, dry)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            probe = None
        # Every rank takes part in these reductions, including one that ran out of memory, so that all continue with the
        # same figures.
        own = MemoryProbe(_FULL, 0, 0.0, False) if probe is None else probe
        needed, kept = distributed.all_reduce_max(own.needed), distributed.all_reduce_max(own.kept)
        micros = distributed.all_reduce_max(-1 if own.seconds is None else round(1e6 * own.seconds))
        norm = bool(distributed.all_reduce_max(int(own.norm)))
        return MemoryProbe(needed, kept, None if micros < 0 else micros / 1e6, norm)

    def _try(self, context: int, dry: bool) -> MemoryProbe:
        settle(self.device)
        before, most, seconds = held(self.device), None, None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.enable_grad():
            built = build(replace(self.recipe, context=context), self.source, device=self.device, workers=0)
            memory = count(built)["memory_bytes_estimate"]
            side = self._weigh(built, memory)
            growing = memory["activations_of_a_group"] + memory["views_of_a_group"]
            counted = memory["sum"] - memory["pixels_of_a_batch"] - memory["rows_of_a_batch"]
            if dry and before is not None:
                samples = context // (self.world if self.recipe.sync_norm else 1)
                _dry_step(built, 2, side, plain=True)  # from here on, gradients and optimiser state are allocated
                forget_peak(self.device)
                began = time.perf_counter()
                _dry_step(built, samples, side)
                most, seconds = max(0, peak(self.device) - before), time.perf_counter() - began
        needed = max(counted, most) if most is not None else counted + (_MARGIN - 1) * growing
        return MemoryProbe(self.batch + max(self.next, round(needed)), growing, seconds, bool(norms(built.network)))

    def _weigh(self, built: RunComponents, memory: dict[str, int]) -> int:
        """Count the bytes that do not depend on the group; return the side of the images from which views are drawn."""
        sizes = [view.size for view in built.views.views]
        canvas, channels = 2 * max(sizes), self.source.channels
        decoded = estimate(self.source, canvas)
        each = decoded // len(self.source)  # uint8 pixels of one image, or the crops that workers cut from it
        crops = sum(channels * size * size for size in sizes)
        share = self.recipe.batch_size // self.world
        if resides(decoded, self.free, self.resident):
            pixels = decoded
        elif self.device.type == "cpu":
            workers = processes(self.workers, self.world)
            size = each if self.recipe.curate else crops
            pixels = size * (share + 2 * workers * min(share, PIECE))  # two pieces wait in each worker
            self.next = size * share
        else:
            pixels = 0  # in host memory until the group is processed
        if self.recipe.shuffle_groups and self.world > 1:  # samples of a group lie on several ranks: all views are held
            pixels += 4 * crops * (2 * share + self.recipe.batch_size)
        self.batch = pixels + memory["rows_of_a_batch"]
        return max(1, min(canvas, math.isqrt(each // channels)))


def _dry_step(built: RunComponents, samples: int, side: int, plain: bool = False) -> None:
    """Run the networks' part of a training step on one group of random images; if `plain`, without fusion."""
    device, channels = built.loader.device, built.recipe.channels
    pixels = torch.randint(0, 256, (samples, channels, side, side), dtype=torch.uint8, device=device)
    index = torch.arange(samples, device=device)
    views = built.views(Batch(index, torch.zeros_like(index), images=pixels)).images
    online_views, target_views = (
        list(pick(len(views))) for pick in (built.method.online_views, built.method.target_views)
    )

    def rows(network: Any, numbers: list[int]) -> list[Tensor]:
        return list(network.forward([views[v] for v in numbers], [-1] * len(numbers) if plain else numbers).values())

    learned = rows(built.network, online_views)
    if built.target is not None:
        with torch.no_grad():
            rows(built.target, target_views)
    built.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(learned, [torch.ones_like(x) for x in learned])
    built.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _nothing_fits(recipe: Recipe, context: int, needed: int, batch: int, free: int) -> str:
    takes = "runs out of memory" if needed >= _FULL else f"takes {_gb(needed)}"
    return (
        f"context = auto: even a group of {context:,} {takes} ({_gb(batch)} of it for the images and rows of a batch "
        f"of {recipe.batch_size:,}), and {100 * LIMIT:.0f} % of the {_gb(free)} free may be taken: free some memory, "
        "or use a smaller encoder, smaller images (image_size), a smaller batch, or precision bf16"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
