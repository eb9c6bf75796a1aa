"""A run that is written into its own data: it can be resumed and inspected, and the data stay as they were."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import stop_after

import inbatch
from inbatch.apps.reports.batch_context import inspect_run
from inbatch.data import open_data
from inbatch.errors import Preempted


@pytest.mark.slow
def test_resumed_and_inspected(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ["cat", "dog"]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / folders[i % len(folders)]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / folders[i % len(folders)] / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    before = open_data(".").signature()
    settings = {"encoder": "tiny", "batch_size": 8, "epochs": 2, "image_size": 16, "fuse": "conv", "quiet": True}
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        inbatch.pretrain(".", **settings)
    run = tmp_path / "runs" / "simclr-data-1"
    report = inspect_run(run)
    assert report["pictures"] and "16 images" in report["data"]
    inspect_run(run, out="pictures")
    inbatch.pretrain(resume="runs/simclr-data-1", quiet=True)
    assert (run / "curves.png").is_file() and open_data(".").signature() == before
    assert open_data(".").classes == ("cat", "dog")
