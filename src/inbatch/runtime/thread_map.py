"""Map over threads that a signal can leave at once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from inbatch.runtime.resources import cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_map(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """Yield the results of `work` on all items, in their order, computed by `threads` threads, by default one per core.

    If the consumer ends by an exception, for example that of a signal, tasks that have not begun are cancelled, and
    those that run are not waited for.
    """
    pool, complete = ThreadPoolExecutor(threads or cores()), False
    try:
        yield from pool.map(work, items)
        complete = True
    finally:
        pool.shutdown(wait=complete, cancel_futures=True)
