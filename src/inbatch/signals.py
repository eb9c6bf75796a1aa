"""Being asked to stop: a signal sets a flag, and the training loop looks at it between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is SLURM's warning before the time limit; Windows has none.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))


class Stop:
    """Whether this process was asked to stop, and by which signal: the first one counts."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._interrupts = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                # The kernel ends the process at the third, even where Python has no say (a stuck collective).
                signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Collect SIGTERM, SIGUSR1 and SIGINT in a flag; afterwards the old handlers are back.

    A third Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers, the flag
    is never set.
    """
    stop = Stop()
    with _handled(stop._handle):
        yield stop


@contextmanager
def end_on_signals(error: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise `error(number)` where SIGTERM, SIGUSR1 or SIGINT comes: for work that may be dropped and done again."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise error(number)

    with _handled(handle):
        yield


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            # None: a handler that was not set from Python cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
