"""HCL and the debiased loss: the authors' vectors, the equation as loops, its special cases, and no matrix."""

import math
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.losses import hcl, nt_xent
from inbatch.methods.hcl import HCL
from inbatch.nn import logsumexp
from inbatch.nn.negatives import Negatives


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@DTYPES
@pytest.mark.parametrize("name", ["hcl__1", "hcl__clamp", "debiased__1", "debiased__clamp"])
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Value and gradient, also of rows at the lower bound of the sum, through function, method and tiles."""
    case = Case(golden, name, dtype)
    options = case.options["temperature"], case.options["tau_plus"], case.options.get("beta", 0.0)
    for mode in ("never", "always"):
        x = [case.leaf("x1"), case.leaf("x2")]
        with logsumexp.using(mode=mode):
            loss = hcl(torch.stack(x), *options)
            whole = HCL(*options).loss({"projection": torch.stack(x)}, {}, unlabelled(len(x[0])))["loss"]
        assert torch.equal(whole, loss)
        case.check(loss, "loss")
        loss.backward()
        case.check(x[0].grad, "grad_x1")
        case.check(x[1].grad, "grad_x2")


def literal(z: Tensor, t: float, tau: float | None, beta: float, same: list[int] | None = None) -> Tensor:
    """Robinson et al. 2021, Eq. 4 and 5, one row at a time; without tau the plain sum over the negatives."""
    views, n, _ = z.shape
    same = list(range(n)) if same is None else same
    u = [[row / (row * row).sum().sqrt() for row in view] for view in z]
    terms = []
    for v in range(views):
        for i in range(n):
            own = [(u[v][i] @ u[w][i]) / t for w in range(views) if w != v]
            e = [(u[v][i] @ u[w][j] / t).exp() for w in range(views) for j in range(n) if same[j] != same[i]]
            total = sum(e) if e else z.new_zeros(())
            if tau is not None and e:
                weight = [x**beta for x in e]
                mean = sum(weight) / len(weight)
                total = sum(x * w for x, w in zip(e, weight, strict=True)) / mean
                p = sum(x.exp() for x in own) / len(own)
                total = (total - tau * len(e) * p) / (1 - tau)
                total = total.clamp(min=len(e) * math.exp(-1 / t))
            terms.append((sum(x.exp() for x in own) + total).log() - sum(own) / len(own))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("views", "same"), [(2, [0, 1, 1, 0]), (3, None)], ids=["groups", "3 views"])
def test_the_equation_as_loops(views: int, same: list[int] | None) -> None:
    negatives = None if same is None else Negatives(torch.tensor(same))
    for tau, beta in ((0.1, 1.0), (0.3, 0.0), (0.7, 0.5), (0.0, 2.0)):
        z = rows(views, 4, 3).requires_grad_()
        actual, expected = hcl(z, 0.4, tau, beta, negatives), literal(z, 0.4, tau, beta, same)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        (a,), (b,) = torch.autograd.grad(actual, z), torch.autograd.grad(expected, z)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_hcl_without_correction_is_nt_xent() -> None:
    z = rows(3, 6, 4)
    torch.testing.assert_close(hcl(z, 0.3, 0.0, 0.0), nt_xent(z, 0.3), rtol=1e-12, atol=0)


def test_a_row_at_the_lower_bound_has_no_gradient_through_its_negatives() -> None:
    """Positives are alike, so that their share exceeds the whole sum."""
    z = rows(1, 6, 4).expand(2, 6, 4).clone()
    z[1] += 1e-3 * rows(6, 4, seed=1)
    u = torch.nn.functional.normalize(z, dim=-1)
    leaf = u.clone().requires_grad_()
    own = ((leaf[0] * leaf[1]).sum(-1) / 0.5).repeat(2)
    least = torch.log(own.exp() + 10 * math.exp(-2)) - own
    expected = torch.autograd.grad(least.mean(), leaf)[0]
    other = z.clone().requires_grad_()
    loss = hcl(other, 0.5, 0.9, 1.0)
    torch.testing.assert_close(loss, least.mean(), rtol=1e-12, atol=0)
    through_norm = torch.autograd.grad((torch.nn.functional.normalize(other, dim=-1) * expected).sum(), other)[0]
    torch.testing.assert_close(torch.autograd.grad(hcl(other, 0.5, 0.9, 1.0), other)[0], through_norm)


def test_no_matrix_is_held_for_the_backward_pass() -> None:
    z, results = rows(2, 200, 4), []
    for mode in ("never", "always"):
        leaf, kept = z.clone().requires_grad_(), list[int]()
        with (
            logsumexp.using(mode=mode),
            torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x),
        ):
            loss = hcl(leaf, 0.2)
        loss.backward()
        results.append((loss.detach(), leaf.grad, max(kept)))
    (value, gradient, matrix), (tiled, tiled_gradient, largest) = results
    assert matrix == 400 * 400 and largest <= 400 * 4
    torch.testing.assert_close(tiled, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(tiled_gradient, gradient, rtol=1e-9, atol=1e-14)


def test_wrong_options_are_refused() -> None:
    for wrong in ({"tau_plus": 1.0}, {"tau_plus": -0.1}, {"beta": -1.0}, {"beta": float("inf")}):
        with pytest.raises(ValueError, match="must be"):
            HCL(**wrong)
        with pytest.raises(ValueError, match="must be"):
            hcl(rows(2, 3, 2), **wrong)
    for shape in ((1, 6, 4), (2, 1, 4)):
        with pytest.raises(ValueError, match="at least 2 views of 2 samples"):
            hcl(rows(*shape))
