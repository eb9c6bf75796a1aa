"""Work that all ranks share, such as an evaluation: each rank does a part, and all get the whole.

Inside `sharing`, all ranks call the same functions in the same order; `span` gives a rank its part, and `joined` or
`gathered` the whole. Parts are cut at multiples of a fixed number, not by ranks, so that batches and results are those
of one process. Outside, both return everything of this process alone.

Ranks wait for each other only there, and agree each time on whether one of them was stopped by a signal.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from inbatch.runtime import distributed
from inbatch.runtime.process_group import interrupt, interrupted
from inbatch.runtime.signals import Stop, StopRequested


class _Sharing:
    """A context of shared work. stop: signal state; None if each rank handles signals alone."""

    def __init__(self, stop: Stop | None) -> None:
        self.stop, self.agreed = stop, False

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Exchange something, unless a rank was stopped: then StopRequested is raised on all."""
        with nullcontext() if self.stop is None else self.stop.keeping():
            self.agree()
            yield

    def agree(self, number: int = 0) -> None:
        """Raise StopRequested on all ranks if one of them has a signal."""
        if self.stop is not None and (number := distributed.all_reduce_max(number or self.stop.requested or 0)):
            self.agreed = True
            raise StopRequested(number)


_active: list[_Sharing] = []


@contextmanager
def sharing(stop: Stop | None = None) -> Iterator[None]:
    """Share the work in the context between ranks.

    A signal to one rank ends it on all: at once on this one, on the others at their next batch of images.

    Args:
        stop: Signal state in which signals raise StopRequested; None if each rank handles signals alone.
    """
    if distributed.world() == 1 or _active:
        yield
        return
    one = _Sharing(stop)
    _active.append(one)
    try:
        yield
        if stop is not None:
            stop.keep()  # a rank that was stopped after this would leave the others alone in what follows
        one.agree()
    except StopRequested as request:
        if stop is not None and not one.agreed:
            stop.hold()
            interrupt(request.number)
            one.agree(request.number)
        raise
    finally:
        _active.remove(one)


@contextmanager
def alone() -> Iterator[None]:
    """Let this rank do all of the work in the context, inside `sharing`."""
    hidden = _active[:]
    _active.clear()
    try:
        yield
    finally:
        _active.extend(hidden)


def check() -> None:
    """Raise StopRequested if another rank was stopped; to be called between parts of long work."""
    if _active and _active[0].stop is not None and (number := interrupted()):
        raise StopRequested(number)


def span(count: int, size: int) -> range:
    """Return the part of 0, ..., count - 1 that this rank does, cut at multiples of `size`: all of it, alone."""
    if not _active:
        return range(count)
    cuts, rank, world = -(-count // size), distributed.rank(), distributed.world()
    return range(cuts * rank // world * size, min(count, cuts * (rank + 1) // world * size))


def own_tasks(count: int) -> range:
    """Return those of 0, ..., count - 1 that this rank does, spread over all of them: every one, alone."""
    return range(distributed.rank(), count, distributed.world()) if _active else range(count)


def joined(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in their order; a rank may have none, of any width. Carries no gradient."""
    if not _active:
        return x
    with _active[0].exchange():
        return distributed.gather_uneven(x)


def gathered(value: Any) -> list[Any]:
    """Return the values (plain Python objects or numpy) of all ranks, in their order."""
    if not _active:
        return [value]
    with _active[0].exchange():
        return distributed.distribute_tasks(lambda _: value, distributed.world())
