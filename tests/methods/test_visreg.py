"""VISReg: vectors, the equation as loops, and lightly's eps."""

from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import visreg
from inbatch.methods.visreg import VISReg
from inbatch.nn import slicing


def literal(z: Tensor, directions: Tensor, views: int, scale_eps: float, shape_eps: float) -> dict[str, Tensor]:
    """The terms with a constant added to the deviation in the scale and another one in the shape."""
    n, d = z.shape[1:]
    center, scale, shape, away = [], [], [], []
    for view in z:
        means = [sum(view[:, j]) / n for j in range(d)]
        deviations = [(sum((x - m) ** 2 for x in view[:, j]) / n).sqrt() for j, m in enumerate(means)]
        center += [m**2 for m in means]
        scale += [(s + scale_eps - 1) ** 2 for s in deviations]
        unit = [
            (view[:, j] - m) / (s.detach() + shape_eps) for j, (m, s) in enumerate(zip(means, deviations, strict=True))
        ]
        for a in directions.T:
            x = sum(u * w / a.norm() for u, w in zip(unit, a, strict=True))
            shape += [(y - NormalDist().inv_cdf((i + 1) / (n + 1))) ** 2 for i, y in enumerate(x.sort().values)]
    for i in range(n):
        centre = sum(z[:views, i]) / views
        away += [((view[i] - centre) ** 2).sum() / d for view in z]
    names = {"center": center, "scale": scale, "shape": shape, "invariance": away}
    return {name: sum(terms) / len(terms) for name, terms in names.items()}


@DTYPES
def test_vectors(golden: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, terms and gradient, through function and method, and the value of lightly."""
    for name in ("visreg__1", "visreg__multicrop"):
        case = Case(golden, name, dtype)
        o, z, directions = case.options, case.leaf("z"), case["directions"]
        losses = visreg(z, directions, o["lamb"], o["n_global"], o["eps"])
        for term, expected in (("loss", "loss"), ("invariance", "inv"), ("center", "center"), ("scale", "scale"),
                               ("shape", "shape")):  # fmt: skip
            case.check(losses[term], expected)
        losses["loss"].backward()
        case.check(z.grad, "grad_z")
        monkeypatch.setattr("inbatch.methods.visreg.random_directions", lambda *_, d=directions: d)
        method = VISReg(o["lamb"], global_views=o["n_global"])
        assert torch.equal(method.loss({"projection": z}, {}, unlabelled(z.shape[1]))["loss"], losses["loss"])
        if dtype == torch.float64 and "loss_lightly" in case.arrays:
            theirs = literal(z.detach(), directions, o["n_global"], 0.0, 1e-4)
            value = o["lamb"] * (theirs["center"] + theirs["scale"] + theirs["shape"])
            assert float(value + (1 - o["lamb"]) * theirs["invariance"] - case["loss_lightly"]) == pytest.approx(
                0,
                abs=1e-7,  # their quantiles are in float32
            )


def test_the_equation_as_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks of directions."""
    monkeypatch.setattr(slicing, "CHUNK", 30)
    z, directions = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    actual, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
    losses, slow = visreg(actual, directions, 0.7, 2), literal(expected, directions, 2, 1e-6, 1e-6)
    for term, value in slow.items():
        torch.testing.assert_close(losses[term], value, rtol=1e-10, atol=0)
    total = 0.7 * (slow["center"] + slow["scale"] + slow["shape"]) + (1 - 0.7) * slow["invariance"]
    losses["loss"].backward()
    total.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_normal_rows_cost_little_and_collapsed_rows_much() -> None:
    directions = slicing.random_directions(8, 50)
    normal = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    assert float(visreg(normal, directions)["loss"]) < 0.05
    assert float(visreg(torch.zeros(2, 400, 8), directions)["loss"]) > 1.5


def test_the_projection_is_the_authors() -> None:
    with torch.device("meta"):
        network = VISReg().heads(384)["projection"].network
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [2048, 2048, 128]
    assert sum(isinstance(layer, nn.GELU) for layer in network) == 2
    with pytest.raises(ValueError, match="needs at least 2 views"):
        visreg(torch.randn(1, 4, 3), torch.randn(3, 2))
    with pytest.raises(ValueError, match="rows and directions"):
        visreg(torch.randn(2, 4, 3), torch.randn(3, 0))
    for eps in (0.0, -1.0, float("nan")):  # at 0, a constant feature makes the loss nan
        with pytest.raises(ValueError, match="eps"):
            VISReg(eps=eps)
        with pytest.raises(ValueError, match="eps"):
            visreg(torch.ones(2, 4, 3), torch.randn(3, 2), eps=eps)
