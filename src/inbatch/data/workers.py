"""Worker processes for streamed images: datasets that decode and crop the samples of an epoch."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import current_process
from pathlib import Path
from shutil import disk_usage
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from inbatch import rng
from inbatch.data.decoding.image_file import ImageFile
from inbatch.data.resident import stack
from inbatch.data.source import CropSpec, LazyImage, Source
from inbatch.data.streams import Tally
from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.runtime import child_processes

_TIMEOUT = 3600  # timeout in seconds for a piece: a disk that never answers must not block training forever
_OPEN = 32  # images that a worker holds open at once: few file handles, and their boxes are drawn in one call

Result = TypeVar("Result")

Key = tuple[int, range]
"""Epoch number and positions in the epoch's order."""


@runtime_checkable
class Boxes(Protocol):
    """Protocol of the part of the view pipeline used here: crop boxes, and each view's `size` and `interpolation`."""

    @property
    def views(self) -> Sequence[Any]: ...

    def boxes(
        self, index: Int[Tensor, "b"], size: Int[Tensor, "b 2"], seed: int, epoch: int,
        attempt: int | Int[Tensor, "b"] = 0,
    ) -> Int[Tensor, "v b 4"]: ...  # fmt: skip


class Drawer(Protocol):
    """Protocol of views that workers draw one image at a time: those of the user's own transforms."""

    def draw(
        self, index: Sequence[int], pictures: Sequence[Tensor], seed: int, epoch: int,
        attempts: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]: ...  # fmt: skip


class Order(Sampler[Any]):
    """Sampler over the keys of one epoch; the keys are replaced for each epoch, the workers stay alive."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, Sequence[Any]]] = []

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Piece(NamedTuple):
    """Result of a worker for one key.

    Attributes:
        fields: Parts of a batch, by field name.
        bad: Unreadable images encountered: {image number: reason}.
        remarks: Numbers of the images with a remark, by its key in `image_file.REMARKS`.
        read: Samples that were read from shards in their order.
    """

    fields: dict[str, Any]
    bad: dict[int, str]
    remarks: dict[str, set[int]]
    read: Tally = Tally()


class SampleReader:
    """Read the samples at the positions of an epoch's order and replace unreadable images.

    order: Image numbers of the current epoch, in memory that the workers share; None for a random order.
    attempts: Numbers of the first draw of the views at the positions, likewise; None for 0.

    An unreadable image is replaced by the image at the same position of the next batch, or of the first later batch
    with a readable one that is not in the batch. A replacement depends neither on workers nor on ranks nor on a resume.
    """

    def __init__(
        self, source: Source, seed: int, batch: int, order: Int[Tensor, "m"] | None = None,
        attempts: Int[Tensor, "m"] | None = None,
    ):  # fmt: skip
        self.source, self.seed, self.batch, self.order, self.attempts = source, seed, batch, order, attempts
        self.bad: dict[int, str] = {}
        self.remarks: dict[str, set[int]] = {}
        self._epoch = -1

    def read(self, epoch: int, place: int, make: Callable[[int], Result]) -> tuple[int, Result]:
        """Return the number of the first readable image for this position, and the result of `make` for it.

        Images for which `make` raises DataError are recorded in `bad`.
        """
        used = len(self.source if self.order is None else self.order) // self.batch * self.batch
        why = ""
        for at in range(place, place + used, self.batch):
            i = self.number_at(epoch, at % used)
            if at > place and not self._may_replace(i, place):
                continue
            try:
                return i, make(i)
            except DataError as error:
                self.bad[i] = why = str(error)
        raise DataError(f"{why}. No readable image is left to replace it in the batch: pass a smaller --batch-size")

    def read_again(self, epoch: int, place: int, make: Callable[[int], Result]) -> tuple[int, Result]:
        """Do what `read` does, for a position that was read before."""
        return SampleReader.read(self, epoch, place, make)

    def _may_replace(self, i: int, place: int) -> bool:
        """Return whether no other position of the batch has this image, nor can have it as a replacement.

        An order may hold an image several times: it replaces only images at the positions, counted from the beginning
        of the batch, of its first occurrence.
        """
        if self.order is None:
            return True
        first = place // self.batch * self.batch
        if (self.order[first : first + self.batch] == i).any():
            return False
        return int((self.order == i).nonzero()[0]) % self.batch == place % self.batch

    def number_at(self, epoch: int, place: int) -> int:
        """Return the number of the image at a position of the epoch's order."""
        if self.order is not None:
            return int(self.order[place])
        if self._epoch != epoch:
            self._epoch, self._permutation = epoch, rng.permutation(self.seed, epoch, len(self.source))
        return int(self._permutation[place])

    def attempts_at(self, places: range) -> dict[str, Tensor]:
        """Return the part of a batch with the numbers of the first draw at these positions, empty if all are 0."""
        return {} if self.attempts is None else {"attempt": self.attempts[places.start : places.stop].clone()}

    def open(self, i: int) -> LazyImage:
        """Open an image."""
        return self.source.open(i)

    def add_remarks(self, i: int, picture: LazyImage) -> None:
        """Record the remarks about an image that was read."""
        for key in picture.remarks() if isinstance(picture, ImageFile) else ():
            self.remarks.setdefault(key, set()).add(i)

    def piece(self, fields: dict[str, Any]) -> Piece:
        """Return the parts of a batch with the unreadable images and the remarks since the last call."""
        bad, self.bad = self.bad, {}
        remarks, self.remarks = self.remarks, {}
        return Piece(fields, bad, remarks)


