"""Barlow Twins: the cross-correlation of two views and the loss on it."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import barlow_twins
from inbatch.methods.barlow import BarlowTwins, cross_correlation


def literal(z: Tensor, offdiagonal: float) -> tuple[Tensor, Tensor, Tensor]:
    """Zbontar et al. 2021, Eq. 1 and 2, one entry of C at a time: the mean over the pairs of views."""
    n, d = z.shape[1:]

    def standard(x: Tensor) -> Tensor:
        centred = x - x.sum() / n
        return centred / ((centred * centred).sum() / n + 1e-5).sqrt()

    on, off = [], []
    for a, b in combinations(z, 2):
        c = {(i, j): (standard(a[:, i]) * standard(b[:, j])).sum() / n for i in range(d) for j in range(d)}
        on.append(sum((1 - c[i, i]) ** 2 for i in range(d)))
        off.append(sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j) + 0 * z.sum())
    pairs = len(on)
    return (sum(on) + offdiagonal * sum(off)) / pairs, sum(on) / pairs, sum(off) / pairs


@DTYPES
@pytest.mark.parametrize("name", ["barlow__1", "barlow__2"])
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    z0, z1 = case.leaf("z0"), case.leaf("z1")
    case.check(cross_correlation(z0, z1, case.options["bn_eps"]), "c")
    losses = barlow_twins(torch.stack([z0, z1]), case.options["lambda"])
    case.check(losses["loss"], "loss")
    case.check(losses["on_diagonal"], "on_diag")
    case.check(losses["off_diagonal"], "off_diag")
    losses["loss"].backward()
    case.check(z0.grad, "grad_z0")
    case.check(z1.grad, "grad_z1")


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1 / 32, 0.1])
def test_vectors_through_the_method(golden: Path, scale: float, dtype: torch.dtype) -> None:
    case = Case(golden, "barlow__1", dtype)
    z0, z1 = case.leaf("z0"), case.leaf("z1")
    method = BarlowTwins(case.options["lambda"], scale)
    losses = method.loss({"projection": torch.stack([z0, z1])}, {}, unlabelled(len(z0)))
    case.check(losses["loss"] / scale, "loss")
    case.check(losses["on_diagonal"], "on_diag")
    (losses["loss"] / scale).backward()
    case.check(z0.grad, "grad_z0")
    case.check(z1.grad, "grad_z1")


@pytest.mark.parametrize(("views", "n", "d"), [(2, 5, 1), (3, 6, 4), (4, 3, 5)])
def test_any_number_of_views(views: int, n: int, d: int) -> None:
    z = torch.randn(views, n, d, dtype=torch.float64)
    actual, expected = (z.clone().requires_grad_() for _ in range(2))
    losses, slow = barlow_twins(actual, 0.3), literal(expected, 0.3)
    for name, value in zip(("loss", "on_diagonal", "off_diagonal"), slow, strict=True):
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=1e-12)
    losses["loss"].backward()
    slow[0].backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-11)


def test_statistics_are_of_all_samples() -> None:
    """Separate statistics for each half of a batch, as in four libraries, would give another gradient."""
    z = torch.randn(2, 32, 8, dtype=torch.float64).requires_grad_()
    (whole,) = torch.autograd.grad(barlow_twins(z)["loss"], z)
    (halves,) = torch.autograd.grad(sum(barlow_twins(half)["loss"] for half in z.chunk(2, 1)) / 2, z)
    assert torch.cosine_similarity(whole.flatten(), halves.flatten(), 0) < 0.95


def test_a_shift_and_scale_of_features_do_not_matter() -> None:
    z = torch.randn(2, 64, 8, dtype=torch.float64)
    moved = z * torch.linspace(1, 50, 8) + torch.linspace(-20, 20, 8)
    torch.testing.assert_close(barlow_twins(moved)["loss"], barlow_twins(z)["loss"], rtol=1e-4, atol=0)


def test_a_dead_feature_costs_one_and_has_no_gradient() -> None:
    z = torch.randn(2, 16, 4, dtype=torch.float64)
    z[..., 2] = 3
    z.requires_grad_()
    same = z[:1].expand(2, -1, -1)
    losses = barlow_twins(same)
    assert losses["on_diagonal"].item() == pytest.approx(1, abs=1e-8)
    losses["loss"].backward()
    assert z.grad[..., 2].abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 1, 3)], ids=["one view", "one sample"])
def test_invalid_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Barlow Twins"):
        barlow_twins(torch.randn(shape))


def test_heads_are_the_authors() -> None:
    with torch.device("meta"):
        network = BarlowTwins().heads(2048)["projection"].network
    assert [type(layer).__name__ for layer in network] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(8192, 2048), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in linear)
