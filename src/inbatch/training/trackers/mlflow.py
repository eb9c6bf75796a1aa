"""MLflow: an SQLite file in the run directory, unless MLFLOW_TRACKING_URI names another store."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from inbatch.training.trackers.tracker import Record, TrackedRun

_MOST = 1000
"""Number of values in one call; MLflow's limit."""
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "crashed": "FAILED"}
"""MLflow's name of a status; "KILLED" for the others."""


class MLflow:
    """Record a run by MLflow's client, which adds neither user, host nor source code to it."""

    _client: Any = None
    _id = ""
    _last: dict[str, int]

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            run.folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{run.folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "inbatch")
        experiment = self._client.get_experiment_by_name(name)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (run.folder / "artifacts").as_uri()
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, place)
        known = self._client.search_runs([number], f"tags.`inbatch.id` = '{run.id}'")
        if known:
            self._id, self._last = known[0].info.run_id, self._steps(known[0])
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=run.name, tags={"inbatch.id": run.id}).info.run_id
        self._last = {}
        params = [Param(key, str(value)) for key, value in run.recipe.items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])

    def _steps(self, known: Any) -> dict[str, int]:
        """Return the last step of every value that the run has."""
        histories = {name: self._client.get_metric_history(known.info.run_id, name) for name in known.data.metrics}
        return {name: max(value.step for value in history) for name, history in histories.items()}

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now, values = round(1000 * time.time()), []
        for record in records:
            step = int(record["step"])
            for name, value in record.items():
                if name != "step" and step > self._last.get(name, -1):
                    self._last[name] = step
                    values.append(Metric(name, value, now, step))
        for first in range(0, len(values), _MOST):
            self._client.log_batch(self._id, metrics=values[first : first + _MOST])

    def close(self, status: str, result: Mapping[str, float]) -> None:
        last = max(self._last.values(), default=0)
        self.log([{"step": last, **result}])
        self._client.set_tag(self._id, "inbatch.status", status)
        self._client.set_terminated(self._id, _STATUS.get(status, "KILLED"))
