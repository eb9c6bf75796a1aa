"""What a run remembers of itself and tells of itself: its progress, run.json, the images it could not read."""

import contextlib
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inbatch import ranks
from inbatch.build import Built
from inbatch.capture import FOLDER
from inbatch.data import lost_workers
from inbatch.errors import InbatchError, Interrupted, Preempted, RankError, unreadable
from inbatch.files import out_of_room, replacing, write_json
from inbatch.log import Log
from inbatch.signals import StopRequested


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Progress:
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


class Report:
    """run.json: whether the run goes on, ended or failed, and why."""

    def __init__(self, out: Path, built: Built, progress: Progress, main: bool) -> None:
        self.path, self.built, self.progress, self.main = out / "run.json", built, progress, main
        self.fixed: dict[str, Any] = {"command": built.recipe.command()}
        self.fixed |= {"context": built.context, "world": ranks.world()}

    def status(self, status: str, reason: str | None = None) -> None:
        if self.main:
            (self.path.parent / "checkpoints").mkdir(parents=True, exist_ok=True)
            now = {
                "status": status,
                "reason": reason,
                "last_step": self.progress.step,
                "threads": self.progress.threads,
                "steps": self.built.total,  # a budget may change the length
            }
            write_json(self.path, now | self.fixed)

    @contextlib.contextmanager
    def verdict(self) -> Iterator[None]:
        """What ends the run in here is written down: by rank 0, or the first of those left where that is lost."""
        try:
            with ranks.shared_errors(), lost_workers(), out_of_room(self.path.parent):
                yield
        except InbatchError as error:
            self.main |= isinstance(error, RankError) and error.speaks
            self.ended(error)
            raise
        except StopRequested as error:
            self._ended("interrupted" if error.number == signal.SIGINT else "preempted", str(error))
            raise
        except BaseException as error:
            self._ended("crashed", f"{type(error).__name__}: {error}")
            raise

    def ended(self, error: InbatchError) -> None:
        """Write that the run ended by an error for people."""
        kinds = {Preempted: "preempted", Interrupted: "interrupted"}
        self._ended(kinds.get(type(error), "failed"), str(error))

    def _ended(self, status: str, reason: str) -> None:
        with contextlib.suppress(InbatchError):  # the reason itself matters more than that the disk is full
            self.status(status, reason)


def tell_bad(built: Built, out: Path, log: Log, told: int) -> int:
    """Make known on every rank which images could not be read so far, list them all, and say what is new after the
    first `told`; how many there are now."""
    loader = built.loader
    for bad in ranks.spread(lambda _: loader.bad, ranks.world()):
        loader.note(bad)
    found = loader.unreadable()
    if ranks.rank() or len(found) == told:
        return len(found)
    new = found[told:]
    with replacing(out / "bad_images.txt") as file:
        file.write("".join(f"{sentence}\n" for sentence in found).encode(errors="backslashreplace"))
    log.note(
        f"{unreadable(len(new))} left out"
        + ("" if loader.held else " (their places went to the images that stand there in the next batch)")
        + f": {'; '.join(new[:3])}. All of them are in {out / 'bad_images.txt'}"
    )
    return len(found)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU where it trained on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clear(out: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else."""
    for name in ("checkpoints", "initial", "encoder", "heads", "tensorboard", "inspect", FOLDER):
        shutil.rmtree(out / name, ignore_errors=True)
    files = ("recipe.json", "run.json", "metrics.jsonl", "curves.png", "result.json", "bad_images.txt")
    for name in (*files, "evaluation.json", "quickstart.json", "neighbours.png"):
        (out / name).unlink(missing_ok=True)
