"""What a run remembers besides its parts: saved with every checkpoint."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class TrainState:
    """What a run remembers besides its parts, saved with every checkpoint; nothing here decides what is learned.

    step: steps that are done. ended: epochs after which the features have been looked at.
    loss: the sum of the steps' losses since the last look, () float64 on the device: no step waits to add its own.
    seconds, cpu_seconds, images: of training alone; cpu_seconds are those of the processor, over all threads of this
        process. before: seconds of wall time before this process.
    most: how different outputs have been at best. collapsed: what no longer is, in sentences.
    leak: how well an embedding told its context group at the last look.
    data: how many images it learns from, and the signature of their names and labels.
    saved: `step` and `ended` of the last checkpoint on the disk.
    calibration: how the recipe was chosen for its budget.
    judged: with a budget, images of the bank, queries, and images compared at the end: as many after a resume.
    threads: every number of threads that it computed with, in the order of their first use.
    """

    step: int = 0
    ended: int = 0
    best: float = -math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    loss: torch.Tensor = field(default_factory=_zero)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    images: int = 0
    before: float = 0.0
    most: dict[str, float] = field(default_factory=dict)
    collapsed: dict[str, str] = field(default_factory=dict)
    leak: dict[str, float] = field(default_factory=dict)
    data: str = ""
    calibration: dict[str, Any] | None = None
    judged: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    saved: tuple[int, int] = (0, 0)

    _KEPT = ("step", "ended", "best", "curve", "loss", "seconds", "images", "most", "collapsed", "leak", "data")

    @property
    def wall(self) -> float:
        """Seconds of wall time, everything included, over all processes that went on with the run."""
        return self.before + time.perf_counter() - self.began

    def cost(self) -> dict[str, float]:
        """Return what training has cost so far, named as in the log."""
        return {"training_seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "images": self.images}

    def mean_loss(self) -> dict[str, float]:
        """The mean loss of the steps since the last look, named as a curve does; nothing where there were none."""
        steps = self.step - (self.curve[-1]["step"] if self.curve else 0)
        total, self.loss = self.loss, _zero()
        return {"loss": float(total) / steps} if steps else {}

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in self._KEPT}
        told = {"calibration": self.calibration, "judged": list(self.judged)}
        return kept | told | {"before": self.wall, "threads": list(self.threads), "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in (*self._KEPT, "before"):
            setattr(self, name, state[name])
        self.saved = self.step, self.ended
        self.calibration, self.judged = state.get("calibration"), list(state.get("judged", []))
        self.threads[:] = state.get("threads", [])  # checkpoints of earlier versions have none
        self.cpu_seconds = state.get("cpu_seconds", math.nan)  # a checkpoint from before they were counted
