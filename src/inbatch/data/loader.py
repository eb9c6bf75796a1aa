"""Data loader: batches from device memory for small sources, streamed through worker processes otherwise."""

from collections.abc import Iterator, Mapping
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from inbatch import rng
from inbatch.batch import REPEATED, Batch
from inbatch.data.pieces import checked, put
from inbatch.data.resident import SHARE, Resident, check_different, check_dropped, estimate, hold, remark, resides
from inbatch.data.samplers import Sampler, earlier_occurrences
from inbatch.data.sequential import StreamReader
from inbatch.data.source import Source
from inbatch.data.streams import Sequential, Tally, check_epoch, plan_streams
from inbatch.data.workers import (
    Boxes,
    CanvasDataset,
    CropDataset,
    Drawer,
    DrawnDataset,
    Order,
    SampleReader,
    check_shared_memory,
    end_workers,
    may_not_start_workers,
    stream,
)
from inbatch.errors import DataError, check_whole, many
from inbatch.runtime import distributed
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.resources import cores

PIECE = 256  # images per message from a worker; larger batches are assembled from several pieces


class Loader:
    """Iterate over this rank's local batches of every global batch.

    An epoch visits the samples in the order `rng.permutation(seed, epoch, n)`, or in that of a sampler. The tail that
    does not fill a global batch is dropped, so a sample never occurs twice in a batch. Rank r takes the r-th slice of
    each global batch. Batches depend only on (seed, epoch, step, world), not on the number of workers or on the step at
    which an epoch starts.

    The pixels of streamed batches stay in host memory; the consumer copies the part that it needs to the device.

    Args:
        source: Images to load.
        batch: Global batch size; must be divisible by `world`.
        views: Crop boxes and output sizes of the views.
        seed: Seed of the sample order and of the crops.
        device: Device that receives the batches.
        rank: Rank of this process.
        world: Number of ranks.
        resident: True keeps decoded images on the device, False streams them through `workers` processes. None decides
            by the free memory of the rank that has least; every rank must then create its loader. The two give other
            pixels (crops are resized by other code), so a run keeps the choice in its recipe.
        workers: Number of decoding processes; None derives it from the CPU cores.
        canvas: Maximum longer side of resident images in pixels, by default twice the largest view.
        whole: Also deliver streamed images uncropped on such a canvas, so that views can be drawn again.
        drawer: Draws the views of whole images in the workers; on a CPU also those of resident images.
        max_bad: Maximum fraction of unreadable images. Resident images that are unreadable are left out from the start.
            A streamed image that is unreadable is replaced by the image at the same position of the next batch.
        sampler: Composes the batches; None for a random order.
        read: Read tar or Parquet files from beginning to end, in the order of a `StreamPlan`; images are then streamed,
            and not by a sampler. None reads images by their index.

    Attributes:
        source: Images that are loaded, without the images left out.
        steps: Number of batches per epoch.
        workers: Number of decoding processes, 0 if resident.
        bad: Unreadable images encountered so far: {image number: reason}.
        remarks: Numbers of the streamed images so far with a remark, by its key in `image_file.REMARKS`.
        plan: Order in which shards are read; None if images are read by their index.

    Raises:
        DataError: If `batch` is not divisible by `world`, if the source has fewer images than one batch or if too many
            images are unreadable.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        views: Boxes,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        resident: bool | None = None,
        workers: int | None = None,
        canvas: int | None = None,
        whole: bool = False,
        drawer: Drawer | None = None,
        max_bad: float = 0.01,
        sampler: Sampler | None = None,
        read: Sequential | None = None,
    ):
        if batch < 1 or batch % world:
            raise DataError(f"A batch of {batch} cannot be shared by {world} processes: use a multiple of {world}")
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.device = torch.device(device)
        canvas = canvas or 2 * max(view.size for view in views.views)
        needed, free = estimate(source, canvas), free_bytes(self.device, world)
        self.max_bad = max_bad
        self.held: Resident | None = None
        self.bad: dict[int, str] = {}
        self.remarks: dict[str, set[int]] = {}
        self._reported: set[str] = set()
        self.plan = None if read is None else plan_streams(source, batch, seed, world, read)
        resident = False if self.plan else resident
        fits = resides(needed, free, None)
        if resident is None:
            resident = not distributed.all_reduce_max(int(not fits)) if world > 1 else fits
        if resident:
            self.held = hold(source, self.device, canvas=canvas, max_bad=max_bad)
            source = self.held.source
            check_different(self.held)
        self.source, self.steps = source, len(source) // batch
        if not self.steps and len(source) == 1:
            raise DataError(f"{source.name} has 1 image: the images of a batch learn from each other, give two or more")
        if not self.steps:
            raise DataError(
                f"{source.name} has {len(source):,} images, fewer than one batch of {batch:,}: "
                f"use a batch of at most {len(source):,}, or more images"
            )
        self.sampler = sampler
        if sampler is not None:
            sampler.prepare(source, batch, seed)
            self.steps = sampler.steps
        self._labels = source.labels.to(self.device)
        self._groups = None if source.groups is None else source.groups.to(self.device)
        self._why = f"{needed / 1e6:,.0f} MB decoded, {free / 1e9:,.1f} GB free, limit {SHARE:.0%} of it" + (
            "" if resident == fits else f", cache_on_device = {str(resident).lower()}"
        )
        self.workers = self.drawers = 0
        self._order = Order()
        if self.held is None:
            self._read_in_workers(views, workers, canvas, whole, drawer)
        elif drawer is not None and self.device.type == "cpu":
            self._draw_in_workers(self.held, views, workers, drawer)

    def _draw_in_workers(self, held: Resident, views: Boxes, workers: int | None, drawer: Drawer) -> None:
        """Start the processes that draw the views of decoded images."""
        self.drawers = processes(workers, self.world)
        outputs = 4 * sum(view.size**2 for view in views.views)
        check_shared_memory(min(PIECE, self.batch // self.world) * self.source.channels * outputs, self.drawers)
        if self.drawers:
            drawn = DrawnDataset(held.images, held.size, drawer, self.seed)
            self._start(stream(drawn, self._order, self.drawers, self.device, pinned=False))

    def _read_in_workers(
        self, views: Boxes, workers: int | None, canvas: int, whole: bool, drawer: Drawer | None
    ) -> None:
        """Start the processes that read and decode images, of which they return the views' crops or the whole."""
        source, batch, shared, attempts = self.source, self.batch, None, None
        self.workers = processes(workers, self.world)
        if self.plan is not None:
            self.workers = self.plan.workers(self.rank, self.world, PIECE, self.workers)
        self._cuts = self._pieces()
        if self.sampler is not None:
            shared = torch.zeros(self.steps * batch, dtype=torch.long).share_memory_()
            attempts = torch.zeros_like(shared).share_memory_() if self.sampler.repeats else None
        self._shared, self._shared_attempts = shared, attempts
        reader = (
            SampleReader(source, self.seed, batch, shared, attempts) if self.plan is None
            else StreamReader(source, self.plan)
        )  # fmt: skip
        dataset = CanvasDataset(reader, canvas, drawer) if whole else CropDataset(reader, views)
        self._pin = self.device.type == "cuda"
        outputs = sum(view.size**2 for view in views.views)
        pixels = canvas**2 + (4 * outputs if drawer else 0) if whole else outputs
        check_shared_memory(min(PIECE, batch // self.world) * source.channels * pixels, self.workers)
        pinned = self._pin and len(self._cuts) == 1  # other batches are pinned when they are assembled
        self._start(stream(dataset, self._order, self.workers, self.device, pinned))

    def _start(self, stream: DataLoader[Any]) -> None:
        """Keep a stream, and end its workers when the loader is closed or collected."""
        self._stream = stream
        self._ended = Finalize(self, end_workers, (stream,), exitpriority=10)

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Iterate over the batches of an epoch on the device, from step `start` to `stop` (default: its end)."""
        steps = range(self.steps)[start:stop]
        return self._resident(epoch, steps) if self.held else self._streamed(epoch, steps)

    def note(self, bad: Mapping[int, str]) -> None:
        """Record unreadable images; raise DataError if their fraction exceeds `max_bad`."""
        if not bad:  # the case for nearly every piece
            return
        self.bad.update(bad)
        check_dropped(self.source, tuple(self.bad.items()), self.max_bad)

    def close(self) -> None:
        """Stop the worker processes, if any; a loader that has some cannot be used afterwards."""
        if self.held is None or self.drawers:
            self._ended()

    def unreadable(self) -> list[str]:
        """Return one sentence per image left out, as far as known."""
        return list(self.held.dropped) if self.held else list(self.bad.values())

    def add_remarks(self, remarks: Mapping[str, set[int]]) -> None:
        """Record remarks about streamed images."""
        for key, numbers in remarks.items():
            self.remarks.setdefault(key, set()).update(numbers)

    def new_remarks(self) -> list[str]:
        """Return a sentence for every kind of remark about streamed images, the first time that there are any."""
        new = [key for key in self.remarks if key not in self._reported]
        self._reported.update(new)
        return [f"{remark(key, len(self.remarks[key]))} (said once)" for key in new]

    def report(self) -> str:
        """Return a text report: the source, how and why images are held, and which were left out or scaled down."""
        lines = [self.source.report()]
        if self.held:
            n, c, h, w = self.held.images.shape
            lines.append(f"resident: {many(n, 'image')} of {c}x{h}x{w} on {self.device} ({self._why})")
            lines.extend([f"views drawn by {many(self.drawers, 'worker')}"] if self.drawers else [])
            lines.extend(self.held.notes)
            if self.held.scaled:
                lines.append(f"{many(self.held.scaled, 'image')} scaled down to a longer side of {max(h, w)} pixels")
            lines.extend(f"left out: {reason}" for reason in self.held.dropped)
        else:
            lines.append(f"streamed by {many(self.workers, 'worker')} ({self._why})")
            lines += [] if self.plan is None else [self.plan.report(self.world)]
        return "\n".join(lines)

    def _images(self, epoch: int) -> Tensor:
        """Return the numbers of the images of an epoch, batch by batch."""
        if self.sampler is not None:
            return self.sampler.order(epoch)
        return rng.permutation(self.seed, epoch, len(self.source))

    def _attempts(self, order: Tensor) -> Tensor | None:
        """Return the number of the first draw at each position of an order; None if no image is repeated."""
        if self.sampler is None or not self.sampler.repeats:
            return None
        return REPEATED * earlier_occurrences(order)

    def _share(self, step: int) -> range:
        """Return the positions in the epoch's order that form this rank's local batch."""
        share = self.batch // self.world
        first = step * self.batch + self.rank * share
        return range(first, first + share)

    def _resident(self, epoch: int, steps: range) -> Iterator[Batch]:
        assert self.held is not None
        images = self._images(epoch)
        attempts, order = self._attempts(images), images.to(self.device)
        drawn = self._drawn(epoch, images, attempts, steps) if self.drawers else None
        attempts = None if attempts is None else attempts.to(self.device)
        for step in steps:
            places = slice(self._share(step).start, self._share(step).stop)
            index = order[places]
            yield Batch(
                crops=None if drawn is None else next(drawn),
                index=index,
                label=self._labels[index],
                seed=self.seed,
                epoch=epoch,
                images=self.held.images,
                at=index,
                size=self.held.size[index],
                attempt=None if attempts is None else attempts[places],
                group=None if self._groups is None else self._groups[index],
            )

    def _drawn(self, epoch: int, order: Tensor, attempts: Tensor | None, steps: range) -> Iterator[tuple[Tensor, ...]]:
        """Yield the views of each batch of resident images, drawn by workers."""
        both = torch.stack([order, torch.zeros_like(order) if attempts is None else attempts], 1)
        shares = [both[places.start : places.stop] for places in map(self._share, steps)]
        self._order.keys = [(epoch, part.tolist()) for share in shares for part in share.split(PIECE)]
        pieces = iter(self._stream)
        for share in shares:
            parts = [checked(next(pieces)).fields["crops"] for _ in share.split(PIECE)]
            yield tuple(torch.cat(views) for views in zip(*parts, strict=True))

    def _pieces(self) -> list[slice]:
        """Return the parts of a local batch that are one message of a worker each."""
        share = self.batch // self.world
        if self.plan is not None:
            return self.plan.cuts(self.rank, self.world, max(1, self.workers), PIECE)
        return [slice(first, first + PIECE) for first in range(0, share, PIECE)]

    def _streamed(self, epoch: int, steps: range) -> Iterator[Batch]:
        share, cuts, tally = self.batch // self.world, self._cuts, Tally()
        if self._shared is not None:
            self._shared.copy_(order := self._images(epoch))
            if (attempts := self._attempts(order)) is not None and self._shared_attempts is not None:
                self._shared_attempts.copy_(attempts)
        self._order.keys = [(epoch, self._share(step)[cut]) for step in steps for cut in cuts]
        pieces = iter(self._stream)
        for _ in steps:
            fields: dict[str, Any] = {}
            for cut in cuts:
                piece = checked(next(pieces))
                self.note(piece.bad)
                self.add_remarks(piece.remarks)
                tally += piece.read
                fields = piece.fields if len(cuts) == 1 else put(piece.fields, cut.start, fields, share, self._pin)
            index, groups = fields["index"], self.source.groups
            group = None if groups is None else groups[index]
            batch = Batch(**fields, label=self.source.labels[index], group=group, seed=self.seed, epoch=epoch)
            yield batch.to(self.device, pixels=False)
        if self.plan is not None and steps.stop == self.steps:
            check_epoch(tally, self.plan.expected(epoch, self.rank, self.world, steps.start), self.rank, epoch)


def processes(workers: int | None, world: int) -> int:
    """Return the number of decoding processes per rank: as requested, else by the CPU cores, or 0 in a daemon.

    Raises:
        ConfigError: If the requested number is not a whole number from 0.
    """
    if workers is None:
        return 0 if may_not_start_workers() else max(1, min(16, cores() // world))
    check_whole("workers", workers, 0)
    return workers
