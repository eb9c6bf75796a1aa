"""Bright horizontal or vertical bars in noise: two classes, as a source, a file, and a run trained on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import Pictures
from small_runs import leave_out_evaluation
from typer.testing import CliRunner, Result

import inbatch
from inbatch.apps.cli import app


def bars(n: int = 60, seed: int = 0, size: int = 20, channels: int = 1) -> Pictures:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (n, channels, size, size), generator=draw, dtype=torch.uint8)
    for i, at in enumerate(torch.randint(2, size - 2, (n,), generator=draw).tolist()):
        images[i, :, at - 1 : at + 1] += 120
        if i % 2:
            images[i] = images[i].mT.clone()
    return Pictures(list(images), [i % 2 for i in range(n)], "bars")


def bars_file(path: Path, **options: int) -> Path:
    """Write a .npz file of 40 training and 20 test images."""
    train, test = bars(40, **options), bars(20, seed=1, **options)
    images = {"x_train": torch.stack(train.images), "x_test": torch.stack(test.images)}
    labels = {"y_train": train.labels, "y_test": test.labels}
    np.savez(path, **{name: value.numpy() for name, value in (images | labels).items()})
    return path


def bars_run(folder: Path, **options: int) -> Path:
    """Return the directory of a run of one epoch."""
    file = bars_file(folder / "bars.npz", **options)
    channels = options.get("channels", 1)
    settings = {
        "batch_size": 20,
        "epochs": 1,
        "encoder": "tiny",
        "image_size": 20,
        "channels": channels,
        "views": "simclr_cifar",
    }
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        inbatch.pretrain(str(file), "simclr", out=folder / "run", quiet=True, **settings)
    return folder / "run"


def command(line: str) -> Result:
    return CliRunner().invoke(app, line.split(), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})
