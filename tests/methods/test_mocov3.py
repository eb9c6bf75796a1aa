"""MoCo v3: in-batch contrast with the keys of the target network, times 2T, both directions added."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import ctr
from inbatch.methods.mocov3 import MoCoV3


def literal(q: Tensor, k: Tensor, t: float) -> Tensor:
    """Chen, Xie and He 2021, Algorithm 1, one query at a time."""
    q, k = ([row / row.norm() for row in rows] for rows in (q, k.detach()))
    terms = [-((u @ k[i] / t).exp() / sum((u @ w / t).exp() for w in k)).log() for i, u in enumerate(q)]
    return 2 * t * sum(terms) / len(terms)


@DTYPES
@pytest.mark.parametrize("name", ["mocov3_ctr__1", "mocov3_ctr__2"])
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    t = case.options["temperature"]
    q1, q2, k1, k2 = (case.leaf(key) for key in ("q1", "q2", "k1", "k2"))
    case.check(ctr(q1, k2, t), "loss_12")
    case.check(ctr(q2, k1, t), "loss_21")
    online, target = {"prediction": torch.stack([q1, q2])}, {"projection": torch.stack([k1, k2])}
    loss = MoCoV3(t).loss(online, target, unlabelled(len(q1)))["loss"]
    case.check(loss, "loss")
    loss.backward()
    case.check(q1.grad, "grad_q1")
    case.check(q2.grad, "grad_q2")
    assert k1.grad is None and k2.grad is None


@pytest.mark.parametrize("views", [2, 3, 4])
def test_any_number_of_views(views: int) -> None:
    q, k = torch.randn(2, views, 5, 3, dtype=torch.float64)
    actual, expected = (q.clone().requires_grad_() for _ in range(2))
    loss = MoCoV3(0.3).loss({"prediction": actual}, {"projection": k}, unlabelled(5))["loss"]
    pairs = [literal(expected[i], k[j], 0.3) for i in range(views) for j in range(views) if i != j]
    slow = 2 * sum(pairs) / len(pairs)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=0)
    loss.backward()
    slow.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_invalid_input_is_refused() -> None:
    with pytest.raises(ValueError, match="MoCo v3"):
        ctr(torch.randn(0, 3), torch.randn(0, 3))


@pytest.mark.parametrize(
    ("options", "projection", "closing"),
    [
        ({}, [(4096, 384), (256, 4096)], nn.Linear),
        ({"layers": 3, "last_norm": True}, [(4096, 384), (4096, 4096), (256, 4096)], nn.BatchNorm1d),
    ],
    ids=["ResNet", "ViT"],
)
def test_heads_are_the_authors(options: dict, projection: list, closing: type) -> None:
    heads = MoCoV3(**options).heads(384)
    shapes = {k: [tuple(m.weight.shape) for m in h.network if isinstance(m, nn.Linear)] for k, h in heads.items()}
    assert shapes == {"projection": projection, "prediction": [(4096, 256), (256, 4096)]}
    last = heads["projection"].network[-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.affine
    last = heads["prediction"].network[-1]
    assert isinstance(last, closing) and not getattr(last, "affine", False)
    assert heads["prediction"].online_only


def test_momentum_rises_to_1_along_half_a_cosine() -> None:
    method = MoCoV3()
    assert method.target_momentum(0.0) == pytest.approx(0.99) and method.target_momentum(1.0) == 1.0
    assert method.target_momentum(0.5) == pytest.approx(0.995)
