"""Embeddings of clean images: all at once, or as a stream of chunks for data sets of any length."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inbatch.data import open_data
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation.embeddings import Embeddings
from inbatch.nn.cpu_matmul import fast_products
from inbatch.nn.eval_mode import in_pieces
from inbatch.runtime import child_processes, shared_work
from inbatch.runtime.device import autocast
from inbatch.runtime.isolation import usual_numerics, usual_state
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.spacing import spaced
from inbatch.runtime.thread_map import thread_map

_TOGETHER = 2**24  # bytes of images that are prepared together rather than one by one


@runtime_checkable
class Source(Protocol):
    """Interface of a data set: uint8 images, labels (-1 unknown) and names."""

    name: str
    labels: Int[Tensor, "n"]

    def __len__(self) -> int: ...
    def image(self, i: int, /) -> UInt8[Tensor, "c h w"]: ...
    def identity(self, i: int, /) -> str: ...


@runtime_checkable
class Encoder(Protocol):
    """Interface of an encoder, such as `inbatch.models.Encoder`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def prepare(self) -> Callable[[Iterable[Tensor]], Tensor]: ...
    def evaluating(self) -> AbstractContextManager[None]: ...
    def __call__(self, x: Float[Tensor, "n c s s"], /) -> Float[Tensor, "n f"]: ...


AnySource = TypeVar("AnySource", bound=Source)


def as_source(data: Any, encoder: Any = None) -> Source:
    """Return a source unchanged; open a path, an array or a pair (images, labels) as `open_data` does.

    Args:
        data: The images.
        encoder: Encoder that determines the channels and levels in which images are read.

    Raises:
        DataError: If the data are of no kind that can be opened; it lists the kinds.
    """
    if isinstance(data, Source):
        return data
    return open_data(data, channels=getattr(encoder, "channels", None), levels=getattr(encoder, "levels", None))


def check_encoder(encoder: Any) -> None:
    """Raise ConfigError if the value is not an encoder."""
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"encoder must be an encoder, such as inbatch.load(RUN) returns, not {type(encoder).__name__}: it has a "
            "device, prepare and evaluating()"
        )


