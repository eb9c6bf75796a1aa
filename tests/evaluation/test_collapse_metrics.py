"""LiDAR and alpha-ReQ against their equations written as loops, public vectors, and degenerate features."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_vectors import Case
from torch import Tensor

from inbatch.errors import DataError
from inbatch.evaluation import alpha_req, lidar, rankme, sigreg_distance
from inbatch.nn.slicing import random_directions


def literal_lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Return LiDAR by the equation of its docstring, term by term, with the inverse root of the matrix."""
    z = views.double().numpy()
    n, q, width = z.shape
    means = [sum(z[i, v] for v in range(q)) / q for i in range(n)]
    mean = sum(means) / n
    between = sum(np.outer(m - mean, m - mean) for m in means) / (n - 1)
    within = delta * np.eye(width)
    for i in range(n):
        for v in range(q):
            within += np.outer(z[i, v] - means[i], z[i, v] - means[i]) / (n * (q - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    values = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    p = (values + eps) / (values + eps).sum()
    return float(np.exp(-sum(x * np.log(x) for x in p)))


def literal_alpha(rows: Tensor, first: int = 10, end: int = 100) -> float:
    """Return alpha by weighted least squares over its two unknowns, on the eigenvalues of the covariance."""
    x = rows.double().numpy()
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1][: min(len(x) - 1, x.shape[1])]
    k = np.arange(first, min(end, len(values))) + 1
    design, roots = np.stack([-np.log(k), np.ones(len(k))], 1), k**-0.5
    return float(np.linalg.lstsq(design * roots[:, None], np.log(values[k - 1]) * roots, rcond=None)[0][0])


def features(n: int, width: int, decay: float = 0.7) -> Tensor:
    return torch.randn(n, width) * torch.arange(1, width + 1) ** -decay


def test_lidar_literally() -> None:
    for n, q, width in ((30, 4, 8), (6, 3, 12), (2, 2, 5), (9, 2, 9)):
        views = features(n, width)[:, None] + 0.3 * torch.randn(n, q, width)
        assert float(lidar(views)) == pytest.approx(literal_lidar(views), rel=1e-9)
        assert float(lidar(views, delta=0.1, eps=1e-3)) == pytest.approx(literal_lidar(views, 0.1, 1e-3), rel=1e-9)
        assert lidar(views).dtype == torch.float64 and 1 <= float(lidar(views)) <= width


def test_lidar_does_not_depend_on_the_order_or_a_rotation() -> None:
    views = features(20, 6)[:, None] + 0.5 * torch.randn(20, 3, 6)
    turned = views.double() @ torch.linalg.qr(torch.randn(6, 6).double())[0]
    for same in (views[torch.randperm(20)], views[:, [2, 0, 1]], turned, views + 7):
        assert float(lidar(same)) == pytest.approx(float(lidar(views)), rel=1e-4)
    assert float(lidar(100 * views, delta=1.0)) == pytest.approx(float(lidar(views)), rel=1e-4)  # delta has a scale


def test_alpha_literally() -> None:
    for n, width in ((300, 64), (60, 128), (400, 140)):  # narrow, fewer rows than dimensions, more than 100 eigenvalues
        rows = features(n, width)
        assert float(alpha_req(rows)) == pytest.approx(literal_alpha(rows), rel=1e-6)
        assert float(alpha_req(50 * rows + 3)) == pytest.approx(literal_alpha(rows), rel=1e-3)
    rows = features(200, 40)
    assert float(alpha_req(rows, (2, 30))) == pytest.approx(literal_alpha(rows, 2, 30), rel=1e-6)
    basis = torch.linalg.qr(torch.randn(200, 60).double())[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    exact = basis * torch.arange(1, 61).double() ** -0.6  # eigenvalues are k^-1.2
    assert float(alpha_req(exact)) == pytest.approx(1.2, rel=1e-9)


def test_features_without_information_have_a_defined_value() -> None:
    constant, nan = torch.full((50, 4, 96), 3.1), torch.full((50, 4, 96), math.nan)
    assert float(lidar(constant)) == float(lidar(0 * constant)) == 1.0
    assert math.isnan(lidar(nan)) and math.isnan(alpha_req(nan[:, 0]))
    same = torch.randn(50, 1, 96).expand(50, 4, 96)  # views do not differ: delta alone is within an image
    assert 1 < float(lidar(same)) < 49
    line = torch.randn(500, 1) * torch.randn(1, 96)
    for rows in (constant[:, 0], 0 * constant[:, 0], line, torch.randn(12, 96), torch.randn(500, 11), line[:1]):
        assert math.isnan(alpha_req(rows))  # fewer than two eigenvalues from the eleventh on


def test_lidar_refuses_what_has_no_variance_within_or_between() -> None:
    with pytest.raises(DataError, match="at least 2 views of 2 images, not 1 of 5"):
        lidar(torch.randn(5, 1, 8))
    with pytest.raises(DataError, match="not 4 of 1"):
        lidar(torch.randn(1, 4, 8))


def test_values_equal_those_of_public_code(golden: Path) -> None:
    case = Case(golden, "lidar__1")
    case.check(lidar(case["z"]), "lidar")
    case = Case(golden, "alphareq__1")
    case.check(alpha_req(case["z"], (case.options["fit_first"], case.options["fit_last_exclusive"])), "alpha")
    for name in ("rankme__1", "rankme__2"):
        case = Case(golden, name, torch.float32)  # the precision in which it is computed
        case.check(rankme(case["z"]), "rankme")


def test_sigreg_is_a_distance_from_isotropic_normal_features() -> None:
    """Position and scale have no effect; 0 for normal features, more for others and for collapsed ones."""
    normal = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    size = (normal.double() - normal.double().mean(0)).square().mean().sqrt()
    directions = random_directions(6, 256)
    x = (normal.double() - normal.double().mean(0)) / size @ directions
    t = np.linspace(-3, 3, 33)
    gap = np.abs(np.exp(1j * t[:, None, None] * x.numpy()).mean(1) - np.exp(-(t[:, None] ** 2) / 2)) ** 2
    literal = np.trapezoid(gap * np.exp(-(t[:, None] ** 2) / 2), t, axis=0).mean()
    distance = sigreg_distance(normal)
    assert float(distance) == pytest.approx(literal, rel=1e-9) and distance.dtype == torch.float64
    assert float(sigreg_distance(1e-3 * normal + 5)) == pytest.approx(float(distance), rel=1e-3)
    assert float(distance) < 0.006
    for other, least in ((normal.exp(), 0.02), (normal * torch.tensor([9.0, 1, 1, 1, 1, 1]), 0.02), (normal.sign(), 0)):
        assert float(sigreg_distance(other)) > least and float(sigreg_distance(other)) > 1.5 * float(distance)
    for constant in (torch.zeros(5, 3), torch.full((50, 8), 0.1)):
        assert float(sigreg_distance(constant)) == pytest.approx(0.4020, abs=1e-4)
    assert math.isnan(sigreg_distance(normal * torch.nan)) and sigreg_distance(normal.half()).isfinite()
