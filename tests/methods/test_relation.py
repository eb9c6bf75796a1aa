"""Relation: SEED's vectors, the equation as loops, and no matrix of similarities."""

from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

from inbatch.losses import relation
from inbatch.methods.relation import Relation
from inbatch.nn import logsumexp
from inbatch.nn.functional import normalize


def literal(
    s: Tensor, t: Tensor, queue: Tensor, hot: float, cold: float, candidates: str, center: Tensor | None = None
) -> Tensor:
    """The cross-entropy of two distributions over the candidates, one sample at a time."""
    s, t = ([row / row.norm() for row in rows] for rows in (s, t.detach()))
    if center is not None:
        t, queue = ([(row - center) / (row - center).norm() for row in rows] for rows in (t, queue))
    terms = []
    for i in range(len(s)):
        rows = [*(t if candidates == "batch" else [t[i]]), *queue]
        p = torch.stack([t[i] @ row / cold for row in rows]).softmax(0)
        q = torch.stack([s[i] @ row / hot for row in rows]).softmax(0)
        terms.append(-sum(a * b.log() for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


@DTYPES
def test_vectors_of_seed(golden: Path, dtype: torch.dtype) -> None:
    """Value, gradient and queue of the authors' code over three steps."""
    case = Case(golden, "seed_steps__1", dtype)
    o = case.options
    method = Relation(o["temperature_student"], o["temperature_teacher"], o["queue_size"], None, "own", center=False)
    method.teacher_width = o["dim"]
    method.prepare()
    method.queue.to(dtype).rows.copy_(case["queue0"].T)
    for step in range(o["steps"]):
        s, t = case["student"][step].requires_grad_(), case["teacher"][step].requires_grad_()
        rows = {"projection": s[None]}, {"features": t[None]}, unlabelled(o["batch"])
        loss = method.loss(*rows)["loss"]
        case.check(loss, "loss", step)
        loss.backward()
        case.check(s.grad, "grad_student", step)
        assert t.grad is None
        method.after_step({"projection": s.detach()[None]}, {"features": t.detach()[None]}, rows[2], 0.0)
        case.check(method.queue.rows.T, "queue_after", step)
        assert method.queue.pointer == case["ptr_after"][step]


@pytest.mark.parametrize("candidates", ["batch", "own"])
@pytest.mark.parametrize("centred", [False, True])
def test_the_equation_as_loops(candidates: str, centred: bool) -> None:
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    queue = normalize(torch.randn(7, 5, generator=g, dtype=torch.float64))
    leaf, other = s.clone().requires_grad_(), s.clone().requires_grad_()
    how = t, queue, 0.2, 0.1, candidates
    center = torch.cat([normalize(t), queue]).mean(0) if centred else None
    actual, expected = relation(leaf, *how, center=center), literal(other, *how, center)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: relation(x, *how, center=center), s.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(relation(s, *how, center=center), expected, rtol=1e-12, atol=0)


def test_the_center_is_the_mean_of_batch_and_stored_rows() -> None:
    """Teachers whose rows all have one direction in common, as pooled outputs of ReLU do, are distinguished by it."""
    g = torch.Generator().manual_seed(0)
    rows = 20 + torch.randn(3, 1, 8, 6, generator=g, dtype=torch.float64)
    method = Relation(0.04, 0.04, queue_size=20)
    method.teacher_width = 6
    method.prepare()
    for step, t in enumerate(rows):
        stored = normalize(rows[:step].reshape(-1, 6))
        center = torch.cat([stored, normalize(t[0])]).mean(0)
        queue = method.queue.to(t.dtype).rows
        leaf = t.clone().requires_grad_()
        loss = method.loss({"projection": leaf}, {"features": t}, unlabelled(8))["loss"]
        torch.testing.assert_close(loss, literal(t[0], t[0], queue, 0.04, 0.04, "batch", center), rtol=1e-9, atol=0)
        method.after_step({"projection": t}, {"features": t}, unlabelled(8), 0.0)
    teacher = normalize(t[0])
    spread = (
        (teacher @ teacher.T / 0.04).softmax(1).amax(1),
        (normalize(teacher - center) @ normalize(teacher - center).T / 0.04).softmax(1).amax(1),
    )
    assert spread[0].max() < 0.2 and spread[1].min() > 0.9


def test_a_student_with_the_teachers_relations_has_the_least_loss() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.randn(12, 6, generator=g, dtype=torch.float64)
    queue = normalize(torch.randn(9, 6, generator=g, dtype=torch.float64))
    s = t.clone().requires_grad_()
    least = relation(s, t, queue, 0.1, 0.1)
    least.backward()
    assert s.grad.abs().max() < 1e-14
    assert relation(t + 0.1 * torch.randn(t.shape, generator=g, dtype=t.dtype), t, queue, 0.1, 0.1) > least


def test_no_matrix_is_held_for_the_backward_pass() -> None:
    """Tiles give the value and gradient of the matrix, and nothing of its size is kept."""
    g = torch.Generator().manual_seed(0)
    s, t, queue = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (400, 400, 700))
    results = []
    for mode in ("never", "always"):
        leaf, kept = s.clone().requires_grad_(), list[int]()
        with (
            logsumexp.using(mode=mode),
            torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x),
        ):
            loss = relation(leaf, t, normalize(queue), 0.1, 0.05)
        loss.backward()
        results.append((loss.detach(), leaf.grad, max(kept)))
    (value, gradient, matrix), (tiled, tiled_gradient, largest) = results
    assert matrix == 400 * 1100 and largest <= 1100 * 4
    torch.testing.assert_close(tiled, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(tiled_gradient, gradient, rtol=1e-9, atol=1e-14)


def test_wrong_rows_and_queues_are_refused() -> None:
    with pytest.raises(ValueError, match="every row needs a row of the teacher"):
        relation(torch.ones(0, 3), torch.ones(0, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="at least one row, not 0"):
        Relation(queue_size=0).prepare()
