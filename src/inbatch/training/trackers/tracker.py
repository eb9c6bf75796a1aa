"""Protocol of a tracker, and the description of the run that it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = Mapping[str, float]
"""A line of metrics.jsonl: the number of the "step", and values; nan for one that JSON does not support."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker records.

    Attributes:
        id: Identifier of the run, 16 characters, the same after a resume.
        name: Name of the run directory.
        folder: Where the tracker can keep files; it need not exist.
        recipe: Settings of the run by dotted name; numbers, strings, booleans and None.
        step: Step that the run starts from; 0 unless it is resumed.
    """

    id: str
    name: str
    folder: Path
    recipe: Mapping[str, Any]
    step: int


class Tracker(Protocol):
    """Record a run with another library.

    A tracker of another package is a class without arguments that this protocol describes, with an entry point in the
    group "inbatch.trackers". All methods are called in one process, which is not that of the training: an exception or
    a delay does not affect the run.
    """

    def start(self, run: TrackedRun) -> None:
        """Begin to record a run, or continue with one of the same id."""

    def log(self, records: Sequence[Record]) -> None:
        """Record lines of metrics.jsonl, in their order.

        A resumed run passes all lines up to its checkpoint again; the tracker must not record a step twice.
        """

    def close(self, status: str, result: Mapping[str, float]) -> None:
        """Record the end of the run.

        Args:
            status: finished, preempted, interrupted, failed, crashed, or killed if the run recorded no end.
            result: Figures of a finished run, by names such as "result/evaluation/knn/top1"; empty for another status.
        """
