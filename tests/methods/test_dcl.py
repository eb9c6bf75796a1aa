"""DCL and DCLW: no denominator contains the positive pair."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.losses import dcl
from inbatch.methods.dcl import DCL


@DTYPES
@pytest.mark.parametrize("name", ["dcl__1", "dcl__2"])
@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        ({}, "loss", "grad_z"),
        ({"symmetric": False}, "loss_oneway", "grad_oneway_z"),
        ({"weighted": True}, "loss_dclw", "grad_dclw_z"),
        ({"weighted": True, "detach": True}, "loss_dclw", "grad_dclw_detached_z"),
        ({"weighted": True, "symmetric": False}, "loss_dclw_oneway", None),
    ],
    ids=["dcl", "one way", "dclw", "dclw detached", "dclw one way"],
)
def test_vectors(golden: Path, name: str, dtype: torch.dtype, options: dict, loss: str, gradient: str | None) -> None:
    """Value and gradient in every convention, through function and method."""
    case = Case(golden, name, dtype)
    t, sigma = case.options["temperature"], case.options["sigma"]
    z = [case.leaf("z0"), case.leaf("z1")]
    arguments = {key: value for key, value in options.items() if key != "weighted"}
    actual = dcl(torch.stack(z), t, sigma if "weighted" in options else None, **arguments)
    method = DCL(t, sigma=sigma, **options)
    assert torch.equal(method.loss({"projection": torch.stack(z)}, {}, unlabelled(len(z[0])))["loss"], actual)
    case.check(actual, loss)
    actual.backward()
    if gradient:
        case.check(z[0].grad, f"{gradient}0")
        case.check(z[1].grad, f"{gradient}1")


def literal(z: Tensor, t: float, sigma: float | None, symmetric: bool) -> Tensor:
    """Yeh et al. 2021, Eq. 6 and 7, one row and one pair of views at a time."""
    u = [[row / (row * row).sum().sqrt() for row in view] for view in z]
    terms = []
    for a in range(len(u)):
        for b in range(len(u)):
            if a == b or (a > 0 and not symmetric):
                continue
            near = [(x @ y / (sigma or 1)).exp() for x, y in zip(u[a], u[b], strict=True)]
            for i, x in enumerate(u[a]):
                others = sum((x @ view[k] / t).exp() for view in (u[a], u[b]) for k in range(len(view)) if k != i)
                w = 1 if sigma is None else 2 - near[i] / (sum(near) / len(near))
                terms.append(-w * (x @ u[b][i]) / t + others.log())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("sigma", [None, 0.4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_equation_as_loops(views: int, sigma: float | None, symmetric: bool) -> None:
    z = torch.randn(views, 4, 3, dtype=torch.float64, requires_grad=True)
    actual, expected = dcl(z, 0.3, sigma, symmetric), literal(z, 0.3, sigma, symmetric)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(actual, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("detach", [False, True])
def test_a_detached_weight_changes_the_gradient_and_not_the_value(detach: bool) -> None:
    z = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    plain, other = dcl(z, 0.3, 0.4), dcl(z, 0.3, 0.4, detach=detach)
    assert torch.equal(plain, other)
    (a,), (b,) = torch.autograd.grad(plain, z), torch.autograd.grad(other, z)
    assert torch.allclose(a, b) != detach


def test_close_pairs_do_not_hide_what_else_is_there() -> None:
    """The denominator is summed without the positive pair; subtracting exp(1 / 0.01) would lose the other terms."""
    z = torch.eye(4)[None].expand(2, 4, 4) + 1e-4 * torch.randn(2, 4, 4)
    actual, expected = dcl(z, 0.01), dcl(z.double(), 0.01)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 1, 4)], ids=["one view", "one sample"])
def test_invalid_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 views of 2 samples"):
        dcl(torch.randn(shape))
