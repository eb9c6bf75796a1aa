"""SimSiam: the stopped gradient, the predictor, and many views as in FastSiam."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from inbatch.losses import simsiam
from inbatch.methods.simsiam import SimSiam
from inbatch.training.optim import parameter_groups, set_learning_rate


def literal(p: Tensor, z: Tensor, stop_gradient: bool, teach: str) -> Tensor:
    """Chen and He 2021, Eq. 1 to 4, one row at a time; for more views each other view, or their mean, is the target."""
    v, n, _ = p.shape
    z = z.detach() if stop_gradient else z
    terms = []
    for i in range(v):
        others = [z[j] for j in range(v) if j != i]
        for target in others if teach == "each" else [sum(others) / len(others)]:
            terms += [-cosine_similarity(p[i, k], target[k], dim=0) for k in range(n)]
    return sum(terms) / len(terms)


@DTYPES
@pytest.mark.parametrize("teach", ["each", "mean"])
@pytest.mark.parametrize("name", ["simsiam__1", "simsiam__2"])
def test_vectors(golden: Path, name: str, teach: str, dtype: torch.dtype) -> None:
    """With two views the mean of the others is the other."""
    case = Case(golden, name, dtype)
    p1, p2, z1, z2 = (case.leaf(key) for key in ("p1", "p2", "z1", "z2"))
    p, z = torch.stack([p1, p2]), torch.stack([z1, z2])
    loss = simsiam(p, z, targets=teach)
    case.check(loss, "loss")
    loss.backward()
    case.check(p1.grad, "grad_p1")
    case.check(p2.grad, "grad_p2")
    assert z1.grad is None and z2.grad is None
    rows = {"prediction": p.detach(), "projection": z.detach()}
    assert torch.equal(SimSiam(targets=teach).loss(rows, {}, unlabelled(p.shape[1]))["loss"], loss)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("teach", ["each", "mean"])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_any_number_of_views(views: int, teach: str, stop_gradient: bool) -> None:
    rows = torch.randn(2, views, 4, 3, dtype=torch.float64)
    actual, expected = ([x.clone().requires_grad_() for x in rows] for _ in range(2))
    loss, slow = simsiam(*actual, stop_gradient, teach), literal(*expected, stop_gradient, teach)
    torch.testing.assert_close(loss, slow, rtol=1e-10, atol=1e-12)
    loss.backward()
    slow.backward()
    assert (actual[1].grad is None) == stop_gradient
    for a, b in zip(actual, expected, strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_half_precision_rows_are_added_up_in_single() -> None:
    z = torch.full((4, 3, 5), 4e4).half()  # three of them exceed the range of float16
    assert simsiam(z, z, targets="mean") == pytest.approx(-1)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 0, 3)], ids=["one view", "no sample"])
def test_invalid_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="SimSiam"):
        simsiam(torch.randn(shape), torch.randn(shape))


def test_the_schedule_leaves_the_predictor_s_rate_alone() -> None:
    for fix_lr, expected in ((True, {1.0, 0.1}), (False, {0.1})):
        method = SimSiam(hidden_dim=8, out_dim=6, bottleneck_dim=4, fix_pred_lr=fix_lr)
        modules = {name: head.network for name, head in method.heads(12).items()}
        own = {name: {"constant": True} for name in method.constant_lr()}
        groups = parameter_groups(modules, lr=1.0, weight_decay=0.0, own=own)
        optimizer = torch.optim.SGD(groups, lr=1.0)
        set_learning_rate(optimizer, 0.1)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert set(rates.values()) == expected
        assert all(rates[id(p)] == max(expected) for p in modules["prediction"].parameters())
        assert all(rates[id(p)] == 0.1 for p in modules["projection"].parameters())


def test_projection_is_compared_without_a_predictor() -> None:
    heads = SimSiam(hidden_dim=8, out_dim=6, predictor=False).heads(12)
    assert isinstance(heads["prediction"].network, nn.Identity) and heads["prediction"].source == "projection"


def test_heads_are_the_paper_s() -> None:
    heads = SimSiam().heads(512)
    shapes = {k: [tuple(m.weight.shape) for m in h.network if isinstance(m, nn.Linear)] for k, h in heads.items()}
    assert shapes == {
        "projection": [(2048, 512), (2048, 2048), (2048, 2048)],
        "prediction": [(512, 2048), (2048, 512)],
    }
    closing = heads["projection"].network[-1]
    assert isinstance(closing, nn.BatchNorm1d) and not closing.affine
    assert isinstance(heads["prediction"].network[-1], nn.Linear)
