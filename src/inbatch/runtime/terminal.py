"""Messages and progress bars for users, on stderr."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from inbatch.runtime.text import printable


class Terminal(Console):
    """Terminal that is silenced on errors: a closed terminal or a full disk does not stop a run."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        self.quiet = True


def note(console: Console, text: str) -> None:
    """Print one line for the user, with unprintable characters escaped."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class Bar:
    """Progress bar at the bottom of an interactive terminal.

    Drawn only by its methods: there is no thread that runs during training or is forked into data workers.
    """

    def __init__(self, console: Console, total: int, done: int = 0) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),  # the remaining width
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            auto_refresh=False,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("starting", total=total, completed=done, text="")
        self._progress.start()

    def show(self, done: float, what: str, text: str) -> None:
        """Draw this much of the total as done, with text before and after the bar."""
        self._progress.update(self._task, completed=done, description=what, text=text, refresh=True)

    def total(self, total: int) -> None:
        """Set the total."""
        self._progress.update(self._task, total=total)

    def close(self) -> None:
        """Release the terminal."""
        self._progress.stop()


@contextmanager
def progress(
    quiet: bool = False,
) -> Iterator[tuple[Callable[[str], None], Callable[[float, int, str, str], None] | None]]:
    """Yield, for tasks of many runs, a function that prints a message and one that draws the overall progress.

    The second takes the amount done, the total, and text before and after the bar. The bar appears at its first
    call; it is None if stderr is not a terminal.
    """
    console = Terminal(stderr=True)
    console.quiet, bars = quiet, list[Bar]()

    def show(done: float, total: int, what: str, text: str) -> None:
        if not bars:
            bars.append(Bar(console, total))
        bars[0].show(done, what, text)

    try:
        yield partial(note, console), show if console.is_interactive and not quiet else None
    finally:
        for bar in bars:
            bar.close()


def counted(
    chunks: Iterable[Sized], total: int, what: str, interval: float = 5.0, quiet: bool = False
) -> Iterator[Any]:
    """Yield the chunks; print to stderr, every `interval` seconds, how many of `total` are done and the time left."""
    console, began, shown, done = Terminal(stderr=True), time.perf_counter(), time.perf_counter(), 0
    console.quiet = quiet
    for chunk in chunks:
        yield chunk
        done, now = done + len(chunk), time.perf_counter()
        if now - shown >= interval:
            left = timedelta(seconds=round((now - began) * (total - done) / done))
            note(console, f"{done:,} of {total:,} images {what}, {left} left")
            shown = now
