"""trackio: a database in the run directory, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from inbatch.training.trackers.tracker import Record, TrackedRun


class Trackio:
    """Record a run by trackio.

    trackio adds the steps of a resumed run to those that it has. A run in a local database is therefore removed and
    written again; to a server, only what follows the checkpoint is sent.
    """

    _run: Any = None
    _after = 0
    _step = 0

    def start(self, run: TrackedRun) -> None:
        remote = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        os.environ.setdefault("TRACKIO_DIR", str(run.folder))  # read when trackio is imported
        if not remote:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it asks the hub for the name of the user
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", "inbatch"), f"{run.name}-{run.id}"
        self._after = run.step if remote else 0
        if not remote:
            _remove(trackio.Api(), project, name)
        self._run = trackio.init(
            project, name=name, config=dict(run.recipe), resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            self._step = int(record["step"])
            if self._step > self._after or not self._after:
                self._run.log({name: value for name, value in record.items() if name != "step"}, step=self._step)

    def close(self, status: str, result: Mapping[str, float]) -> None:
        self._run.log({"status": status, **result}, step=self._step)
        self._run.finish()


def _remove(api: Any, project: str, name: str) -> None:
    """Remove the run of this name from the local database."""
    with suppress(ValueError):  # there is no such project yet
        for known in [run for run in api.runs(project) if run.name == name]:
            known.delete()
