"""Alignment and uniformity: the equation as loops, finite differences, and no matrix of distances."""

import pytest
import torch
from torch import Tensor

from inbatch.losses import align_uniform
from inbatch.methods.align_uniform import AlignUniform
from inbatch.nn import logsumexp, tiles


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def literal(z: Tensor, t: float, weight: float, alpha: float) -> Tensor:
    """Distances of all pairs of rows, one at a time."""
    u = [[row / row.norm() for row in view] for view in z]
    n = len(u[0])
    alignment = sum((a - b).norm() ** alpha for a, b in zip(*u, strict=True)) / n
    halves = []
    for view in u:
        pairs = [(-t * (view[i] - view[j]).norm() ** 2).exp() for i in range(n) for j in range(i)]
        halves.append((sum(pairs) / len(pairs)).log())
    return alignment + weight * sum(halves) / 2


@pytest.mark.parametrize("mode", ["never", "always"])
def test_the_equation_as_loops(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 3)
    for t, weight, alpha in ((2.0, 1.0, 2.0), (0.5, 0.3, 1.0)):
        ours, plain = draw(2, 7, 4).requires_grad_(), draw(2, 7, 4).requires_grad_()
        with logsumexp.using(mode=mode):
            loss = align_uniform(ours, t, weight, alpha)["loss"]
            loss.backward()
        expected = literal(plain, t, weight, alpha)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: align_uniform(x)["loss"], draw(2, 3, 3).requires_grad_())


def test_uniformity_of_known_rows() -> None:
    """Orthogonal rows are at distance 2 squared, and equal rows at 0."""
    rows = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    losses = align_uniform(rows, t=2.0)
    assert losses["alignment"] == 0 and losses["uniformity"].item() == pytest.approx(-4)
    assert align_uniform(torch.ones(2, 4, 4))["uniformity"].item() == pytest.approx(0, abs=1e-5)


def test_no_matrix_is_held() -> None:
    z, kept = draw(2, 300, 4).requires_grad_(), list[int]()
    with (
        logsumexp.using(mode="always"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):
        align_uniform(z)["loss"].backward()
    assert max(kept) <= 2 * 300 * 4 and z.grad.isfinite().all()


def test_wrong_rows_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="2 views of at least 2 samples"):
        align_uniform(torch.ones(2, 1, 3))
    for t in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature"):
            AlignUniform(t=t)
    for alpha in (0.0, 0.5, -1.0, float("inf"), float("nan")):  # at 0.5, equal views have an infinite gradient
        with pytest.raises(ValueError, match="alpha"):
            AlignUniform(alpha=alpha)
        with pytest.raises(ValueError, match="alpha"):
            align_uniform(torch.ones(2, 3, 3), alpha=alpha)
