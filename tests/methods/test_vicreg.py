"""VICReg: its three terms, the two conventions of the variance, and the collapse without it."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import vicreg
from inbatch.methods.vicreg import VICReg

TERMS = {"invariance": (1.0, 0.0, 0.0), "variance": (0.0, 1.0, 0.0), "covariance": (0.0, 0.0, 1.0)}
"""Coefficients that keep a single term."""


def literal(z: Tensor, eps: float = 1e-4) -> dict[str, Tensor]:
    """Bardes et al. 2022, Eq. 1 to 5, one feature at a time, as the mean over the pairs of views."""
    n, d = z.shape[1:]

    def cov(x: Tensor, i: int, j: int) -> Tensor:
        return ((x[:, i] - x[:, i].mean()) * (x[:, j] - x[:, j].mean())).sum() / (n - 1)

    def variance(x: Tensor) -> Tensor:
        return sum(torch.clamp(1 - (cov(x, i, i) + eps).sqrt(), min=0) for i in range(d)) / d

    def covariance(x: Tensor) -> Tensor:
        return sum((cov(x, i, j) ** 2 for i in range(d) for j in range(d) if i != j), 0 * x.sum()) / d

    pairs = list(combinations(z, 2))
    return {
        "invariance": sum(((a - b) ** 2).sum() / n / d for a, b in pairs) / len(pairs),
        "variance": sum((variance(a) + variance(b)) / 2 for a, b in pairs) / len(pairs),
        "covariance": sum(covariance(a) + covariance(b) for a, b in pairs) / len(pairs),
    }


@DTYPES
@pytest.mark.parametrize("name", ["vicreg__1", "vicreg__2"])
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Value, terms and gradient, through function and method, and the values of solo-learn."""
    case = Case(golden, name, dtype)
    o = case.options
    z0, z1 = case.leaf("z0"), case.leaf("z1")
    z = torch.stack([z0, z1])
    weights = o["sim_coeff"], o["std_coeff"], o["cov_coeff"]
    losses = vicreg(z, *weights, eps=o["eps"])
    for term in ("loss", *TERMS):
        case.check(losses[term], term)
    losses["loss"].backward()
    case.check(z0.grad, "grad_z0")
    case.check(z1.grad, "grad_z1")

    rows = {"projection": z.detach()}
    assert torch.equal(VICReg(*weights, eps=o["eps"]).loss(rows, {}, unlabelled(len(z0)))["loss"], losses["loss"])
    solo = VICReg(*weights, variance="sum").loss(rows, {}, unlabelled(len(z0)))
    case.check(solo["loss"] - o["std_coeff"] * case["variance"], "loss")
    case.check(solo["variance"] / 2, "variance")


@DTYPES
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", ["vicreg__1", "vicreg__2"])
def test_vectors_of_each_term(golden: Path, name: str, term: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    z0 = case.leaf("z0")
    losses = vicreg(torch.stack([z0, case["z1"]]), *TERMS[term], eps=case.options["eps"])
    assert torch.equal(losses["loss"], losses[term])
    losses["loss"].backward()
    case.check(z0.grad, f"grad_z0_{term}")


@pytest.mark.parametrize(("views", "n", "d"), [(2, 4, 1), (3, 5, 4), (4, 3, 5)])
def test_any_number_of_views(views: int, n: int, d: int) -> None:
    z = torch.randn(views, n, d, dtype=torch.float64)
    actual, expected = (z.clone().requires_grad_() for _ in range(2))
    losses, slow = vicreg(actual, 3.0, 5.0, 2.0), literal(expected)
    for term, value in slow.items():
        torch.testing.assert_close(losses[term], value, rtol=1e-12, atol=1e-12)
    total = 3 * slow["invariance"] + 5 * slow["variance"] + 2 * slow["covariance"]
    torch.testing.assert_close(losses["loss"], total, rtol=1e-12, atol=0)
    losses["loss"].backward()
    total.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_statistics_are_of_all_samples() -> None:
    """Separate statistics for each half of a batch would give another gradient."""
    z = (torch.randn(2, 16, 32, dtype=torch.float64) / 2).requires_grad_()
    (whole,) = torch.autograd.grad(vicreg(z, sim_coeff=0.0)["loss"], z)
    (halves,) = torch.autograd.grad(sum(vicreg(half, sim_coeff=0.0)["loss"] for half in z.chunk(2, 1)) / 2, z)
    assert torch.cosine_similarity(whole.flatten(), halves.flatten(), 0) < 0.95


def test_constant_rows_are_optimal_without_the_variance_term() -> None:
    """Effect of the option `std` = 0: collapsed rows cost nothing, and nearly 25 with the default."""
    rows = {"projection": torch.ones(2, 16, 8)}
    assert VICReg(std_coeff=0.0).loss(rows, {}, unlabelled(16))["loss"] == 0
    assert VICReg().loss(rows, {}, unlabelled(16))["loss"].item() == pytest.approx(25 * 0.99)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 1, 3)], ids=["one view", "one sample"])
def test_invalid_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="VICReg"):
        vicreg(torch.randn(shape))


def test_heads_are_the_authors() -> None:
    with torch.device("meta"):
        network = VICReg().heads(2048)["projection"].network
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [8192] * 3 and linear[-1].bias is None
