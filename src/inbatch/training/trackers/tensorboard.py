"""TensorBoard: event files in the run directory, written by torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from inbatch.training.trackers.tracker import Record, TrackedRun


class TensorBoard:
    """Write event files; after a resume, TensorBoard hides what was logged after the checkpoint."""

    _writer: Any = None

    def start(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run.folder, purge_step=run.step + 1)

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self, status: str = "", result: Mapping[str, float] | None = None) -> None:
        self._writer.close()
