"""Features of clean images: all at once, or as a stream of chunks for sets of any length."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from inbatch.errors import DataError
from inbatch.evaluate.embeddings import Embeddings
from inbatch.limits import cores
from inbatch.machine import free_bytes
from inbatch.products import fast_products

_TOGETHER = 2**24  # bytes of images that are prepared at once rather than one by one


@runtime_checkable
class Source(Protocol):
    """What is read of a data set: uint8 images, labels (-1 unknown) and names."""

    name: str
    labels: Int[Tensor, "n"]

    def __len__(self) -> int: ...
    def image(self, i: int, /) -> UInt8[Tensor, "c h w"]: ...
    def identity(self, i: int, /) -> str: ...


@runtime_checkable
class Encoder(Protocol):
    """What is asked of an encoder; `inbatch.encoders.Encoder` is one."""

    @property
    def device(self) -> torch.device: ...
    @property
    def prepare(self) -> Callable[[Iterable[Tensor]], Tensor]: ...
    def evaluating(self) -> AbstractContextManager[None]: ...
    def __call__(self, x: Float[Tensor, "n c s s"], /) -> Float[Tensor, "n f"]: ...


class Kept:
    """A source whose decoded images stay in memory once they have been read: the same numbers, sooner."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.labels = source, source.name, source.labels
        self._images: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        if i not in self._images:
            self._images[i] = self.source.image(i)
        return self._images[i]

    def identity(self, i: int) -> str:
        return self.source.identity(i)

    def read(self) -> None:
        """Decode what has not been read yet, on all cores."""
        missing = [i for i in range(len(self)) if i not in self._images]
        if missing:
            parts = [missing[at : at + 64] for at in range(0, len(missing), 64)]
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(lambda part: [self.image(i) for i in part], parts))


def keep(source: Source, limit: int = 2**29) -> Source:
    """The source with its images kept in memory, for whoever embeds it again and again; itself if they are too large.

    limit: bytes that they may fill, judged by 16 of them; nor may it be more than a twentieth of the free memory, which
        a run has better use for.
    """
    some = torch.linspace(0, len(source) - 1, min(16, len(source))).long().tolist()
    size = sum(source.image(i).nbytes for i in some) / max(1, len(some)) * len(source)
    return Kept(source) if size <= min(limit, free_bytes(torch.device("cpu")) // 20) else source


class _Chunks(Dataset[Tensor]):
    """Prepared images of a range of numbers; decoding and resizing happen here, in a worker if there are any."""

    def __init__(self, source: Source, prepare: Callable[[Iterable[Tensor]], Tensor]):
        self.source, self.prepare = source, prepare

    def __getitem__(self, at: range) -> Tensor:
        first = self.source.image(at[0])
        if len(at) * first.nbytes > _TOGETHER:
            return self.prepare(self.source.image(i) for i in at)
        images = [first, *(self.source.image(i) for i in at[1:])]
        return self.prepare(torch.stack(images) if all(x.shape == first.shape for x in images) else images)


def _stream(
    source: Source,
    prepare: Callable[[Iterable[Tensor]], Tensor],
    encode: Callable[[Tensor], Tensor],
    feature: str,
    batch: int,
    workers: int,
) -> Iterator[Embeddings]:
    if not len(source):
        raise DataError(f"{source.name} holds no images.")
    if isinstance(source, Kept):
        source.read()
        workers = 0  # who would keep the images for themselves
    n = len(source)
    ranges = [range(i, min(i + batch, n)) for i in range(0, n, batch)]
    chunks = _Chunks(source, prepare)
    loader: DataLoader = DataLoader(chunks, sampler=ranges, batch_size=None, num_workers=workers)
    for at, images in zip(ranges, loader, strict=True):
        yield Embeddings(
            vectors=encode(images).float().cpu(),
            labels=source.labels[at.start : at.stop].cpu(),
            identities=tuple(source.identity(i) for i in at),
            name=source.name,
            feature=feature,
        )


def embed_stream(
    encoder: Encoder,
    source: Source,
    *,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> Iterator[Embeddings]:
    """Chunks of `batch` embeddings in the order of the source; memory does not grow with its length.

    Runs on the encoder's device, in evaluation mode without gradient; the encoder is left as it was between chunks.
    precision: torch.float32, or torch.bfloat16 / float16 for autocast. workers: processes that decode.
    """

    def encode(images: Tensor) -> Tensor:
        device = encoder.device
        half = precision != torch.float32
        products = fast_products() if device.type == "cpu" else nullcontext()
        cast = torch.autocast(device.type, dtype=precision if half else None, enabled=half)
        with encoder.evaluating(), products, cast:
            return encoder(images.to(device, non_blocking=True))

    yield from _stream(source, encoder.prepare, encode, "pooled output of the backbone", batch, workers)


def embed(
    encoder: Encoder,
    source: Source,
    *,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> Embeddings:
    """The embeddings of all images of a source; see `embed_stream`."""
    return _join(embed_stream(encoder, source, batch=batch, precision=precision, workers=workers))


def raw_pixels(source: Source, *, size: int | None = None, batch: int = 512, workers: int = 0) -> Embeddings:
    """The pixels themselves, in [0, 1] and flattened, as the baseline every feature must beat.

    Images are resized (bilinear, antialiased) to size x size: by default their own size up to 32 pixels.
    """
    size = size or min(32, *source.image(0).shape[1:])
    resize = _Flatten(size)
    return _join(_stream(source, resize, lambda x: x, f"raw pixels, {size}x{size}", batch, workers))


class _Flatten:
    def __init__(self, size: int):
        self.shape = (size, size)

    def __call__(self, images: Iterable[Tensor]) -> Tensor:
        return torch.stack([self._fit(i.float() / 255).flatten() for i in images])

    def _fit(self, x: Tensor) -> Tensor:
        if x.shape[1:] == self.shape:
            return x
        return nn.functional.interpolate(x[None], self.shape, mode="bilinear", antialias=True)[0]


def _join(stream: Iterable[Embeddings]) -> Embeddings:
    chunks = list(stream)
    return Embeddings(
        vectors=torch.cat([c.vectors for c in chunks]),
        labels=torch.cat([c.labels for c in chunks]),
        identities=tuple(i for c in chunks for i in c.identities),
        name=chunks[0].name,
        feature=chunks[0].feature,
    )
