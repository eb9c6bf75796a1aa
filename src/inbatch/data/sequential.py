"""Read the samples of streams from their shards, within a worker process."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from inbatch.data.source import LazyImage, Source
from inbatch.data.streams import StreamPlan, Tally, after
from inbatch.data.workers import Piece, SampleReader

Result = TypeVar("Result")


class StreamReader(SampleReader):
    """Read the samples at the positions of a plan's order; each stream reads its shards from beginning to end.

    A stream that is not read where it was left (a new epoch, a resumed run) begins at its first sample that is still
    needed; samples used before are passed over, not decoded. Unreadable images are replaced as by `SampleReader`: their
    replacement is read by its index.
    """

    def __init__(self, source: Source, plan: StreamPlan):
        super().__init__(source, plan.seed, plan.batch)
        self.plan = plan
        self._streams: dict[int, _Stream] = {}
        self._held: dict[int, Any] = {}
        self._read: list[int] = []

    def read(self, epoch: int, place: int, make: Callable[[int], Result]) -> tuple[int, Result]:
        stream = self._stream(epoch, place)
        i, data = stream.take(self._turn(place))
        self._read.append(i)
        self._held[i] = data
        try:
            return super().read(epoch, place, make)
        finally:
            del self._held[i]

    def open(self, i: int) -> LazyImage:
        return self.source.unpack(i, self._held[i]) if i in self._held else self.source.open(i)

    def piece(self, fields: dict[str, Any]) -> Piece:
        read, self._read = self._read, []
        return super().piece(fields)._replace(read=Tally.of(read))

    def number_at(self, epoch: int, place: int) -> int:
        stream = self._stream(epoch, place)
        return int(stream.numbers[stream.order[self._turn(place)]])

    def _turn(self, place: int) -> int:
        """Return the turn of a position of the epoch's order in its stream."""
        step, position = divmod(place, self.plan.batch)
        stream = self.plan.stream_at(position)
        return step * self.plan.width(stream) + position - self.plan.start(stream)

    def _stream(self, epoch: int, place: int) -> "_Stream":
        number = self.plan.stream_at(place % self.plan.batch)
        stream = self._streams.get(number)
        if stream is None or stream.epoch != epoch:
            self._streams.pop(number, None)  # before the next one takes memory
            stream = self._streams[number] = _Stream(self.source, self.plan, epoch, number)
        return stream


class _Stream:
    """A stream in an epoch, and the encoded images in its buffer."""

    def __init__(self, source: Source, plan: StreamPlan, epoch: int, number: int):
        self.source, self.epoch = source, epoch
        self.numbers, self.order = plan.numbers(epoch, number), plan.shuffled(epoch, number)
        self._next = -1
        self._held: dict[int, Any] = {}
        self._places: Iterator[int] = iter(())
        self._data: Iterator[Any] = iter(())

    def take(self, turn: int) -> tuple[int, Any]:
        """Return the number and the encoded image that leaves the buffer at a turn; turns in order read each once."""
        if turn != self._next:
            self._held = {}
            places = after(self.order, turn)
            self._places = iter(places.tolist())
            self._data = self.source.read_shards(self.numbers[places].tolist())
        place = int(self.order[turn])
        while place not in self._held:
            self._held[next(self._places)] = next(self._data)
        self._next = turn + 1
        return int(self.numbers[place]), self._held.pop(place)
