"""In the processes that decode streamed images: what stands at the places of an epoch, cropped or whole."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from inbatch import rng
from inbatch.data.resident import stack
from inbatch.data.source import CropSpec, Source
from inbatch.errors import DataError, InbatchError
from inbatch.runtime import child_processes

_PATIENCE = 3600  # seconds to wait for a piece: a disk that never answers must not hold the trainer forever
_OPEN = 32  # images a worker holds open at once: few files, and one draw of boxes for all of them

Made = TypeVar("Made")

Key = tuple[int, range]
"""An epoch, and places of its order."""


@runtime_checkable
class Boxes(Protocol):
    """The part of `views.Views` that is needed here: where to crop, and each view's `size` and `interpolation`."""

    @property
    def views(self) -> Sequence[Any]: ...

    def boxes(
        self, index: Int[Tensor, "b"], size: Int[Tensor, "b 2"], seed: int, epoch: int, attempt: int = 0
    ) -> Int[Tensor, "v b 4"]: ...


class Order(Sampler[Key]):
    """What to make, set anew for each epoch while the workers live on."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Piece(NamedTuple):
    """What a worker hands over: the parts of a batch, and the unreadable images that it met (number: why)."""

    made: dict[str, Any]
    bad: dict[int, str]


class SampleReader:
    """Which images stand at the places of an epoch's order, and who takes the place of one that cannot be read.

    That is the image at the same place of the next batch, or of the one after it, and so on: no other of its own batch,
    and the same whoever asks, so neither workers nor ranks nor a resume change it.
    """

    def __init__(self, source: Source, seed: int, batch: int):
        self.source, self.seed, self.batch = source, seed, batch
        self.bad: dict[int, str] = {}
        self._epoch = -1

    def read(self, epoch: int, place: int, make: Callable[[int], Made]) -> tuple[int, Made]:
        """The number of the first image for this place that `make` can read, and what it makes of it.

        Those that it cannot, where it raises DataError, are noted in `bad`.
        """
        if self._epoch != epoch:
            self._epoch, self._order = epoch, rng.permutation(self.seed, epoch, len(self.source))
        used = len(self.source) // self.batch * self.batch
        why = ""
        for at in range(place, place + used, self.batch):
            i = int(self._order[at % used])
            try:
                return i, make(i)
            except DataError as error:
                self.bad[i] = why = str(error)
        raise DataError(f"{why}; nor can any other image that could take its place in the batch")

    def met(self) -> dict[int, str]:
        """The unreadable images since the last call."""
        bad, self.bad = self.bad, {}
        return bad


class CropDataset(Dataset[Any]):
    """In a worker: places of an epoch to their images' crops, each image decoded once for all its views."""

    def __init__(self, places: SampleReader, views: Boxes):
        self.places, self.source, self.views = places, places.source, views
        self.wanted: list[CropSpec] = [(view.size, view.interpolation) for view in views.views]

    def __getitem__(self, key: Key) -> Piece | str:
        epoch, places = key
        crops = [torch.empty(len(places), self.source.channels, s, s, dtype=torch.uint8) for s, _ in self.wanted]
        index, size, boxes = [], [], []
        try:
            for first in range(0, len(places), _OPEN):
                some = places[first : first + _OPEN]
                numbers, pictures = zip(*(self.places.read(epoch, at, self.source.open) for at in some), strict=True)
                index.append(torch.tensor(numbers))
                size.append(torch.tensor([p.size for p in pictures]))
                boxes.append(self.views.boxes(index[-1], size[-1], self.places.seed, epoch))
                for slot, picture in enumerate(pictures):
                    try:
                        with picture:
                            cut = picture.crops(boxes[-1][:, slot], self.wanted)
                    except DataError:  # its header could be read, its pixels cannot
                        index[-1][slot], (size[-1][slot], boxes[-1][:, slot], cut) = self.places.read(
                            epoch, some[slot], lambda i: self._cut(i, epoch)
                        )
                    for out, crop in zip(crops, cut, strict=True):
                        out[first + slot] = crop
        except DataError as e:  # as a value: torch would wrap the exception in a page of traceback
            return str(e)
        made = {"index": torch.cat(index), "size": torch.cat(size)}
        return Piece(made | {"boxes": torch.cat(boxes, 1), "crops": tuple(crops)}, self.places.met())

    def _cut(self, i: int, epoch: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One image's size, boxes and crops."""
        with self.source.open(i) as picture:
            size = torch.tensor([picture.size])
            box = self.views.boxes(torch.tensor([i]), size, self.places.seed, epoch)[:, 0]
            return size[0], box, picture.crops(box, self.wanted)


class CanvasDataset(Dataset[Any]):
    """In a worker: places of an epoch to their images, uncropped."""

    def __init__(self, places: SampleReader, canvas: int):
        self.places, self.canvas = places, canvas

    def __getitem__(self, key: Key) -> Piece | str:
        try:
            index, pixels = zip(*(self.places.read(key[0], at, self._decode) for at in key[1]), strict=True)
        except DataError as e:
            return str(e)
        images, size = stack(list(pixels))
        return Piece({"index": torch.tensor(index), "size": size, "images": images}, self.places.met())

    def _decode(self, i: int) -> Tensor:
        with self.places.source.open(i) as picture:
            return picture.tensor(self.canvas)


@contextmanager
def lost_workers() -> Iterator[None]:
    """What torch raises, wherever the process happens to be, when a data worker is killed or finds no shared memory, as
    an error for people."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("DataLoader worker", "torch_shm", "/torch_", "shared memory")):
            raise
        raise InbatchError(
            f"a process that decodes images was lost ({str(error).strip().splitlines()[-1]}): most often memory, "
            "or the shared memory of a container, is full. --workers 0 does without such processes, fewer of them take "
            "less; a container is given more by --shm-size or --ipc=host"
        ) from error


def room_to_share(piece: int, workers: int) -> None:
    """InbatchError where the shared memory cannot hold what workers make ahead, two pieces each of so many bytes.

    Without this a worker that finds it full drops what it made, and the trainer waits for it forever.
    """
    shared = Path("/dev/shm")
    needed, free = (2 * workers + 1) * piece, disk_usage(shared).free if shared.is_dir() else math.inf
    if workers and needed > free:
        raise InbatchError(
            f"{workers} processes that decode images hand over up to {needed / 1e6:,.0f} MB at once, and the shared "
            f"memory, {shared}, has {free / 1e6:,.1f} MB free: take fewer of them or none (--workers 0), or give the "
            "container more (--shm-size, --ipc=host)"
        )


def stream(made: Dataset[Any], order: Order, workers: int, device: torch.device, pinned: bool) -> DataLoader[Any]:
    # fork is cheap and needs no guard in the user's script, but a process that holds a CUDA context must not
    # be forked.
    fork = sys.platform == "linux" and device.type != "cuda"
    other = "spawn" if sys.platform == "win32" else "forkserver"
    return DataLoader(
        made,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=child_processes.begin_worker,
        persistent_workers=workers > 0,
        timeout=_PATIENCE if workers else 0,
        multiprocessing_context=("fork" if fork else other) if workers else None,
        pin_memory=pinned,
    )


def end_workers(stream: DataLoader[Any]) -> None:
    """End the processes of a stream, and wait for them."""
    child_processes.end_workers(stream._iterator)
