"""BYOL: the regression of unit rows, both conventions, and its target network and predictor."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import byol
from inbatch.methods.byol import BYOL


def literal(p: Tensor, t: Tensor) -> Tensor:
    """Grill et al. 2020, Eq. 2: squared distances of unit rows, twice their mean over ordered pairs of views."""
    v, n, _ = p.shape
    pairs = [(i, j) for i in range(v) for j in range(v) if i != j]
    total = sum(
        (p[i, k] / p[i, k].norm() - t[j, k] / t[j, k].norm()).square().sum() for i, j in pairs for k in range(n)
    )
    return 2 * total / (len(pairs) * n)


@DTYPES
@pytest.mark.parametrize("name", ["byol__1", "byol__2"])
@pytest.mark.parametrize(
    ("scale", "expected", "factor"), [("distance", "loss", 1), ("cosine", "loss_lightly_convention", 4)]
)
def test_vectors(golden: Path, name: str, scale: str, expected: str, factor: int, dtype: torch.dtype) -> None:
    """Value and gradient of DeepMind's code, and lightly's value with a quarter of the gradient."""
    case = Case(golden, name, dtype)
    p1, p2, t1, t2 = (case.leaf(key) for key in ("p1", "p2", "t1", "t2"))
    p, t = torch.stack([p1, p2]), torch.stack([t1, t2])
    loss = byol(p, t, scale)
    case.check(loss, expected)
    (loss * factor).backward()
    case.check(p1.grad, "grad_p1")
    case.check(p2.grad, "grad_p2")
    assert t1.grad is None and t2.grad is None  # constants in the reference

    method = BYOL(scale=scale)
    losses = method.loss({"prediction": p.detach()}, {"projection": t.detach()}, unlabelled(p.shape[1]))
    assert torch.equal(losses["loss"], loss)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_any_number_of_views(views: int) -> None:
    p, t = torch.randn(2, views, 4, 3, dtype=torch.float64)
    actual, expected = (p.clone().requires_grad_() for _ in range(2))
    loss, slow = byol(actual, t), literal(expected, t)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(byol(p, t, "cosine"), (slow - 4) / 4, rtol=1e-12, atol=1e-12)
    loss.backward()
    slow.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_from_0_to_8() -> None:
    rows = torch.eye(4)[None].expand(2, 4, 4)
    assert byol(rows, rows) == 0 and byol(rows, -rows) == 8
    assert byol(rows, rows, "cosine") == -1 and byol(rows, -rows, "cosine") == 1


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 0, 3)], ids=["one view", "no sample"])
def test_invalid_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="BYOL"):
        byol(torch.randn(shape), torch.randn(shape))


def test_projection_is_compared_without_a_predictor() -> None:
    heads = BYOL(hidden_dim=8, out_dim=5, predictor=False).heads(12)
    assert isinstance(heads["prediction"].network, nn.Identity) and heads["prediction"].source == "projection"
    with_one = BYOL(hidden_dim=8, out_dim=5).heads(12)["prediction"]
    assert with_one.online_only and with_one.network(torch.randn(3, 5)).shape == (3, 5)


def test_heads_are_the_paper_s() -> None:
    heads = BYOL().heads(2048)
    for name, width in (("projection", 2048), ("prediction", 256)):
        shapes = [tuple(m.weight.shape) for m in heads[name].network if isinstance(m, nn.Linear)]
        assert shapes == [(4096, width), (256, 4096)]
        assert sum(isinstance(m, nn.BatchNorm1d) for m in heads[name].network) == 1


def test_a_closing_norm_takes_away_what_all_rows_share() -> None:
    rows = BYOL(hidden_dim=8, out_dim=5, norm=True).heads(12)["projection"].network(torch.randn(16, 12))
    torch.testing.assert_close(rows.mean(0), torch.zeros(5), rtol=0, atol=1e-6)


def test_momentum_rises_to_1_along_half_a_cosine() -> None:
    method = BYOL(momentum=0.9)
    assert method.target_momentum(0.0) == pytest.approx(0.9) and method.target_momentum(1.0) == 1.0
    assert method.target_momentum(0.5) == pytest.approx(0.95)


def test_the_former_hook_of_the_momentum_is_refused() -> None:
    with pytest.raises(TypeError, match="define target_momentum"):
        type("Own", (BYOL,), {"momentum": lambda self, progress: 0.5})
