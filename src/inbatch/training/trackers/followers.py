"""The processes that pass a run's log to its trackers, started and ended with the run; none of them can stop it."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from inbatch.runtime import child_processes
from inbatch.training.trackers.selection import Selection

_WAIT = {True: 60.0, False: 5.0}
"""Seconds to wait for the trackers after a finished run, and after one that was stopped and may be killed soon."""


class Followers:
    """The processes of the trackers of a run; a context manager that ends them after the run.

    Args:
        folder: Run directory.
        selection: The trackers.
        untracked: Receives the trackers that fail, with the reason.
    """

    def __init__(self, folder: Path, selection: Selection, untracked: dict[str, str]) -> None:
        self.folder, self.selection, self.untracked = folder.resolve(), selection, untracked
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._note: Callable[[str], None] = lambda sentence: None

    def start(self, step: int, note: Callable[[str], None]) -> None:
        """Start the processes; metrics.jsonl must exist.

        Args:
            step: Step that the run starts from.
            note: Shows a sentence to the user.
        """
        self._note = note
        for name in self.selection.names:
            words = [sys.executable, "-P", "-m", "inbatch.training.trackers.follower"]
            words += [str(self.folder), name, self.selection.id, str(step)]
            try:
                (self.folder / "trackers").mkdir(exist_ok=True)
                with open(self.folder / "trackers" / f"{name}.log", "w") as log:
                    self._processes[name] = child_processes.start_reader(words, log)
            except OSError as error:
                self._fail(name, str(error))

    def check(self) -> None:
        """Report the trackers that have failed since the last call."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[name]
                self._fail(name, _reason(process))

    def close(self, finished: bool) -> None:
        """End the trackers; those that need longer continue without this process."""
        for process in self._processes.values():
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.write("end\n")
                process.stdin.close()
        until = time.monotonic() + _WAIT[finished]
        for name, process in self._processes.items():
            try:
                code = process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._note(f"{name} still records the run, in process {process.pid}, which will end by itself.")
                continue
            reason = _reason(process)
            if code:
                self._fail(name, reason)
        self._processes = {}

    def _fail(self, name: str, reason: str) -> None:
        self.untracked[name] = reason
        self._note(f"{name} no longer records this run, which continues: {reason}")

    def __enter__(self) -> "Followers":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close(kind is None)


def _reason(process: "subprocess.Popen[str]") -> str:
    """Return why a process ended: the exception that it reports, or its exit code."""
    assert process.stdout is not None
    with process.stdout, suppress(OSError, ValueError):
        if text := process.stdout.read().strip():
            return text
    return f"its process ended with code {process.returncode}"
