"""Stop signals: they raise in work that may be lost, and set a flag in work that must be finished.

In the program `inbatch`, a watchdog thread also ends the process if the main thread does not respond in time, because
Python runs no signal handler while the main thread is inside one long library call.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import NoReturn

from inbatch.errors import InbatchError, Interrupted, Preempted
from inbatch.runtime.child_processes import STOP_SIGNALS
from inbatch.runtime.unfinished import remove_unfinished

SIGNALS = tuple(getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name))

ACKNOWLEDGED = 0.5
"""Seconds after which a signal is acknowledged, if the process has not ended by then."""
GRACE = 3.0
"""Seconds after which a training step that was expected to end soon is abandoned."""
LIMIT = 5.0
"""Seconds after which the watchdog acts; `docker stop` kills after 10, and a checkpoint must be written before."""

finishing = threading.RLock()
"""Held during work that must be finished before the process may end."""


class StopRequested(KeyboardInterrupt):
    """Raised in the main thread by a signal, in work that may be lost; no `except Exception` catches it.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def stopped(number: int, where: str) -> InbatchError:
    """Return the error of a process that was stopped by a signal: Interrupted for Ctrl-C, else Preempted."""
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(f"stopped by {signal.Signals(number).name} {where}")


def without_result(number: int) -> InbatchError:
    """Return the error of a command that was stopped before it had a result."""
    return stopped(number, "before there was a result; run the same command to start again")


class Stop:
    """Whether a signal requested this process to stop, and which one: the first one counts.

    It starts held: signals only set `requested`. In a fork of the process, such as a data worker that has not set its
    own handlers yet, they do nothing. quick: the work is expected to end within `GRACE` seconds, so the
    first signal does not raise; a second one does, and so does `check` after that time.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.quick = False
        self._process = os.getpid()
        self._raises = self._locked = False
        self._since = 0.0
        self._interrupts = 0

    def hold(self) -> None:
        """Start work that must be finished: signals only set the flag, and the watchdog waits."""
        self._raises = False
        if not self._locked:
            finishing.acquire()
            self._locked = True

    def release(self) -> None:
        """Start work that may be lost: a signal, also an earlier one, raises StopRequested."""
        self.quick = False
        if self._locked:
            self._locked = False
            finishing.release()
        self._raises = True
        if self.requested is not None:
            self._raise()

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Do work that may be lost within work that must be finished: signals raise, and the watchdog still waits."""
        self._raises, self.quick = True, False
        try:
            if self.requested is not None:
                self._raise()
            yield
        finally:
            self._raises = False

    def keep(self) -> None:
        """From here on, signals only set the flag."""
        self._raises = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Do work that must be finished within work that may be lost: signals raise after it."""
        raises, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = raises
        if raises and self.requested is not None:
            self._raise()

    def check(self) -> None:
        """Raise StopRequested if a signal has waited for `GRACE` seconds, in work that may be lost."""
        if self.requested is not None and self._raises and time.monotonic() - self._since >= GRACE:
            self._raise()

    def _raise(self) -> None:
        assert self.requested is not None
        self._raises = False  # once: its handling must be finished
        raise StopRequested(self.requested)

    def _close(self, outer: object) -> None:
        self._raises = False
        if isinstance(outer, Stop) and self.requested is not None:  # handled here: it must not raise in the outer Stop
            outer.requested, outer._interrupts, outer._raises = self.requested, self._interrupts, False
        if self._locked:
            self._locked = False
            finishing.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        first = self.requested is None
        if first:
            self.requested, self._since = number, time.monotonic()
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts == 2:
                # The kernel ends the process at the third, even if Python cannot act (a stuck collective).
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._raises and not (first and self.quick):
            self._raise()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Collect `SIGNALS` in a Stop; restore the previous handlers on exit.

    A third Ctrl-C ends the process immediately. A signal that is ignored (SIGHUP under nohup) stays ignored, except
    SIGINT, which shells ignore in the background. Outside the main thread, where Python allows no handlers, the flag is
    never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ignored = {n for n in SIGNALS if n not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(n) == signal.SIG_IGN}
    old = {number: signal.signal(number, stop._handle) for number in SIGNALS if number not in ignored}
    try:
        yield stop
    finally:
        stop._close(getattr(old[signal.SIGTERM], "__self__", None))
        for number, handler in old.items():
            # None: a handler that was not set from Python cannot be restored from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ending() -> Iterator[None]:
    """Run work that may be lost, with child processes: any of SIGNALS raises StopRequested, so that they are ended."""
    with stop_on_signals() as stop:
        stop.release()
        yield


class Watchdog:
    """Acknowledges a signal, and ends the process `LIMIT` seconds after the first one, unless it has ended by then.

    It waits for work that must be finished (`finishing`), calls `answer` for the error that states the lost work, which
    may write a checkpoint, reports the error and exits with its code. Data workers end with the process.
    """

    def __init__(self) -> None:
        self.answer: Callable[[int], InbatchError] = without_result
        self.report: Callable[[InbatchError], None] = lambda error: None
        self.acknowledge: Callable[[int], None] = lambda number: None
        self.reported = False
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the context. In the main thread only."""
        self._over.clear()
        reader, writer = os.pipe()
        if hasattr(os, "set_blocking"):  # not on Windows before Python 3.12
            os.set_blocking(writer, False)
        # The C handler writes the number of the signal: that of Python does not run inside a long call.
        old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            signal.set_wakeup_fd(old)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _watch(self, reader: int) -> None:
        number = 0
        while number not in SIGNALS:
            read = os.read(reader, 1)
            if not read:
                return
            number = read[0]
        if self._over.wait(ACKNOWLEDGED):
            return
        self.acknowledge(number)
        if self._over.wait(LIMIT - ACKNOWLEDGED):
            return
        with finishing:
            if not self._over.is_set():
                self._end(number)

    def _end(self, number: int) -> None:
        try:
            error = self.answer(number)
        except Exception as problem:  # for example a full disk; the process still ends
            error = problem if isinstance(problem, InbatchError) else InbatchError(repr(problem))
        if not self.reported:
            self.report(error)
        leave(error.exit_code)


watchdog = Watchdog()
"""Watchdog of the program; in other processes (a notebook, a script) it is inactive: inbatch must not end those."""


def complete() -> None:
    """Ignore further signals, because the result of the program is complete; Ctrl-C still ends it.

    The regular exit of Python takes seconds on a busy machine, and a signal must not change the exit code there.
    """
    for number in SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)


def leave(code: int) -> NoReturn:
    """End the process and its data workers immediately, and remove the files that it has not finished.

    A regular exit of Python takes seconds on a busy machine.
    """
    workers = sys.modules.get("multiprocessing")  # not imported only for this
    for child in workers.active_children() if workers else ():
        child.kill()
    remove_unfinished()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextmanager
def answered_in_time(
    report: Callable[[InbatchError], None], acknowledge: Callable[[int], None] = lambda number: None
) -> Iterator[Stop]:
    """Let the watchdog supervise the program; its signals set the Stop that is yielded, which starts held.

    Args:
        report: prints the error of a process that the watchdog ends.
        acknowledge: reports a signal to which the process does not respond at once.
    """
    watchdog.report, watchdog.reported, watchdog.answer = report, False, without_result
    watchdog.acknowledge = acknowledge
    main = threading.current_thread() is threading.main_thread()
    with stop_on_signals() as stop, watchdog.watching() if main else nullcontext():
        yield stop
