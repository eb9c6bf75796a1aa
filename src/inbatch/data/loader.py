"""Batches from a source: out of device memory if it is small, else streamed through worker processes."""

import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from inbatch import draws
from inbatch.batch import Batch
from inbatch.data.resident import SHARE, Resident, estimate, hold, stack
from inbatch.data.source import Source, Want
from inbatch.errors import DataError
from inbatch.limits import cores
from inbatch.machine import free_bytes

_OPEN = 32  # images a worker holds open at once: few files, and one draw of boxes for all of them
PIECE = 256  # images that a worker hands over at once: larger batches are put together of pieces


@runtime_checkable
class Boxes(Protocol):
    """The part of `views.Views` that is needed here: where to crop, and each view's `size` and `interpolation`."""

    @property
    def views(self) -> Sequence[Any]: ...

    def boxes(
        self, index: Int[Tensor, "b"], size: Int[Tensor, "b 2"], seed: int, epoch: int, attempt: int = 0
    ) -> Int[Tensor, "v b 4"]: ...


class Loader:
    """This rank's share of every global batch, epoch by epoch.

    An epoch visits the samples in the order `draws.permutation(seed, epoch, n)`; the tail that fills no whole
    global batch is left out, so no sample stands twice in a batch; rank r takes the r-th slice of each batch.
    Batches depend on (seed, epoch, step, world) only, never on workers or on where an epoch was begun.

    batch: the global batch size. resident: images live decoded on the device (True), are streamed through
    `workers` processes (False), or whichever the free memory allows (None). canvas: the longer side that resident
    images may have, twice the largest view by default. whole: streamed images come on such a canvas, too, uncropped,
    so that views can be drawn again. max_bad: share of unreadable images that may be left out when resident; a streamed
    one raises DataError when its turn comes.
    Pixels of streamed batches stay in the host's memory, for whoever needs some of them to take them to the device.

    `source` is what is loaded (without the images left out), `steps` the number of batches in an epoch, `workers` the
    processes that decode (0 where resident).
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
        max_bad: float = 0.01,
    ):
        if batch < 1 or batch % world:
            raise DataError(f"A batch of {batch} cannot be shared by {world} processes: use a multiple of {world}")
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.device = torch.device(device)
        canvas = canvas or 2 * max(view.size for view in views.views)
        needed, free = estimate(source, canvas), free_bytes(self.device, world)
        self.held: Resident | None = None
        if resides(needed, free, resident):
            self.held = hold(source, self.device, canvas=canvas, max_bad=max_bad)
            source = self.held.source
            _differ(self.held)
        self.source, self.steps = source, len(source) // batch
        if not self.steps:
            raise DataError(
                f"{source.name} has {len(source):,} images, fewer than one batch of {batch:,}: "
                f"use a batch of at most {len(source):,}, or more images"
            )
        self._labels = source.labels.to(self.device)
        self._why = f"{needed / 1e6:,.0f} MB decoded, {free / 1e9:,.1f} GB free, limit {SHARE:.0%} of it" + (
            ", as asked" if resident is not None else ""
        )
        self.workers = 0
        if self.held is None:
            self.workers = processes(workers, world)
            self._order = _Order()
            made = _Canvases(source, canvas) if whole else _Crops(source, views, seed)
            self._pin = self.device.type == "cuda"
            pinned = self._pin and batch // world <= PIECE  # larger ones are pinned when they are put together
            self._stream = _stream(made, self._order, self.workers, self.device, pinned)

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch on the device, from step `start` up to `stop` (its end by default)."""
        order = draws.permutation(self.seed, epoch, len(self.source))[: self.steps * self.batch]
        share = self.batch // self.world
        mine = order.view(self.steps, self.batch)[start:stop, self.rank * share : (self.rank + 1) * share]
        return self._resident(epoch, mine) if self.held else self._streamed(epoch, mine)

    def report(self) -> str:
        """For people: the source, how its images are held and why, and what was left out or scaled down."""
        lines = [self.source.report()]
        if self.held:
            n, c, h, w = self.held.images.shape
            lines.append(f"resident: {n:,} images of {c}x{h}x{w} on {self.device} ({self._why})")
            lines.extend(self.held.notes)
            if self.held.scaled:
                lines.append(f"{self.held.scaled:,} images scaled down to a longer side of {max(h, w)} pixels")
            lines.extend(f"left out: {reason}" for reason in self.held.dropped)
        else:
            lines.append(f"streamed by {self.workers} workers ({self._why})")
        return "\n".join(lines)

    def _resident(self, epoch: int, mine: Int[Tensor, "s b"]) -> Iterator[Batch]:
        assert self.held is not None
        for index in mine.to(self.device):
            yield Batch(
                index=index,
                label=self._labels[index],
                seed=self.seed,
                epoch=epoch,
                images=self.held.images,
                at=index,
                size=self.held.size[index],
            )

    def _streamed(self, epoch: int, mine: Int[Tensor, "s b"]) -> Iterator[Batch]:
        self._order.epoch, self._order.mine = epoch, mine
        pieces = iter(self._stream)
        for index in mine:
            made: dict[str, Any] = {}
            for first in range(0, len(index), PIECE):
                piece = next(pieces)
                if isinstance(piece, str):
                    raise DataError(piece)
                made = piece if len(index) <= PIECE else _put(piece, first, made, len(index), self._pin)
            batch = Batch(**made, label=self.source.labels[index], seed=self.seed, epoch=epoch)
            yield batch.to(self.device, pixels=False)


