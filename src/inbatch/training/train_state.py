"""Training state of a run without its components, saved with every checkpoint."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


def _whole(x: Any) -> bool:
    return type(x) is int and x >= 0


def _number(x: Any) -> bool:
    return type(x) in (int, float)


def _seconds(x: Any) -> bool:
    return _number(x) and 0 <= x < math.inf


def _mapping(x: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(isinstance(key, str) and valid(value) for key, value in x.items())


def _sentences(x: Any) -> bool:
    return isinstance(x, dict) and all(_whole(key) and isinstance(value, str) for key, value in x.items())


def _evaluation(x: Any) -> bool:
    return _mapping(x, _number) and _whole(x.get("step")) and _seconds(x.get("epoch"))


def _calibration(x: Any) -> bool:
    """Return whether a value is the timings of a budget (`budget_plan.Choice.json`), or None."""
    if x is None:
        return True
    if not isinstance(x, dict) or not isinstance(x.get("tried"), list) or not _seconds(x.get("small")):
        return False
    if not (_seconds(x.get("plain", 1.0)) and _seconds(x.get("survey", 0.0))):  # absent in earlier checkpoints
        return False
    tried = x["tried"]
    if not all(isinstance(one, dict) and _seconds(one.get("seconds")) for one in tried):
        return False
    return x.get("chosen") in [one.get("name") for one in tried]


_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_whole, "a number of steps"),
    "ended": (_whole, "a number of epochs"),
    "best": (lambda x: _number(x) and (x == -math.inf or 0 <= x <= 1), "an accuracy"),
    "curve": (lambda x: isinstance(x, list) and all(map(_evaluation, x)), "a list of evaluations"),
    "loss": (lambda x: isinstance(x, torch.Tensor) and x.shape == () and x.dtype == torch.float64, "a float64 tensor"),
    "seconds": (_seconds, "a number of seconds"),
    "images": (_whole, "a number of images"),
    "most": (lambda x: _mapping(x, _number), "a dict of numbers"),
    "collapsed": (lambda x: _mapping(x, lambda text: isinstance(text, str)), "a dict of sentences"),
    "leak": (lambda x: _mapping(x, _number), "a dict of numbers"),
    "data": (lambda x: isinstance(x, str), "a signature"),
    "before": (_seconds, "a number of seconds"),
    "calibration": (_calibration, "the timings of a budget"),
    "judged": (lambda x: isinstance(x, list) and len(x) in (0, 3) and all(map(_whole, x)), "three numbers of images"),
    "threads": (lambda x: isinstance(x, list) and all(_whole(n) and n > 0 for n in x), "numbers of threads"),
    "machines": (lambda x: isinstance(x, list) and all(isinstance(one, dict) for one in x), "a list of machines"),
    "cpu_seconds": (lambda x: _number(x) and not x < 0, "a number of seconds"),
    "unreadable": (_sentences, "a dict of sentences by number"),
    "stopped": (lambda x: x is None or isinstance(x, str), "a reason"),
}
"""Entries of a saved state, each with the test of its value and a description."""
_LATER = ("calibration", "judged", "threads", "machines", "cpu_seconds", "unreadable", "stopped")
"""Entries that checkpoints of earlier versions do not have."""


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
        unreadable: Unreadable streamed images so far, with the reason: those of the loader.
        stopped: Why a callback has ended the run.
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
    unreadable: dict[int, str] = field(default_factory=dict)
    stopped: str | None = None
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
        used = {"threads": list(self.threads), "machines": list(self.machines), "unreadable": dict(self.unreadable)}
        clocks = {"before": self.wall, "cpu_seconds": self.cpu_seconds}
        return kept | plan | used | clocks | {"stopped": self.stopped}

    @staticmethod
    def problems(state: Mapping[str, Any]) -> list[str]:
        """Return a phrase for every entry of a saved state that is missing, or has another type or range."""
        problems = [f"{key} is missing" for key in _VALID if key not in state and key not in _LATER]
        for key, (valid, wanted) in _VALID.items():
            if key in state and not valid(state[key]):
                problems.append(f"{key} is {state[key]!r:.60}, not {wanted}")
        return problems

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        for name in (*self._KEPT, "before"):
            setattr(self, name, state[name])
        self.saved = self.step, self.ended
        self.calibration = state.get("calibration")
        self.sizes = EvaluationSizes(*sizes) if (sizes := state.get("judged")) else None
        self.threads[:] = state.get("threads", [])  # checkpoints of earlier versions have neither
        self.machines[:] = state.get("machines", [])
        self.unreadable.update(state.get("unreadable", {}))
        self.stopped = state.get("stopped")
        self.cpu_seconds = state.get("cpu_seconds", math.nan)  # absent from checkpoints of earlier versions
