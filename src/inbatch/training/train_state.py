"""Training state of a run without its components, saved with every checkpoint."""

import math
import time
from dataclasses import astuple, dataclass, field
from typing import Any

import torch


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class EvaluationSizes:
    """Numbers of images that the evaluations of a run with a budget use: bank, queries, and compared at the end."""

    bank: int
    queries: int
    compared: int


@dataclass
class TrainState:
    """Training state of a run without its components, saved with every checkpoint; it does not affect what is learned.

    Attributes:
        step: Number of completed steps.
        ended: Number of epochs after which the features have been evaluated.
        best: Highest k-NN accuracy of the online evaluation so far.
        curve: Entries of the online evaluation so far.
        loss: Sum of the steps' losses since the last evaluation, () float64 on the device: no step waits to add its
            own.
        seconds: Wall time of training alone.
        cpu_seconds: CPU time of training alone, over all threads of this process.
        images: Number of images of training alone.
        before: Seconds of wall time before this process.
        most: Largest diversity of outputs so far.
        collapsed: Collapsed outputs, with a sentence for each.
        leak: How well an embedding identified its context group at the last evaluation.
        data: Number of training images, and the signature of their names and labels.
        calibration: How the recipe was chosen for its budget.
        sizes: Numbers of images of the evaluations, with a budget; kept after a resume.
        threads: Every number of threads used for computation, in the order of first use.
        machines: Environments of the processes of the run (`machine.machine`), successive equal ones once.
        began: Start time (`time.perf_counter`).
        saved: `step` and `ended` of the last checkpoint on the disk.
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
    sizes: EvaluationSizes | None = None
    threads: list[int] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    saved: tuple[int, int] = (0, 0)

    _KEPT = ("step", "ended", "best", "curve", "loss", "seconds", "images", "most", "collapsed", "leak", "data")

    @property
    def wall(self) -> float:
        """Seconds of wall time, everything included, over all processes of the run."""
        return self.before + time.perf_counter() - self.began

    def cost(self) -> dict[str, float]:
        """Return the cost of training so far, under the names of the log."""
        return {"training_seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "images": self.images}

    def mean_loss(self) -> dict[str, float]:
        """Return the mean loss since the last evaluation, under its name in the curve; empty if there were no steps."""
        steps = self.step - (self.curve[-1]["step"] if self.curve else 0)
        total, self.loss = self.loss, _zero()
        return {"loss": float(total) / steps} if steps else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        kept = {name: getattr(self, name) for name in self._KEPT}
        plan = {"calibration": self.calibration, "judged": list(astuple(self.sizes)) if self.sizes else []}
        used = {"threads": list(self.threads), "machines": list(self.machines)}
        return kept | plan | used | {"before": self.wall, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        for name in (*self._KEPT, "before"):
            setattr(self, name, state[name])
        self.saved = self.step, self.ended
        self.calibration = state.get("calibration")
        self.sizes = EvaluationSizes(*sizes) if (sizes := state.get("judged")) else None
        self.threads[:] = state.get("threads", [])  # checkpoints of earlier versions have neither
        self.machines[:] = state.get("machines", [])
        self.cpu_seconds = state.get("cpu_seconds", math.nan)  # absent from checkpoints of earlier versions
