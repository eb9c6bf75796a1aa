"""Weights & Biases, offline unless WANDB_MODE has another value."""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from inbatch.training.trackers.tracker import Record, TrackedRun

_PRIVATE = {
    "console": "off",
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "program": "inbatch",
    "save_code": False,
    "silent": True,
    "symlink": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Settings that keep the machine, the environment and the output of the process out of the record."""


class WandB:
    """Write a run that `wandb sync` uploads, or upload it at once if WANDB_MODE is online.

    Offline, a resumed run is written again as a whole: `wandb sync` does not merge two folders of one run.
    """

    _run: Any = None
    _after = 0

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # 0.31 contacts its server, also offline
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        for earlier in run.folder.glob(f"offline-run-*-{run.id}"):
            shutil.rmtree(earlier)
        self._after = run.step if mode == "online" else 0
        run.folder.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in _PRIVATE.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "inbatch"), id=run.id, name=run.name, config=dict(run.recipe),
            dir=run.folder.parent, mode=mode, resume="allow" if mode == "online" else None,
            settings=wandb.Settings(**settings),
        )  # fmt: skip

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            if record["step"] > self._after or not self._after:
                self._run.log({name: x for name, x in record.items() if name != "step"}, step=int(record["step"]))

    def close(self, status: str, result: Mapping[str, float]) -> None:
        self._run.summary.update({"status": status, **result})
        self._run.finish(exit_code=0 if status == "finished" else 1)
