"""Being asked to stop: a signal sets a flag, and the training loop looks at it between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

# SIGUSR1 is SLURM's warning before the time limit, SIGHUP a terminal or connection that is gone; Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name))
_HANGUP = getattr(signal, "SIGHUP", None)


class Ended(SystemExit):
    """A signal asks this process to end. The exit code is 128 + its number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


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
    """Collect SIGTERM, SIGUSR1, SIGINT and SIGHUP in a flag; afterwards the old handlers are back.

    A third Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers, the flag
    is never set.
    """
    stop = Stop()
    with _handled(stop._handle):
        yield stop


@contextmanager
def end_on_signals(error: Callable[[int], BaseException]) -> Iterator[None]:
    """Raise `error(number)` if one of SIGNALS comes: for work that may be dropped and done again."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise error(number)

    with _handled(handle):
        yield


def ending() -> AbstractContextManager[None]:
    """Raise `Ended`, or KeyboardInterrupt for SIGINT, if one of SIGNALS comes, so that children end."""
    return end_on_signals(lambda number: KeyboardInterrupt() if number == signal.SIGINT else Ended(number))


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # nohup ignores SIGHUP so that the program outlives its terminal.
    wanted = [number for number in SIGNALS if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            # None: a handler that was not set from Python cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
