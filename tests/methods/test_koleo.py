"""KoLeo: vectors of DINOv2 and DINOv3, duplicates, no matrix of similarities, and the option of DINO."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.losses import koleo
from inbatch.methods.dino import DINO
from inbatch.nn import logsumexp
from inbatch.nn.functional import nearest


def literal(x: Tensor, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    """One row at a time, over the nearest other rows of a view."""
    unit, terms = [row / row.norm() for row in x], []
    for i, u in enumerate(unit):
        others = sorted((j for j in range(len(unit)) if j != i), key=lambda j: -float(u.detach() @ unit[j].detach()))
        terms += [-(((u - unit[j] + eps) ** 2).sum().sqrt() + eps).log() for j in others[:neighbours]]
    return sum(terms) / len(terms)


@DTYPES
def test_vectors(golden: Path, dtype: torch.dtype) -> None:
    """Value and gradient, which reaches the neighbour, too."""
    for name in ("koleo__1", "koleo__topk"):
        case = Case(golden, name, dtype)
        x = case.leaf("x")
        loss = koleo(x[None], case.options.get("topk", 1), case.options["eps"])
        case.check(loss, "loss")
        loss.backward()
        case.check(x.grad, "grad_x")


def test_the_equation_as_loops() -> None:
    for neighbours in (1, 3):
        z = torch.randn(2, 6, 4, dtype=torch.float64)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        actual, expected = koleo(a, neighbours), sum(literal(view, neighbours) for view in b) / 2
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        actual.backward()
        expected.backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_row_is_not_its_own_neighbour_among_duplicates() -> None:
    """With four equal rows, the search may return three others; the distance is eps in each component."""
    z = torch.randn(1, 9, 4, dtype=torch.float64)
    z[0, :4] = z[0, 0]
    duplicates = -torch.tensor(1e-8 * (4**0.5 + 1)).log()
    assert koleo(z[:, :4]).item() == pytest.approx(float(duplicates), rel=1e-6)
    torch.testing.assert_close(koleo(z), literal(z[0]), rtol=1e-6, atol=0)


def test_no_matrix_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the search give the same value."""
    z = torch.randn(1, 90, 3)
    expected = koleo(z)
    monkeypatch.setattr(logsumexp, "_BLOCK", 180)
    neighbours = [nearest(z[0], z[0], count=2)]
    assert neighbours[0].shape == (90, 2) and torch.equal(koleo(z), expected)


def test_dino_adds_it_over_the_two_large_views() -> None:
    """As in DINOv2: the sum over the large views' features, per view; without the option nothing is read."""
    plain, method = DINO(num_prototypes=6), DINO(num_prototypes=6, koleo_weight=0.1)
    assert plain.online == ("prototypes",) and method.online == ("prototypes", "features")
    rows = {"prototypes": torch.randn(4, 5, 6), "features": torch.randn(4, 5, 3)}
    arguments = rows, {"prototypes": rows["prototypes"][:2]}, unlabelled(5)
    losses, base = method.loss(*arguments), plain.loss(*arguments)["loss"]
    expected = base + 0.1 * (literal(rows["features"][0]) + literal(rows["features"][1]))
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(losses["dino"], base) and set(plain.loss(*arguments)) == {"loss"}


def test_invalid_input_is_refused() -> None:
    for shape, neighbours in (((1, 1, 3), 1), ((1, 4, 3), 4), ((1, 4, 3), 0), ((0, 4, 3), 1)):
        with pytest.raises(ValueError, match="KoLeo needs"):
            koleo(torch.randn(shape), neighbours)
