"""MMCR: vectors of the authors' code with and without a target network, and the equation as loops."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled

from inbatch.losses import mmcr
from inbatch.methods.mmcr import MMCR, nuclear_norm
from inbatch.nn.functional import normalize


@DTYPES
@pytest.mark.parametrize("name", ["mmcr__1", "mmcr__momentum"])
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    """The authors add the local norms of the samples, inbatch averages them."""
    case = Case(golden, name, dtype)
    o = case.options
    slow = name.endswith("momentum")
    z = case.leaf("z")
    views = (o["batch"], o["views"], o["dim"])
    target = {"projection": case["z_m"].view(views).transpose(0, 1)} if slow else {}
    method = MMCR(o["lmbda"], momentum=0.99 if slow else 0.0)
    assert method.target == (("projection",) if slow else ())
    losses = method.loss({"projection": z.view(views).transpose(0, 1)}, target, unlabelled(o["batch"]))
    case.check(losses["loss"], "loss")
    case.check(losses["global"], "global_nuc")
    case.check(losses["local"] * o["batch"], "local_nuc")
    losses["loss"].backward()
    case.check(z.grad, "grad_z")


@DTYPES
def test_vectors_of_lightly(golden: Path, dtype: torch.dtype) -> None:
    """Its local term has the rows of both networks; the caller normalises, so the gradient is that of unit rows."""
    case = Case(golden, "mmcr__momentum", dtype)
    o = case.options
    views = (o["batch"], o["views"], o["dim"])
    unit = normalize(case["z"].view(views)).requires_grad_()
    z_m = case["z_m"].view(views).transpose(0, 1)
    loss = mmcr(unit.transpose(0, 1), z_m, o["lmbda"], "all")["loss"]
    case.check(loss, "loss_lightly")
    loss.backward()
    expected = case["grad_zn_lightly"]
    along = expected - (expected * unit.detach()).sum(-1, keepdim=True) * unit.detach()  # what inbatch normalises
    torch.testing.assert_close(unit.grad, along, **case.tolerance)


def test_the_equation_as_loops() -> None:
    """Nuclear norms are traces of the roots of Gram matrices; the gradient equals finite differences."""
    g = torch.Generator().manual_seed(0)
    z, slow = (torch.randn(3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))

    def trace(rows: list[torch.Tensor]) -> float:
        gram = torch.tensor([[float(a @ b) for b in rows] for a in rows], dtype=torch.float64)
        return float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())

    u, t = ([[row / row.norm() for row in view] for view in rows] for rows in (z, slow))
    for target, local in ((None, "online"), (slow, "online"), (slow, "all")):
        centres = [sum(u[v][n] for v in range(3)) / 3 for n in range(5)]
        if target is not None:
            centres = [(c + sum(t[v][n] for v in range(3)) / 3) / 2 for n, c in enumerate(centres)]
        own = [[u[v][n] for v in range(3)] + ([t[v][n] for v in range(3)] if local == "all" else []) for n in range(5)]
        expected = 0.3 * sum(trace(rows) for rows in own) / 5 - trace(centres)
        assert mmcr(z, target, 0.3, local)["loss"].item() == pytest.approx(expected, rel=1e-7)
    assert torch.autograd.gradcheck(
        lambda x: mmcr(x, slow[:2, :3], 0.3, "all")["loss"], z[:2, :3].clone().requires_grad_()
    )


def test_equal_views_and_rows_that_are_not_finite() -> None:
    """Without spread over the views the centres are unit rows; the norm of orthogonal ones is their number."""
    z = torch.eye(4).expand(2, 4, 4)
    assert mmcr(z)["loss"].item() == pytest.approx(-4)
    assert set(mmcr(z)) == {"loss", "global"}
    assert nuclear_norm(torch.tensor([[1.0, torch.inf]])).isnan() and mmcr(z * torch.nan, None, 0.1)["loss"].isnan()
    with pytest.raises(ValueError, match="views of samples"):
        mmcr(torch.ones(2, 0, 4))
