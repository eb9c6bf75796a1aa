"""Map over threads that a signal can leave at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from inbatch.runtime.resources import cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 8  # tasks per thread that are begun or wait, or whose results the consumer has not taken


def thread_map(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """Yield the results of `work` on all items, in their order, computed by `threads` threads, by default one per core.

    Items are taken as the consumer takes results, so that results do not accumulate in memory if it is slow. If it ends
    by an exception, for example that of a signal, tasks that have not begun are cancelled, and those that run are not
    waited for.
    """
    threads = threads or cores()
    pool, complete = ThreadPoolExecutor(threads), False
    tasks: deque[Future[Result]] = deque()  # Python 3.14 has Executor.map(buffersize=...) for this
    try:
        for item in items:
            tasks.append(pool.submit(work, item))
            if len(tasks) == _AHEAD * threads:
                yield tasks.popleft().result()
        while tasks:
            yield tasks.popleft().result()
        complete = True
    finally:
        pool.shutdown(wait=complete, cancel_futures=True)