class Kept:
    """A source that keeps its decoded images in memory: the same results, faster."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.labels = source, source.name, source.labels
        self.classes: tuple[str, ...] = getattr(source, "classes", ())
        self.ids: tuple[int, ...] | None = getattr(source, "ids", None)
        self._images: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        if i not in self._images:
            self._images[i] = self.source.image(i)
        return self._images[i]

    def identity(self, i: int) -> str:
        return self.source.identity(i)

    def read(self, numbers: range | None = None) -> None:
        """Decode the images, or those of some numbers, that have not been read yet and can be, on all cores."""

        def decode(part: list[int]) -> None:
            for i in part:
                with suppress(DataError):  # reported when the image is read
                    self.image(i)

        missing = [i for i in (range(len(self)) if numbers is None else numbers) if i not in self._images]
        if missing:
            parts = [missing[at : at + 64] for at in range(0, len(missing), 64)]
            list(thread_map(decode, parts))


def hold_in_memory(source: AnySource, limit: int = 2**29) -> AnySource | Kept:
    """Return the source with its images kept in memory for repeated embedding, or unchanged if they are too large.

    limit: maximum bytes of the images, estimated from 16 of them; they may also fill at most a twentieth of the free
        memory, because the run needs the rest.
    """
    sample = spaced(len(source), 16).tolist()
    size = sum(image.nbytes for image in readable(source, sample)) / max(1, len(sample)) * len(source)
    return Kept(source) if size <= min(limit, free_bytes(torch.device("cpu")) // 20) else source


def readable(
    source: Source, numbers: Iterable[int], bad: dict[int, str] | None = None
) -> Iterator[UInt8[Tensor, "c h w"]]:
    """Yield the images of these numbers that can be read; the reasons for the others are added to `bad`."""
    for i in numbers:
        try:
            image = source.image(i)
        except DataError as error:
            if bad is not None:
                bad[i] = str(error)
        else:
            yield image


class _Chunks(Dataset[tuple[Tensor | None, dict[int, str]]]):
    """Prepared images of a range of numbers, None if there are none, and the unreadable ones (number: reason).

    Decoding and resizing are done here, in a worker if there are any.
    """

    def __init__(self, source: Source, prepare: Callable[[Iterable[Tensor]], Tensor]):
        self.source, self.prepare = source, prepare

    def __getitem__(self, at: range) -> tuple[Tensor | None, dict[int, str]]:
        bad: dict[int, str] = {}
        images = readable(self.source, at, bad)
        first = next(images, None)
        if first is None:
            return None, bad
        if len(at) * first.nbytes > _TOGETHER:
            return self.prepare(chain([first], images)), bad
        several = [first, *images]
        return self.prepare(torch.stack(several) if all(x.shape == first.shape for x in several) else several), bad


def stream_chunks(
    source: Source,
    prepare: Callable[[Iterable[Tensor]], Tensor],
    encode: Callable[[Tensor], Tensor],
    feature: str,
    batch: int,
    workers: int,
    missing: dict[int, str] | None,
    numbers: range | None = None,
) -> Iterator[Embeddings]:
    """Yield chunks of what `encode` returns for prepared images; see `embed_stream`."""
    if not len(source):
        raise DataError(f"{source.name} holds no images.")
    numbers = range(len(source)) if numbers is None else numbers
    if isinstance(source, Kept):
        source.read(numbers)
        workers = 0  # they would each keep the images
    ranges = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
    chunks = _Chunks(source, prepare)
    loader: DataLoader = DataLoader(
        chunks, sampler=ranges, batch_size=None, num_workers=workers, worker_init_fn=child_processes.begin_worker,
        generator=torch.Generator(),  # without one, the loader draws from the caller's
    )  # fmt: skip
    for at, (images, bad) in zip(ranges, child_processes.batches(loader), strict=True):
        shared_work.check()
        if bad and missing is None:
            raise DataError(next(iter(bad.values())))
        if missing is not None:
            missing |= bad
        if images is None:
            continue
        index = torch.tensor([i for i in at if i not in bad])
        yield Embeddings(
            vectors=encode(images).float().cpu(),
            labels=source.labels[index].cpu(),
            identities=tuple(source.identity(i) for i in index.tolist()),
            index=index,
            name=source.name,
            feature=feature,
            classes=getattr(source, "classes", ()),  # sources from outside the package may have none
            ids=getattr(source, "ids", None),
        )


def embed_stream(
    encoder: Any,
    source: Any,
    *,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
    missing: dict[int, str] | None = None,
    numbers: range | None = None,
) -> Iterator[Embeddings]:
    """Yield chunks of `batch` embeddings in the order of the source; memory does not grow with its length.

    Runs on the encoder's device, in evaluation mode without gradient; the mode of the encoder is restored between
    chunks.

    Args:
        encoder: the encoder.
        source: the images: a source, or what `open_data` opens.
        batch: images per chunk.
        precision: torch.float32, or torch.bfloat16 / float16 for autocast.
        workers: processes that decode.
        missing: receives the images that cannot be read (number: reason), which are left out; None: they raise
            DataError.
        numbers: the images to embed, all by default; chunks begin at the first of them.

    Raises:
        ConfigError: If `encoder` is not an encoder.
        DataError: If `source` cannot be opened.
    """
    check_encoder(encoder)
    source, kind = as_source(source, encoder), "pooled output of the backbone"
    yield from stream_chunks(
        source, encoder.prepare, lambda images: encode(encoder, images, precision), kind, batch, workers, missing,
        numbers,
    )  # fmt: skip


@usual_numerics()
def encode(
    encoder: Encoder, images: Float[Tensor, "n c s s"], precision: torch.dtype = torch.float32
) -> Float[Tensor, "n f"]:
    """Return features of prepared images, on the encoder's device, as in `embed_stream`."""
    device = encoder.device
    half = precision != torch.float32
    products = fast_products() if device.type == "cpu" else nullcontext()
    cast = autocast(device, precision if half else None, enabled=half)
    represent = getattr(encoder, "represent", encoder)  # the rows of a head, or a custom encoder, have none
    with encoder.evaluating(), products, cast:
        return in_pieces(represent, images.to(device, non_blocking=True))


@usual_state()
def embed(
    encoder: Any,
    source: Any,
    *,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> Embeddings:
    """Return the embeddings of all images of a source that can be read; see `embed_stream`. DataError if none can.

    Inside `shared_work.sharing`, each rank embeds a part of them.
    """
    bad, source = dict[int, str](), as_source(source, encoder)
    numbers = shared_work.span(len(source), batch)
    chunks = embed_stream(
        encoder, source, batch=batch, precision=precision, workers=workers, missing=bad, numbers=numbers
    )
    return join_chunks(chunks, bad, source)


def join_chunks(stream: Iterable[Embeddings], bad: dict[int, str], source: Source) -> Embeddings:
    """Return all chunks in one, of all ranks if they share the work; DataError if there are none."""
    chunks = list(stream)
    facts = shared_work.gathered((bad, chunks[0].feature if chunks else ""))
    bad = {i: why for part, _ in facts for i, why in part.items()}
    index = shared_work.joined(torch.cat([c.index for c in chunks]) if chunks else torch.empty(0, dtype=torch.long))
    if not len(index):
        reasons = "; ".join(list(bad.values())[:3])
        raise DataError(f"none of {len(bad):,} images can be read: {reasons}")
    return Embeddings(
        vectors=shared_work.joined(torch.cat([c.vectors for c in chunks]) if chunks else torch.empty(0, 0)),
        labels=source.labels[index].cpu(),
        identities=tuple(map(source.identity, index.tolist())),
        index=index,
        name=source.name,
        feature=next(feature for _, feature in facts if feature),
        missing=tuple(bad.values()),
        classes=getattr(source, "classes", ()),  # sources from outside the package may have none
        ids=getattr(source, "ids", None),
    )
