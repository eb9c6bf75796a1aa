"""Every method trains on real images."""

from pathlib import Path

import pytest

import inbatch
from inbatch.methods import METHODS


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, tmp_path: Path) -> None:
    """Handwritten digits: k-NN at least 15 points above the same encoder untrained, after a few seconds."""
    settings = {"epochs": 10, "evaluate_every": 10, "seed": 1, "quiet": True, "precision": "float32"}
    if method == "relation":
        inbatch.pretrain("digits-canvas", "simclr", out=tmp_path / "teacher", **settings)
        settings["teacher"] = tmp_path / "teacher"
    run = inbatch.pretrain("digits-canvas", method, out=tmp_path / "run", **settings)
    untrained, trained = (run.result["curve"][i]["knn"] for i in (0, -1))
    assert trained > untrained + 0.15, (untrained, trained)
    assert run.result["evaluation"]["knn"]["top1"] == pytest.approx(trained, abs=0.01)
