"""Sigmoid: vectors of the authors' code, the equation as loops, and temperature and bias in the head."""

import math
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from inbatch.losses import pairwise_sigmoid
from inbatch.methods.sigmoid import ScaledRows, Sigmoid
from inbatch.models.network import Network
from inbatch.nn import logsumexp
from inbatch.nn.sigmoid_sums import sigmoid_sum
from inbatch.training.monitors.collapse import output_diversity, signs


@DTYPES
@pytest.mark.parametrize("name", ["siglip__1", "siglip__2"])
def test_vectors_of_big_vision(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Value and gradients of rows, temperature and bias, tiled and not, through the head and the method."""
    case = Case(golden, name, dtype)
    n = len(case["x0"])
    for mode in ("never", "always"):  # the authors' rows: x / (|x| + 1e-8)
        x0, x1, t, b = (case.leaf(key) for key in ("x0", "x1", "t_prime", "bias"))
        z0, z1 = (x / (x.norm(dim=1, keepdim=True) + 1e-8) for x in (x0, x1))
        with logsumexp.using(mode=mode):
            loss = sigmoid_sum(t.exp() * z0, z1, b.expand(n)) / n
        case.check(loss, "loss")
        names = ("grad_z0", "grad_z1", "grad_x0", "grad_x1", "grad_t_prime", "grad_bias")
        for key, gradient in zip(names, torch.autograd.grad(loss, (z0, z1, x0, x1, t, b)), strict=True):
            case.check(gradient, key)

    method = Sigmoid(math.exp(float(case["t_prime"])), float(case["bias"]))
    head = ScaledRows(method.scale, method.bias).to(dtype)
    with torch.no_grad():
        head.log_scale.copy_(case["t_prime"])  # the option is rounded to float32
    x0, x1 = case.leaf("x0"), case.leaf("x1")
    loss = method.loss({"scaled": torch.stack([head(x0), head(x1)])}, {}, unlabelled(n))["loss"]
    gradients = torch.autograd.grad(loss, (x0, x1, head.log_scale, head.bias))
    # Without the 1e-8 in the norm: a relative change of the rows, of lengths above 1, by less than 1e-8.
    tolerance = {key: max(value, 1e-8) for key, value in case.tolerance.items()}
    for key, x in zip(("loss", "grad_x0", "grad_x1", "grad_t_prime", "grad_bias"), (loss, *gradients), strict=True):
        torch.testing.assert_close(x.detach(), case[key], **tolerance)


def literal(z: Tensor, t: Tensor, b: Tensor, group: Tensor) -> Tensor:
    """Eq. 2, pair by pair, for all pairs of views."""
    views, n = z.shape[:2]
    terms = []
    for v in range(views):
        for w in range(v + 1, views):
            for i in range(n):
                for j in range(n):
                    y = 1 if group[i] == group[j] else -1
                    cosine = z[v, i] @ z[w, j] / (z[v, i].norm() * z[w, j].norm())
                    terms.append(-logsigmoid(y * (t * cosine + b)))
    return sum(terms) / n / (views * (views - 1) / 2)


def test_the_equation_as_loops() -> None:
    g = torch.Generator().manual_seed(0)
    t, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (4.0, -1.5))
    for views, group in ((2, None), (3, None), (2, torch.tensor([0, 1, 0, 2, 1]))):
        z = torch.randn(views, 5, 4, generator=g, dtype=torch.float64).requires_grad_()
        pairs = torch.autograd.grad(loss := pairwise_sigmoid(z, t, b, group), (z, t, b))
        expected = literal(z, t, b, torch.arange(5) if group is None else group)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        for actual, other in zip(pairs, torch.autograd.grad(expected, (z, t, b)), strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-10, atol=1e-14)


def test_temperature_and_bias_start_as_set_and_learn_in_the_head() -> None:
    method = Sigmoid(scale=5.0, bias=-3.0, out_dim=6)
    projection, head = method.heads(7).values()
    rows = head.network(projection.network(torch.randn(4, 7)))
    assert rows.shape == (4, 8) and not list(method.parameters())
    torch.testing.assert_close(rows[:, 6:], torch.tensor([[5.0, -3.0]]).expand(4, 2))
    losses = method.loss({"scaled": torch.stack([rows, rows.flip(0)])}, {}, unlabelled(4))
    losses["loss"].backward()
    assert head.network.log_scale.grad != 0 and head.network.bias.grad != 0
    assert float(losses["scale"]) == pytest.approx(5) and float(losses["bias"]) == pytest.approx(-3)


def test_large_scale_is_not_reported_as_collapse() -> None:
    """Scale and bias are the same in all rows; the monitor of collapse does not see them."""
    torch.manual_seed(0)
    encoder, method = nn.Sequential(nn.Flatten(), nn.Linear(48, 16)), Sigmoid(scale=100.0, bias=-50.0, layers=2)
    network = Network(encoder, method.heads(16), method.online)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.momentum = 1.0  # running statistics are those of the images
    network([images := torch.randn(64, 3, 4, 4)])
    now = output_diversity(network, images)
    assert now.keys() == {"features_std", "features_rank", "projection_std", "projection_rank"}
    assert not signs(now, now) and now["projection_std"] > 0.9


def test_wrong_options_and_rows_are_refused() -> None:
    for options in ({"scale": 0.0}, {"scale": math.inf}, {"bias": math.nan}):
        with pytest.raises(ValueError, match="scale"):
            Sigmoid(**options)
    for shape in ((1, 4, 3), (2, 0, 3)):
        with pytest.raises(ValueError, match="at least 2 views of a sample"):
            pairwise_sigmoid(torch.ones(shape))
