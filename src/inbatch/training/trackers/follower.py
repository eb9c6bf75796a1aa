"""Pass the metrics.jsonl of a run to a tracker while it is written.

`python -m inbatch.training.trackers.follower RUN TRACKER ID STEP`; the process ends by itself after the run.
"""

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from inbatch.errors import DataError
from inbatch.runtime.child_processes import STOP_SIGNALS
from inbatch.runtime.files import read_json
from inbatch.training.side_files import parse_record, report_of
from inbatch.training.trackers.selection import available
from inbatch.training.trackers.tracker import Record, TrackedRun, Tracker

_POLL = 1.0
"""Seconds between two looks at metrics.jsonl."""
_PATIENCE = 600
"""Seconds after the end of the run at which a tracker that has not closed is ended."""


def follow(folder: Path, tracker: Tracker, run: TrackedRun, ended: Callable[[float], bool]) -> None:
    """Pass every line of a run's log to a tracker, until the run has ended.

    Args:
        folder: Run directory.
        tracker: The tracker.
        run: Description of the run for it.
        ended: Waits up to this number of seconds; returns whether the run has ended.
    """
    tracker.start(run)
    with open(folder / "metrics.jsonl", "rb") as file:
        rest, over = b"", False
        while not over:
            over = ended(_POLL)
            *lines, rest = (rest + file.read()).split(b"\n")
            if records := list(_records(lines)):
                tracker.log(records)
    status = report_of(folder).get("status", "running")
    result = dict(_figures(_object(folder / "result.json"))) if status == "finished" else {}
    tracker.close("killed" if status == "running" else status, result)


def _records(lines: list[bytes]) -> Iterator[Record]:
    for line in lines:
        record = parse_record(line)
        if record is not None:
            yield {name: math.nan if value is None else value for name, value in record.items()}


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DataError:
        return {}


def described(folder: Path, name: str, identity: str, step: int) -> TrackedRun:
    """Return the description of a run for a tracker."""
    recipe = dict(_flat(_object(folder / "recipe.json")))
    return TrackedRun(identity, folder.name, folder / "trackers" / name, recipe, step)


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a recipe by dotted name; a list is text."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value) if isinstance(value, list) else value


_NO_FIGURES = {
    "recipe", "environment", "earlier_environments", "compared", "calibration", "leak", "per_class", "temperature", "c",
    "tolerance", "largest_gradient",
}  # fmt: skip
"""Entries of a result that say how it was measured, or that have no fixed number of values."""


def _figures(result: Mapping[str, Any], prefix: str = "result/") -> Iterator[tuple[str, float]]:
    """Yield the figures of a result: numbers that are not whole, by their path in it."""
    for key, value in result.items():
        if key in _NO_FIGURES:
            continue
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{key}/")
        elif isinstance(value, float):
            yield prefix + key, value


def main() -> int:
    """Follow the run named by the arguments until a line, or the end, of the standard input."""
    for name in STOP_SIGNALS:  # sent to the whole job; the training ends this process
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    end = threading.Event()
    threading.Thread(target=_wait_for_end, args=(end,), daemon=True).start()
    folder, name, identity, step = Path(sys.argv[1]), *sys.argv[2:]
    try:
        if name not in (trackers := available()):
            raise LookupError("no installed package offers it")
        tracker = trackers[name].load()()
        follow(folder, tracker, described(folder, name, identity, int(step)), end.wait)
    except Exception as error:
        report.write(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        report.flush()
        raise
    return 0


def _wait_for_end(end: threading.Event) -> None:
    sys.stdin.readline()
    end.set()
    if not threading.Event().wait(_PATIENCE):
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
