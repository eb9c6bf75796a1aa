"""Pretrain and evaluate on the embedded data, and compare with baselines that need no training."""

import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from inbatch.api import Run, pretrain
from inbatch.data import open_data
from inbatch.evaluation import evaluate, raw_pixels
from inbatch.runtime.files import write_json
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of
from inbatch.training.claim import claim, numbered

DATA = "digits-canvas"
EPOCHS = 10
SETTINGS: dict[str, Any] = {"batch_size": 64, "evaluate_every": 5, "schedule.warmup_epochs": 1, "optimizer.lr": 4e-3}
"""Settings that differ from the preset of the data, so that training ends within a minute on two cores.

They are a sixth of the epochs with half the batch, which gives twice as many steps per epoch, at twice the learning
rate.
"""
RAW, UNTRAINED, TRAINED = "raw pixels", "untrained encoder", "trained encoder"


@dataclass(frozen=True)
class Verdict:
    """Result of a quickstart: the run, the evaluation of every representation by name, and the gain.

    Attributes:
        run: The run.
        rows: Evaluations by name of the representation.
        gain: k-NN accuracy of the trained encoder minus that of raw pixels, in points.
        margin: Expected minimum gain, in points.
        seconds: Duration.
    """

    run: Run
    rows: dict[str, dict[str, Any]]
    gain: float
    margin: float
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether the gain is at least the margin."""
        return self.gain >= self.margin

    def sentence(self) -> str:
        """Return the result as a sentence."""
        side = "above" if self.gain >= 0 else "below"
        required = "" if self.reached else f", and {self.margin:g} above are required: train longer (--epochs)"
        return f"On the learned features k-NN is {abs(self.gain):.1f} points {side} raw pixels{required}"

    def json(self) -> dict[str, Any]:
        """Return the content of `quickstart.json`."""
        return {
            "run": str(self.run.directory),
            "gain_points": self.gain,
            "margin_points": self.margin,
            "reached": self.reached,
            "seconds": self.seconds,
            "rows": self.rows,
        }


@isolated
def quickstart(
    out: str | Path = "runs/quickstart",
    *,
    epochs: int | None = None,
    margin: float = 20.0,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> Verdict:
    """Pretrain on `digits-canvas` with SimCLR, and evaluate raw pixels, the untrained and the trained encoder.

    Writes `quickstart.json` in addition to the files of every run.

    Args:
        out: Run directory; a number is appended if it exists.
        epochs: Number of epochs; `EPOCHS` if None.
        margin: Expected minimum gain over raw pixels, in points of k-NN accuracy.
        seed: Random seed.
        device: Name of the device, or "auto".
        quiet: Print no progress.
    """
    began = time.perf_counter()
    chosen = SETTINGS | {"epochs": epochs or EPOCHS}
    folder = claim(chain([path_of(out, "out")], numbered(path_of(out, "out"), 2)))
    try:
        run = pretrain(DATA, "simclr", out=folder, device=device, quiet=quiet, seed=seed, settings=chosen)
    except BaseException:
        with suppress(OSError):  # only if it is still empty
            folder.rmdir()
        raise
    train, test = open_data(DATA, "train"), open_data(DATA, "test")
    rows = {
        RAW: evaluate(None, raw_pixels(train), raw_pixels(test), k=run.recipe.knn_k, seed=seed),
        UNTRAINED: run.result["untrained"],
        TRAINED: run.result["evaluation"],
    }
    gain = 100 * (rows[TRAINED]["knn"]["top1"] - rows[RAW]["knn"]["top1"])
    verdict = Verdict(run, rows, gain, margin, time.perf_counter() - began)
    write_json(run.directory / "quickstart.json", verdict.json())
    return verdict