class CropDataset(Dataset[Any]):
    """Crops of the images at given positions of an epoch; each image is decoded once for all its views."""

    def __init__(self, reader: SampleReader, views: Boxes):
        self.reader, self.source, self.views = reader, reader.source, views
        self.wanted: list[CropSpec] = [(view.size, view.interpolation) for view in views.views]

    def __getitem__(self, key: Key) -> Piece | str:
        epoch, places = key
        crops = [torch.empty(len(places), self.source.channels, s, s, dtype=torch.uint8) for s, _ in self.wanted]
        index, size, boxes = [], [], []
        try:
            for first in range(0, len(places), _OPEN):
                chunk = places[first : first + _OPEN]
                attempt = self.reader.attempts_at(chunk)
                numbers, pictures = zip(*(self.reader.read(epoch, at, self.reader.open) for at in chunk), strict=True)
                index.append(torch.tensor(numbers))
                size.append(torch.tensor([p.size for p in pictures]))
                boxes.append(self.views.boxes(index[-1], size[-1], self.reader.seed, epoch, **attempt))
                for slot, picture in enumerate(pictures):
                    try:
                        with picture:
                            cut = picture.crops(boxes[-1][:, slot], self.wanted)
                        self.reader.add_remarks(numbers[slot], picture)
                    except DataError:  # the header is readable, the pixels are not
                        index[-1][slot], (size[-1][slot], boxes[-1][:, slot], cut) = self.reader.read_again(
                            epoch, chunk[slot], partial(self._cut, epoch, chunk[slot : slot + 1])
                        )
                    for out, crop in zip(crops, cut, strict=True):
                        out[first + slot] = crop
        except DataError as e:  # returned as a value: torch would wrap the exception in a long traceback
            return str(e)
        fields = {"index": torch.cat(index), "size": torch.cat(size)} | self.reader.attempts_at(places)
        return self.reader.piece(fields | {"boxes": torch.cat(boxes, 1), "crops": tuple(crops)})

    def _cut(self, epoch: int, place: range, i: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the size, the boxes and the crops of one image at a position."""
        with self.reader.open(i) as picture:
            size = torch.tensor([picture.size])
            attempt = self.reader.attempts_at(place)
            box = self.views.boxes(torch.tensor([i]), size, self.reader.seed, epoch, **attempt)[:, 0]
            crops = picture.crops(box, self.wanted)
            self.reader.add_remarks(i, picture)
            return size[0], box, crops


class CanvasDataset(Dataset[Any]):
    """Uncropped images at given positions of an epoch, with the views of the user's own transforms, if there are any.

    Args:
        reader: Reads the images.
        canvas: Longer side of an image in pixels, at most.
        views: Draws the views; None if the main process draws them.
    """

    def __init__(self, reader: SampleReader, canvas: int, views: Drawer | None = None):
        self.reader, self.canvas, self.views = reader, canvas, views

    def __getitem__(self, key: Key) -> Piece | str | ConfigError:
        try:
            epoch, places = key
            index, pixels = zip(*(self.reader.read(epoch, at, self._decode) for at in places), strict=True)
            fields: dict[str, Any] = self.reader.attempts_at(places)
            if self.views is not None:
                attempts = fields["attempt"].tolist() if fields else None
                fields["crops"] = self.views.draw(index, pixels, self.reader.seed, epoch, attempts)
        except DataError as e:
            return str(e)
        except ConfigError as e:  # of a transform
            return e
        images, size = stack(list(pixels))
        return self.reader.piece({"index": torch.tensor(index), "size": size, "images": images} | fields)

    def _decode(self, i: int) -> Tensor:
        with self.reader.open(i) as picture:
            pixels = picture.tensor(self.canvas)
            self.reader.add_remarks(i, picture)
            return pixels


class DrawnDataset(Dataset[Any]):
    """Views of images that are in memory, by the user's own transforms.

    The keys are an epoch, and of each sample the number of its image and that of the draw.
    """

    def __init__(self, images: Tensor, size: Tensor, views: Drawer, seed: int):
        self.images, self.size, self.views, self.seed = images, size, views, seed

    def __getitem__(self, key: tuple[int, Sequence[tuple[int, int]]]) -> Piece | ConfigError:
        epoch, (index, attempts) = key[0], zip(*key[1], strict=True)
        pictures = [self.images[i, :, : self.size[i, 0], : self.size[i, 1]] for i in index]
        try:
            return Piece({"crops": self.views.draw(index, pictures, self.seed, epoch, attempts)}, {}, {})
        except ConfigError as e:
            return e


@contextmanager
def lost_workers() -> Iterator[None]:
    """Convert torch's error for a killed data worker or full shared memory to InbatchError.

    Torch may raise this error at any point of the main process.
    """
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


def check_shared_memory(piece: int, workers: int) -> None:
    """Raise InbatchError if the shared memory cannot hold the prefetched pieces, two per worker of `piece` bytes each.

    Without this check, a worker that finds the shared memory full drops its piece and the trainer waits for it forever.
    """
    shared = Path("/dev/shm")
    needed, free = (2 * workers + 1) * piece, disk_usage(shared).free if shared.is_dir() else math.inf
    if workers and needed > free:
        raise InbatchError(
            f"{workers} processes that decode images transfer up to {needed / 1e6:,.0f} MB at once, and the shared "
            f"memory, {shared}, has {free / 1e6:,.1f} MB free: take fewer of them or none (--workers 0), or give the "
            "container more (--shm-size, --ipc=host)"
        )


def may_not_start_workers() -> bool:
    """Return whether Python lets this process start none, because it is itself a worker, such as one of a Pool."""
    return current_process().daemon


def stream(dataset: Dataset[Any], order: Order, workers: int, device: torch.device, pinned: bool) -> DataLoader[Any]:
    """Create a torch DataLoader that makes the keys of `order` in worker processes.

    Raises:
        ConfigError: if workers are requested in a process that may not start any.
    """
    if workers and may_not_start_workers():
        raise ConfigError(
            f"workers = {workers}: this process is a daemon of multiprocessing, and may not start processes that "
            "decode images; pass workers=0, or start the process with daemon=False"
        )
    # fork is cheap and needs no guard in the user's script, but a process that holds a CUDA context must not be forked.
    fork = sys.platform == "linux" and device.type != "cuda"
    other = "spawn" if sys.platform == "win32" else "forkserver"
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=child_processes.begin_worker,
        generator=torch.Generator(),  # without one, the loader draws from the caller's
        persistent_workers=workers > 0,
        timeout=_TIMEOUT if workers else 0,
        multiprocessing_context=("fork" if fork else other) if workers else None,
        pin_memory=pinned,
    )


def end_workers(stream: DataLoader[Any]) -> None:
    """Stop the worker processes of a stream and wait for them."""
    child_processes.end_workers(stream._iterator)
