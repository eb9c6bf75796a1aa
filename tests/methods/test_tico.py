"""TiCo: vectors over steps in both conventions of the gradient, and the equation as loops."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.batch import split_state
from inbatch.losses import tico
from inbatch.methods.tico import TiCo


@DTYPES
@pytest.mark.parametrize(("detach", "gradient"), [(True, "grad_z_a"), (False, "grad_z_a_through_C")])
def test_vectors(golden: Path, dtype: torch.dtype, detach: bool, gradient: str) -> None:
    """Value, terms, gradient and covariance over four steps: the loss uses the new covariance before it is stored."""
    case = Case(golden, "tico_steps__1", dtype)
    o = case.options
    method = TiCo(o["beta"], o["rho"], out_dim=o["dim"], detach=detach).to(dtype)
    for step in range(o["steps"]):
        a, b = (case[name][step].requires_grad_() for name in ("z_a", "z_b"))
        rows = {"projection": a[None]}, {"projection": b[None]}, unlabelled(o["batch"])
        losses, state = split_state(method.loss(*rows))
        for term, name in (("loss", "loss"), ("invariance", "invariance"), ("contrast", "covariance")):
            case.check(losses[term], name, step)
        losses["loss"].backward()
        case.check(a.grad, gradient, step)
        assert b.grad is None
        method.store(state)
        case.check(method.covariance, "C_after", step)


def test_gradients_of_the_two_conventions_differ_as_documented(golden: Path) -> None:
    case = Case(golden, "tico_steps__1")
    gaps = (case["grad_z_a"] - case["grad_z_a_through_C"]).abs().flatten(1).max(1).values
    assert (gaps / case["grad_z_a"].abs().flatten(1).max(1).values).max().item() == pytest.approx(0.125, abs=0.001)


@pytest.mark.parametrize("detach", [True, False])
def test_the_equation_as_loops(detach: bool) -> None:
    g = torch.Generator().manual_seed(0)
    a, b, past = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((4, 3), (4, 3), (3, 3)))

    def literal(a: Tensor) -> Tensor:
        unit, other = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        covariance = [[0.9 * past[i, j] for j in range(3)] for i in range(3)]
        for i in range(3):
            for j in range(3):
                for n in range(4):
                    x = unit[n].detach() if detach else unit[n]
                    covariance[i][j] = covariance[i][j] + 0.1 * x[i] * x[j] / 4
        loss = 0
        for n in range(4):
            loss = loss + 1 - unit[n] @ other[n]
            loss = loss + 8 * sum(unit[n, i] * covariance[i][j] * unit[n, j] for i in range(3) for j in range(3))
        return loss / 4

    ours, plain = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss, expected = tico(ours, b, past, detach=detach)[0]["loss"], literal(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-11, atol=1e-15)
    if not detach:
        assert torch.autograd.gradcheck(lambda x: tico(x, b, past, detach=False)[0]["loss"], a.clone().requires_grad_())


def test_wrong_rows_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="a target for every row"):
        tico(torch.ones(0, 2), torch.ones(0, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="below 1"):
        TiCo(beta=1.0)
