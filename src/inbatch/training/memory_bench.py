"""Memory of a training step with a context group of a given size: counted, and measured by a dry step.

A dry step is the part of a training step that runs the networks, on random images and a temporary copy of the run. It
changes no weight, no norm statistic and no random number of the caller, and writes nothing.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data import Source
from inbatch.data.loader import PIECE, processes
from inbatch.data.resident import estimate, resides
from inbatch.models.network import norms
from inbatch.runtime import distributed
from inbatch.runtime.memory import forget_peak, free_bytes, peak, release_memory, used_bytes
from inbatch.runtime.resources import launched
from inbatch.training.build import RunComponents, build
from inbatch.training.mixing import stand_ins
from inbatch.training.negatives import embeds
from inbatch.training.recipe import Recipe
from inbatch.training.size_estimate import estimate as count

MARGIN = 1.5
"""Ratio of a step's memory to what a forward pass keeps, assumed until a step is measured."""
FULL = 2**62
"""Bytes that stand for a step that ran out of memory."""


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


class MemoryBench:
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
        own = MemoryProbe(FULL, 0, 0.0, False) if probe is None else probe
        needed, kept = distributed.all_reduce_max(own.needed), distributed.all_reduce_max(own.kept)
        micros = distributed.all_reduce_max(-1 if own.seconds is None else round(1e6 * own.seconds))
        norm = bool(distributed.all_reduce_max(int(own.norm)))
        return MemoryProbe(needed, kept, None if micros < 0 else micros / 1e6, norm)

    def _try(self, context: int, dry: bool) -> MemoryProbe:
        release_memory(self.device)
        before, most, seconds = used_bytes(self.device), None, None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.enable_grad():
            built = build(replace(self.recipe, context=context), self.source, device=self.device, workers=0)
            memory = count(built)["memory_bytes_estimate"]
            side = self._count_batch_bytes(built, memory)
            growing = memory["activations_of_a_group"] + memory["views_of_a_group"]
            counted = memory["sum"] - memory["pixels_of_a_batch"] - memory["rows_of_a_batch"]
            if dry and before is not None:
                samples = context // (self.world if self.recipe.sync_norm else 1)
                # From here on, gradients and optimiser state are allocated. Halves of 4 samples have norm statistics.
                dry_step(built, min(samples, 4), side, plain=True)
                forget_peak(self.device)
                began = time.perf_counter()
                dry_step(built, samples, side)
                most, seconds = max(0, peak(self.device) - before), time.perf_counter() - began
        needed = max(counted, most) if most is not None else counted + (MARGIN - 1) * growing
        return MemoryProbe(self.batch + max(self.next, round(needed)), growing, seconds, bool(norms(built.network)))

    def _count_batch_bytes(self, built: RunComponents, memory: dict[str, int]) -> int:
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
            size = each if self.recipe.curate or embeds(self.recipe, self.source) else crops
            pixels = size * (share + 2 * workers * min(share, PIECE))  # two pieces wait in each worker
            self.next = size * share
        else:
            pixels = 0  # in host memory until the group is processed
        if self.recipe.shuffle_groups and self.world > 1:  # samples of a group lie on several ranks: all views are held
            pixels += 4 * crops * (2 * share + self.recipe.batch_size)
        self.batch = pixels + memory["rows_of_a_batch"]
        return max(1, min(canvas, math.isqrt(each // channels)))


def predict(tried: dict[int, MemoryProbe], context: int) -> int:
    """Return the bytes of a group: as measured, or by a straight line through the last two smaller groups."""
    if context in tried:
        return tried[context].needed
    below = sorted(c for c in tried if c < context)
    if not below:
        return min(trial.needed for trial in tried.values())
    last = below[-1]
    slope = MARGIN * tried[last].kept / last
    if len(below) > 1:
        a, b = tried[below[-2]], tried[last]
        slope = max(b.needed - a.needed, b.kept - a.kept) / (last - below[-2])
    return min(FULL, tried[last].needed + math.ceil(slope * (context - last)))


def free_device_bytes(device: torch.device) -> int:
    """Return the free bytes for this rank on the device of its step: GPU memory, else main memory."""
    near = launched("LOCAL_WORLD_SIZE", distributed.world())  # ranks on this machine
    if device.type != "cuda":
        return free_bytes(device, near)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process's allocator
    return torch.cuda.mem_get_info(device)[0] // math.ceil(near / torch.cuda.device_count()) + kept


def dry_step(built: RunComponents, samples: int, side: int, plain: bool = False) -> None:
    """Run the networks' part of a training step on one group of random images; if `plain`, without fusion."""
    device, channels = built.loader.device, built.recipe.channels
    pixels = torch.randint(0, 256, (samples, channels, side, side), dtype=torch.uint8, device=device)
    index = torch.arange(samples, device=device)
    views = built.views(Batch(index, torch.zeros_like(index), images=pixels)).images

    def rows(network: Any, numbers: list[int]) -> list[Tensor]:
        images, unfused = stand_ins(built.step.mixer, views, numbers)
        return list(network.forward(images, unfused if plain else numbers).values())

    learned = rows(built.network, built.step.online_views())
    if built.target is not None:
        with torch.no_grad():
            rows(built.target, list(built.method.target_views(len(views))))
    built.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(learned, [torch.ones_like(x) for x in learned])
    built.optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
