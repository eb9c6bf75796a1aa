"""Log a run: numbers to `metrics.jsonl` and TensorBoard, progress to stderr (stdout is for results)."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import SupportsFloat

from rich.console import Console

from inbatch.errors import many
from inbatch.runtime.files import cannot_write, replacing, to_json
from inbatch.runtime.terminal import Bar, Terminal, note
from inbatch.training.side_files import damaged_lines, read_log
from inbatch.training.trackers.tensorboard import TensorBoard
from inbatch.training.trackers.tracker import TrackedRun

_SLOW = 10.0
"""Seconds after which a step is recorded, regardless of the number of steps since the last record."""


class Log:
    """Record the numbers of a run by step; a context manager.

    Args:
        directory: Run directory; None writes no files (every rank except rank 0).
        total_steps: Number of steps of the whole run, resumed or not.
        quiet: Print nothing to stderr; the files are still written.
        resume_step: Step of the checkpoint; later lines are removed from an existing log, all lines if 0.
        tensorboard: Write TensorBoard's files if it is installed.
        untracked: Receives the reason if TensorBoard fails.
        every: Number of steps between two records in the files. In between, values are not read, so a tensor on a GPU
            can be passed at every step without synchronisation.
        interval: Seconds between two lines of progress if stderr is not a terminal.
        console: Output for progress; the terminal if None.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        total_steps: int,
        quiet: bool = False,
        resume_step: int = 0,
        tensorboard: bool = True,
        untracked: dict[str, str] | None = None,
        every: int = 10,
        interval: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self.total_steps, self.every = total_steps, every
        self._console = console or Terminal(stderr=True)
        self._console.quiet = quiet
        self._path = Path(os.devnull) if directory is None else directory / "metrics.jsonl"
        damaged = 0 if directory is None else _truncate(self._path, resume_step)
        try:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        if damaged:
            self.note(damaged_lines(self._path, damaged))

        self._untracked = {} if untracked is None else untracked
        self._tensorboard: TensorBoard | None = None
        if directory is None or not tensorboard:
            pass
        elif importlib.util.find_spec("tensorboard"):
            self._tensorboard = TensorBoard()
            run = TrackedRun("", directory.name, directory / "tensorboard", {}, resume_step)
            self._by_tensorboard(lambda board: board.start(run))
        else:
            self.note('No TensorBoard log: it is not installed (pip install "inbatch[tensorboard]").')

        shown = self._console.is_interactive and not quiet
        self._bar = Bar(self._console, total_steps, resume_step) if shown else None
        self._interval = 0.5 if self._bar else interval

        self._shown = -float("inf")
        self._clock = time.perf_counter()  # start of the period in which _images are counted
        self._images = 0
        self._first: tuple[int, float] | None = None  # the first step here and its end time, for the remaining time
        self._latest: dict[str, float] = {}
        self._epoch = 0

    def step(self, step: int, epoch: int, values: Mapping[str, SupportsFloat], images: int) -> None:
        """Record a completed training step.

        Args:
            step: Number of the step, from 1.
            epoch: Number of the epoch, from 0.
            values: "loss" and other values to record; numbers or 0-dim tensors.
            images: Number of images in the step.
        """
        now, self._epoch = time.perf_counter(), epoch
        self._first = self._first or (step, now)
        self._images += images
        if step % self.every == 0 or step in (1, self.total_steps) or now - self._clock >= _SLOW:
            record = {name: float(value) for name, value in values.items()}
            now = time.perf_counter()  # reading a value waits for the device, and only then is the step done
            record["images_per_second"] = self._images / (now - self._clock)
            self._clock, self._images = now, 0
            self._write({"step": step, "epoch": epoch} | record)
            self._latest |= record
        if now - self._shown >= self._interval or step == self.total_steps:
            if "loss" in values:
                self._latest["loss"] = float(values["loss"])
            self._show(step, now)
            self._shown = now

    def evaluation(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Record and show numbers measured after a step, such as "knn" (a share of 1)."""
        record = {name: float(value) for name, value in values.items()}
        self._write({"step": step} | record)
        self._latest |= record
        if self._bar is None:
            self.note(f"step {step:,}: " + ", ".join(f"{name} {value:.4g}" for name, value in record.items()))
        else:
            self._show(step, time.perf_counter())
        self.reset_throughput()

    def length(self, total_steps: int) -> None:
        """Set a new length of the run."""
        self.total_steps = total_steps
        if self._bar is not None:
            self._bar.total(total_steps)

    def reset_throughput(self) -> None:
        """Exclude the time since the last step from the throughput."""
        self._clock, self._images = time.perf_counter(), 0

    def record(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Record numbers measured after a step without showing them."""
        self._write({"step": step} | {name: float(value) for name, value in values.items()})

    def restore(self, curve: Sequence[Mapping[str, SupportsFloat]]) -> None:
        """Record the evaluations of a checkpoint if the file holds nothing: it was lost."""
        if curve and self._file.tell() == 0:
            for entry in curve:
                self._append(
                    {name: float(value) for name, value in entry.items()} | {"step": int(float(entry["step"]))}
                )
            self.note(f"{self._path} was empty; {many(len(curve), 'evaluation')} of the checkpoint written to it.")

    def note(self, text: str) -> None:
        """Print one line for the user."""
        note(self._console, text)

    def close(self) -> None:
        """Close the files and restore the terminal."""
        with suppress(OSError):  # every line was flushed: the rest could not be written, which has been reported
            self._file.close()
        self._by_tensorboard(TensorBoard.close)
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, record: dict[str, float]) -> None:
        self._append(record)
        self._by_tensorboard(lambda board: board.log([record]))

    def _by_tensorboard(self, call: Callable[[TensorBoard], None]) -> None:
        """Make a call of TensorBoard, if it is used; its failure ends its use, not the run."""
        if self._tensorboard is None:
            return
        try:
            call(self._tensorboard)
        except Exception as error:
            self._tensorboard = None
            self._untracked["tensorboard"] = reason = f"{type(error).__name__}: {error}"
            self.note(f"tensorboard no longer records this run, which continues: {reason}")

    def _append(self, record: dict[str, float]) -> None:
        try:
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _show(self, step: int, now: float) -> None:
        epoch, text = f"epoch {self._epoch + 1}", []
        if "loss" in self._latest:
            text.append(f"loss {self._latest['loss']:.4g}")
        if "images_per_second" in self._latest:
            text.append(f"{self._latest['images_per_second']:,.0f} images/s")
        if "knn" in self._latest:
            text.append(f"k-NN {self._latest['knn']:.1%}")
        first, began = self._first or (step, now)
        if first < step < self.total_steps:
            left = (now - began) / (step - first) * (self.total_steps - step)
            text.append(f"{timedelta(seconds=round(left))} left")
        if self._bar is None:
            self.note("  ".join([epoch, f"step {step:,}/{self.total_steps:,}", *text]))
        else:
            self._bar.show(step, epoch, "  ".join(text))


def elapsed_seconds(path: Path) -> float:
    """Return the seconds that a run had used when its log was last written; 0 if the log does not contain them."""
    seconds = 0.0
    with suppress(OSError):
        for _, record in read_log(path):
            seconds = max(seconds, (record or {}).get("elapsed") or 0.0)
    return seconds


def _truncate(path: Path, step: int) -> int:
    """Keep the lines up to a step, and return the number of damaged ones, which are dropped.

    What a killed run logged after its checkpoint will be logged again.
    """
    if not path.exists():
        return 0
    kept, damaged = [], 0
    try:
        for line, record in read_log(path):
            damaged += record is None
            if record is not None and 0 < step >= record["step"]:
                kept.append(line + b"\n")
    except OSError as error:
        raise cannot_write(path, error) from error
    with replacing(path) as file:
        file.write(b"".join(kept))
    return damaged