def resides(needed: int, free: int, resident: bool | None) -> bool:
    """Whether images that take so many bytes live on the device: as asked, else by the memory that is free."""
    return needed <= SHARE * free if resident is None else resident


def processes(workers: int | None, world: int) -> int:
    """How many processes decode streamed images for a rank: as asked, else by the cores."""
    return max(1, min(16, cores() // world)) if workers is None else workers


def _put(piece: dict[str, Any], first: int, into: dict[str, Any], count: int, pin: bool) -> dict[str, Any]:
    """A piece of a batch of `count` samples in its place; what is not there yet is made. Canvases may grow."""

    def placed(new: Tensor, old: Tensor | None, dim: int = 0) -> Tensor:
        shape = list(new.shape) if old is None else [max(pair) for pair in zip(new.shape, old.shape, strict=True)]
        shape[dim] = count
        if old is None or list(old.shape) != shape:
            grown = torch.zeros(shape, dtype=new.dtype, pin_memory=pin)
            if old is not None:
                grown[tuple(slice(n) for n in old.shape)] = old
            old = grown
        old.narrow(dim, first, new.shape[dim])[tuple(slice(n) for n in new.shape)] = new
        return old

    made: dict[str, Any] = {}
    for key, new in piece.items():
        if key == "crops":
            made[key] = tuple(placed(*pair) for pair in zip(new, into.get(key, [None] * len(new)), strict=True))
        else:
            made[key] = placed(new, into.get(key), dim=1 if key == "boxes" else 0)
    return made


def _differ(held: Resident) -> None:
    """DataError where every image is the same; two that differ are found at once in any other set."""
    images = held.images
    if len(images) > 1 and all(torch.equal(images[0], images[i]) for i in range(1, len(images))):
        raise DataError(
            f"all {len(held.images):,} images of {held.source.name} are identical: there is nothing to tell apart"
        )


class _Order(Sampler[tuple[int, list[int]]]):
    """The batches to make, set anew for each epoch while the workers live on."""

    def __init__(self) -> None:
        self.epoch, self.mine = 0, torch.zeros(0, 1, dtype=torch.long)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch = self.epoch
        for index in self.mine:  # lists one by one: those of a long epoch would be copied into every worker
            for piece in index.split(PIECE):
                yield epoch, piece.tolist()

    def __len__(self) -> int:
        return len(self.mine) * -(-self.mine.shape[1] // PIECE)


class _Crops(Dataset[Any]):
    """In a worker: (epoch, indices) to that batch's crops, each image decoded once for all its views."""

    def __init__(self, source: Source, views: Boxes, seed: int):
        self.source, self.views, self.seed = source, views, seed
        self.wanted: list[Want] = [(view.size, view.interpolation) for view in views.views]

    def __getitem__(self, key: tuple[int, list[int]]) -> dict[str, Any] | str:
        epoch, indices = key
        crops = [torch.empty(len(indices), self.source.channels, s, s, dtype=torch.uint8) for s, _ in self.wanted]
        size, boxes = [], []
        try:
            for first in range(0, len(indices), _OPEN):
                numbers = indices[first : first + _OPEN]
                pictures = [self.source.open(i) for i in numbers]
                size.append(torch.tensor([p.size for p in pictures]))
                boxes.append(self.views.boxes(torch.tensor(numbers), size[-1], self.seed, epoch))
                for place, picture in enumerate(pictures):
                    with picture:
                        for out, crop in zip(crops, picture.crops(boxes[-1][:, place], self.wanted), strict=True):
                            out[first + place] = crop
        except DataError as e:  # as a value: torch would wrap the exception in a page of traceback
            return str(e)
        made = {"index": torch.tensor(indices), "size": torch.cat(size)}
        return made | {"boxes": torch.cat(boxes, 1), "crops": tuple(crops)}


class _Canvases(Dataset[Any]):
    """In a worker: (epoch, indices) to those images, uncropped."""

    def __init__(self, source: Source, canvas: int):
        self.source, self.canvas = source, canvas

    def __getitem__(self, key: tuple[int, list[int]]) -> dict[str, Tensor] | str:
        try:
            pixels = []
            for i in key[1]:
                with self.source.open(i) as picture:
                    pixels.append(picture.tensor(self.canvas))
        except DataError as e:
            return str(e)
        images, size = stack(pixels)
        return {"index": torch.tensor(key[1]), "size": size, "images": images}


def _stream(made: Dataset[Any], order: _Order, workers: int, device: torch.device, pinned: bool) -> DataLoader[Any]:
    # fork is cheap and needs no guard in the user's script, but a process that holds a CUDA context must not
    # be forked.
    fork = sys.platform == "linux" and device.type != "cuda"
    other = "spawn" if sys.platform == "win32" else "forkserver"
    return DataLoader(
        made,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=_deaf,
        persistent_workers=workers > 0,
        multiprocessing_context=("fork" if fork else other) if workers else None,
        pin_memory=pinned,
    )


def _deaf(worker: int) -> None:
    """A signal to the whole process group is the trainer's to answer: it saves a checkpoint, then ends its workers."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
