"""VICReg's variance term added to any method's loss (`variance` in a recipe)."""

from pathlib import Path

import pytest
import torch
from rank_pool import on_ranks
from safetensors.torch import load_file

import inbatch
from inbatch.api import prepare
from inbatch.methods.vicreg import vicreg
from inbatch.nn.functional import variance_hinge


def test_variance_term_is_that_of_vicreg() -> None:
    z = torch.randn(2, 7, 5, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0])
    terms = [max(0.0, 1 - (float(z[v, :, j].var()) + 1e-4) ** 0.5) for v in range(2) for j in range(5)]
    torch.testing.assert_close(variance_hinge(z), torch.tensor(sum(terms) / 10, dtype=torch.float64))
    torch.testing.assert_close(variance_hinge(z), vicreg(z)["variance"])


@pytest.mark.grid(2)
@pytest.mark.parametrize("method", ["moco", "byol", "swav", "supervised"])
def test_the_loss_grows_by_it(method: str) -> None:
    """The first step of a run, with and without: the same rows, and a loss that is larger by the weighted term."""
    shared = {"subset": 32, "batch_size": 16, "precision": "float32", "device": "cpu"}
    with_, without = (
        prepare("digits-canvas", method, settings={"variance_weight": variance}, **shared) for variance in (3.0, 0.0)
    )
    batches = [next(iter(built.loader.epoch(0))) for built in (with_, without)]
    more, plain = (built.step(batch, 0) for built, batch in zip((with_, without), batches, strict=True))
    assert "narrowness" not in plain and more["narrowness"] > 0
    torch.testing.assert_close(more["loss"], plain["loss"] + 3 * more["narrowness"])
    assert more["grad_norm"] != plain["grad_norm"]


def job(out: str) -> None:
    inbatch.pretrain(
        "digits-canvas", "byol", out=out, subset=80, batch_size=40, context=20, epochs=2, precision="float32",
        quiet=True,
        settings={"variance_weight": 1.0},
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    """The term is computed over the rows of the whole batch, for any number of ranks."""
    job(str(tmp_path / "one"))
    on_ranks(2, job, str(tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("one", "two"))
    # The first norm of the projection removes the last bias: its gradient is 0, and AdamW amplifies its rounding.
    for key in one.keys() - {"7.bias"}:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)
