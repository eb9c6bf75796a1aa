"""Order of an epoch in which shards are read from beginning to end.

The shards, in random order, are one long sequence. It is cut into streams of consecutive samples; a stream fills the
same positions of every global batch, and shuffles its samples in a buffer. All of this is a function of (seed, epoch),
the sizes of the shards, the batch size, and the numbers of streams and of samples in a buffer: ranks and workers only
divide the positions of a batch, so they do not affect which samples are in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from inbatch import rng
from inbatch.data.source import Source
from inbatch.errors import ConfigError, DataError, many

PER_RANK = 16
"""Default number of streams of a rank: the largest default number of its workers, so that each has streams."""

READ_BUFFER = 256
"""Default number of samples in the buffer of a stream."""

_SHARDS, _BUFFER = 31, 32  # keys of the random numbers
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Sequential:
    """How shards are read one after the other: samples in the buffer of a stream; streams of all ranks, or None."""

    buffer: int
    streams: int | None = None


@dataclass(frozen=True)
class Tally:
    """Count, sum and sum of squares of sample numbers, modulo 2^64: equal for equal sets of samples in any order."""

    count: int = 0
    sum: int = 0
    squares: int = 0

    @staticmethod
    def of(numbers: Sequence[int] | np.ndarray) -> "Tally":
        """Return the tally of some samples."""
        values = np.asarray(numbers, np.int64).astype(np.uint64)
        return Tally(values.size, int(values.sum(dtype=np.uint64)), int((values * values).sum(dtype=np.uint64)))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.count + other.count, self.sum + other.sum & _MASK, self.squares + other.squares & _MASK
        )  # fmt: skip

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(
            self.count - other.count, self.sum - other.sum & _MASK, self.squares - other.squares & _MASK
        )  # fmt: skip


@dataclass(frozen=True)
class StreamPlan:
    """Which sample is at which position of an epoch.

    Attributes:
        sizes: Numbers of samples of the shards, which follow each other in the source.
        batch: Global batch size.
        seed: Seed of the order.
        streams: Number of streams.
        buffer: Number of samples that a stream holds.
    """

    sizes: tuple[int, ...]
    batch: int
    seed: int
    streams: int
    buffer: int

    @property
    def steps(self) -> int:
        """Number of batches per epoch; the samples left over are at the end of the sequence of shards."""
        return sum(self.sizes) // self.batch

    def start(self, stream: int) -> int:
        """Return the first position in every batch that a stream fills; for the number of streams, the batch size."""
        return stream * self.batch // self.streams

    def width(self, stream: int) -> int:
        """Return the number of positions in every batch that a stream fills."""
        return self.start(stream + 1) - self.start(stream)

    def stream_at(self, position: int) -> int:
        """Return the stream that fills a position of the batches."""
        return ((position + 1) * self.streams - 1) // self.batch

    def numbers(self, epoch: int, stream: int) -> np.ndarray:
        """Return the samples of a stream in the order in which they are read."""
        order = rng.permutation(rng.fold(self.seed, _SHARDS), epoch, len(self.sizes)).numpy()
        sizes = np.asarray(self.sizes, np.int64)
        first, ends = np.cumsum(sizes) - sizes, np.cumsum(sizes[order])
        low, high = self.steps * self.start(stream), self.steps * self.start(stream + 1)
        parts = [np.zeros(0, np.int64)]
        for place in range(int(np.searchsorted(ends, low, "right")), len(order)):
            begin = int(ends[place]) - self.sizes[order[place]]
            if begin >= high:
                break
            shift = int(first[order[place]]) - begin
            parts.append(np.arange(max(low, begin) + shift, min(high, int(ends[place])) + shift))
        return np.concatenate(parts)

    def shuffled(self, epoch: int, stream: int) -> np.ndarray:
        """Return the places in `numbers` in the order in which they leave the buffer.

        The buffer is full before a random one of its samples leaves it, and the next one read takes its place.
        """
        n = self.steps * self.width(stream)
        generator = torch.Generator().manual_seed(rng.fold(self.seed, _BUFFER, epoch, stream))
        draws = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
        held, order = list(range(min(self.buffer, n))), np.empty(n, np.int64)
        for turn, draw in enumerate(draws):
            slot = int(draw * len(held))
            order[turn] = held[slot]
            if turn + self.buffer < n:
                held[slot] = turn + self.buffer
            else:
                held[slot] = held[-1]
                held.pop()
        return order

    def cuts(self, rank: int, world: int, workers: int, most: int) -> list[slice]:
        """Return the pieces of a rank's local batch in the order of their keys: piece k is for worker k modulo workers.

        Every worker has the same streams in all steps.

        Args:
            rank: Rank of this process.
            world: Number of ranks.
            workers: Number of worker processes, as returned by `workers`.
            most: Maximum number of samples in a piece.
        """
        ends, pieces = self._ends(rank, world, workers, most)
        return [
            slice(low + (high - low) * piece // pieces, low + (high - low) * (piece + 1) // pieces)
            for piece in range(pieces)
            for low, high in pairwise(ends)
        ]

    def workers(self, rank: int, world: int, most: int, requested: int) -> int:
        """Return the largest number of workers, up to the requested one, of which each has samples in every piece."""
        for workers in range(min(requested, len(self._borders(rank, world)) - 1), 1, -1):
            ends, pieces = self._ends(rank, world, workers, most)
            if min(high - low for low, high in pairwise(ends)) >= pieces:
                return workers
        return min(requested, 1)

    def _ends(self, rank: int, world: int, workers: int, most: int) -> tuple[list[int], int]:
        """Return the ends of the workers' shares of a local batch, and the number of pieces of each.

        They are the borders of streams nearest to equal shares: where ranks do not divide the streams, the first and
        the last part of a rank can be one sample.
        """
        share, inner = self.batch // world, np.asarray(self._borders(rank, world)) - rank * (self.batch // world)
        equal = share * np.arange(workers + 1) / workers
        ends = inner[np.abs(inner[:, None] - equal).argmin(0)].tolist()
        return ends, -(-max(high - low for low, high in pairwise(ends)) // most)

    def expected(self, epoch: int, rank: int, world: int, step: int) -> Tally:
        """Return the tally of the samples that a rank reads in an epoch from a step on."""
        tally, share = Tally(), self.batch // world
        low, high = rank * share, (rank + 1) * share
        for stream in range(self.stream_at(low), self.stream_at(high - 1) + 1):
            numbers, start = self.numbers(epoch, stream), self.start(stream)
            tally += Tally.of(numbers)
            own = slice(max(low - start, 0), high - start)
            if step or own.start or own.stop < self.width(stream):
                rows = numbers[self.shuffled(epoch, stream)].reshape(self.steps, self.width(stream))
                tally = tally - Tally.of(rows) + Tally.of(rows[step:, own])
        return tally

    def _borders(self, rank: int, world: int) -> list[int]:
        """Return the positions between the streams of a rank in the batch, with the ends of its local batch."""
        share = self.batch // world
        low, high = rank * share, (rank + 1) * share
        streams = range(self.stream_at(low) + 1, self.stream_at(high - 1) + 1)
        return [low, *(self.start(stream) for stream in streams), high]

    def report(self, world: int) -> str:
        """Return a text report of the order."""
        shards, left = sum(size > 0 for size in self.sizes), sum(self.sizes) - self.steps * self.batch
        held = min(self.buffer, self.steps * self.width(self.streams - 1))
        few = "" if shards >= 2 * self.streams else "; more and smaller shards would mix the images better"
        rest = f"; the last {many(left, 'image')} of an epoch are left out, other ones in every epoch" if left else ""
        return (
            f"read one after the other (read = sequential): {many(shards, 'shard')} in {many(self.streams, 'stream')}, "
            f"shuffled in buffers of {many(held, 'image')}, up to {held * -(-self.streams // world):,} encoded images "
            f"on a rank{few}{rest}"
        )


def plan_streams(source: Source, batch: int, seed: int, world: int, read: Sequential) -> StreamPlan:
    """Return the plan for a source; raise DataError if its images cannot be read one after the other."""
    if (sizes := source.shard_sizes()) is None:
        raise DataError(
            f"read = sequential: {source.name} is not tar or Parquet files, which alone are read one after the other; "
            "use --read random"
        )
    if read.streams is not None and read.streams > batch:
        raise ConfigError(
            f"read_streams = {read.streams}: a stream fills at least one position of a batch of {batch}; choose at "
            f"most {batch}"
        )
    return StreamPlan(tuple(sizes), batch, seed, read.streams or min(batch, PER_RANK * world), read.buffer)


def check_epoch(tally: Tally, expected: Tally, rank: int, epoch: int) -> None:
    """Raise DataError unless a rank has read each of its samples of an epoch exactly once."""
    if tally != expected:
        raise DataError(
            f"rank {rank} read {tally.count:,} samples in epoch {epoch + 1}, which are not its {expected.count:,} "
            "samples, each once. A file has changed, or this is a bug in inbatch: please report it"
        )


def after(order: np.ndarray, start: int) -> np.ndarray:
    """Return the places that leave a buffer from a turn on, in the order in which they are read."""
    waiting = np.ones(len(order), bool)
    waiting[order[:start]] = False
    return np.flatnonzero(waiting)
