"""NNCLR: neighbours are found before rows are stored, and contrast with them in two conventions."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor, nn

from inbatch.losses import nnclr, nt_xent
from inbatch.methods.nnclr import NNCLR, neighbours
from inbatch.nn.functional import normalize
from inbatch.nn.memory_bank import MemoryBank


def literal(near: Tensor, p: Tensor, t: float) -> Tensor:
    """Dwibedi et al. 2021, Eq. 3, one neighbour at a time."""
    near, p = ([row / row.norm() for row in rows] for rows in (near.detach(), p))
    terms = [-((u @ p[i] / t).exp() / sum((u @ w / t).exp() for w in p)).log() for i, u in enumerate(near)]
    return sum(terms) / len(terms)


def full(method: NNCLR, support: Tensor, pointer: int = 0) -> NNCLR:
    """Return the method with this support set."""
    method.queue = MemoryBank(*support.shape).to(support.dtype)
    method.queue.rows.copy_(support)
    method.queue.filled.fill_(len(support))
    method.queue.pointer.fill_(pointer)
    return method


@DTYPES
@pytest.mark.parametrize("name", ["nnclr__1", "nnclr__2"])
@pytest.mark.parametrize(("contrast", "suffix"), [("one_way", ""), ("nt_xent", "_lightly")])
def test_vectors(golden: Path, name: str, contrast: str, suffix: str, dtype: torch.dtype) -> None:
    """Neighbours, value, gradient and memory of the reference; value and gradient of lightly's convention."""
    case = Case(golden, name, dtype)
    o, support = case.options, case["support"]
    z1, z2, p1, p2 = (case.leaf(key) for key in ("z1", "z2", "p1", "p2"))
    near = [neighbours(z, support, torch.tensor(len(support))) for z in (z1, z2)]
    for nearest, number in zip(near, (1, 2), strict=True):
        assert torch.equal(nearest, support[case[f"nn_idx{number}"]])
        case.check(nearest, f"nn{number}")
        assert not nearest.requires_grad
    t = o["temperature"]
    loss = (nnclr(near[0], p2, t, contrast) + nnclr(near[1], p1, t, contrast)) / 2
    case.check(loss, f"loss{suffix}")

    method = full(NNCLR(t, out_dim=o["dim"], queue_size=8, contrast=contrast), support, o["queue_ptr_before"])
    online = {"projection": torch.stack([z1, z2]), "prediction": torch.stack([p1, p2])}
    loss = method.loss(online, {}, unlabelled(o["batch"]))["loss"]
    case.check(loss, f"loss{suffix}")
    loss.backward()
    case.check(p1.grad, f"grad_p1{suffix}")
    case.check(p2.grad, f"grad_p2{suffix}")
    assert z1.grad is None and z2.grad is None
    case.check(method.queue.rows, "support")

    method.after_step({k: x.detach() for k, x in online.items()}, {}, unlabelled(o["batch"]), 0.0)
    case.check(method.queue.rows, "support_after")
    assert method.queue.pointer == case["ptr_after"][0]


@pytest.mark.parametrize("views", [2, 3, 4])
def test_any_number_of_views(views: int) -> None:
    z, p = torch.randn(2, views, 5, 3, dtype=torch.float64)
    support = normalize(torch.randn(9, 3, dtype=torch.float64))
    method = full(NNCLR(0.3, out_dim=3, queue_size=9), support)
    actual, expected = (p.clone().requires_grad_() for _ in range(2))
    loss = method.loss({"projection": z, "prediction": actual}, {}, unlabelled(5))["loss"]
    near = [torch.stack([max(support, key=lambda s, row=row: float(row @ s)) for row in view]) for view in z]
    pairs = [literal(near[i], expected[j], 0.3) for i in range(views) for j in range(views) if i != j]
    slow = sum(pairs) / len(pairs)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=0)
    loss.backward()
    slow.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_nt_xent_of_a_pair_is_simclr_s() -> None:
    near, p = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(nnclr(near, p, 0.2, "nt_xent"), nt_xent(torch.stack([near, p]), 0.2))


def test_only_filled_rows_are_neighbours_and_while_there_are_none_the_row_itself() -> None:
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    support = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    nearest = {0: torch.eye(2), 1: support[[0, 0]], 2: support[[0, 0]], 3: support[[2, 0]], 4: support[[2, 3]]}
    for filled, expected in nearest.items():
        assert torch.equal(neighbours(z, support, torch.tensor(filled)), expected)


def test_nnclr_reads_the_queue_before_it_pushes() -> None:
    """If rows were stored first, each would find itself as neighbour, and the loss would be almost 0."""
    method = full(NNCLR(0.01, out_dim=4, queue_size=8), torch.eye(4)[3].expand(8, 4))
    rows = torch.eye(4)[:3].expand(2, 3, 4)
    arguments = {"projection": rows, "prediction": rows}, {}, unlabelled(3)
    assert method.loss(*arguments)["loss"] > 1
    method.after_step(*arguments, 0.0)
    assert method.loss(*arguments)["loss"] < 1e-6


def test_queue_stores_view_0_as_unit_rows() -> None:
    method = NNCLR(out_dim=4, queue_size=8)
    z = 5 * torch.randn(3, 2, 4)
    method.after_step({"projection": z, "prediction": z}, {}, unlabelled(2), 0.0)
    assert method.queue.filled == 2 and method.queue.pointer == 2
    assert torch.equal(method.queue.rows[:2], normalize(z[0]))


def test_invalid_input_is_refused() -> None:
    with pytest.raises(ValueError, match="NNCLR"):
        nnclr(torch.randn(1, 3), torch.randn(1, 3))


def test_heads_are_the_paper_s() -> None:
    heads = NNCLR(queue_size=1).heads(512)
    shapes = {k: [tuple(m.weight.shape) for m in h.network if isinstance(m, nn.Linear)] for k, h in heads.items()}
    assert shapes == {"projection": [(2048, 512), (2048, 2048), (256, 2048)], "prediction": [(4096, 256), (256, 4096)]}
    assert isinstance(heads["projection"].network[-1], nn.BatchNorm1d)
    assert isinstance(heads["prediction"].network[-1], nn.Linear)
