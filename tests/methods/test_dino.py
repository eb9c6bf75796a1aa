"""DINO: the centred teacher, its temperature over the epochs, and the head whose last layer has unit vectors."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import small_methods as small
import torch
from golden_vectors import DTYPES, Case
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.data.views import PRESETS
from inbatch.losses import dino
from inbatch.methods.dino import DINO


def batch(n: int, epoch: int = 0) -> Batch:
    return Batch(torch.arange(n), torch.full((n,), -1), epoch=epoch)


def prepared(case: Case) -> DINO:
    o = case.options
    return DINO(
        o["student_temp"], o["teacher_temp"], o["warmup_teacher_temp"], o["warmup_teacher_temp_epochs"],
        center_momentum=o["center_momentum"], num_prototypes=o["out_dim"],
    ).to(case.dtype)  # fmt: skip


@DTYPES
def test_dino_over_steps(golden: Path, dtype: torch.dtype) -> None:
    """Value, gradient and centre, through function and method; a step's loss uses the centre of the step before."""
    case = Case(golden, "dino__1", dtype)
    n, method = case.options["batch"], prepared(case)
    assert not method.center.any()
    method.center.copy_(case["center0"])
    for step in range(len(case.arrays["epochs"])):
        student = case["student"][step].requires_grad_()
        online = {"prototypes": student.unflatten(0, (case.options["ncrops"], n))}
        target = {"prototypes": case["teacher"][step].unflatten(0, (2, n))}
        arguments = online, target, batch(n, int(case["epochs"][step]))
        loss = method.loss(*arguments)["loss"]
        case.check(loss, "loss", step)
        t = float(case["teacher_temp"][step])
        direct = dino(online["prototypes"], target["prototypes"], method.center, case.options["student_temp"], t)
        torch.testing.assert_close(direct, loss, rtol=1e-6, atol=0)
        loss.backward()
        case.check(student.grad, "grad_student", step)
        method.after_step(*arguments, 0.0)
        case.check(method.center, "center_after", step)


def test_temperature_schedule(golden: Path) -> None:
    case = Case(golden, "dino__1")
    method, rows = prepared(case), {"prototypes": torch.ones(2, 3, 40)}
    with patch("inbatch.methods.dino.dino", wraps=dino) as seen:
        for epoch in range(case.options["nepochs"]):
            method.loss(rows, rows, batch(3, epoch))
    used = [call.args[-1] for call in seen.call_args_list]
    np.testing.assert_allclose(used, case.arrays["teacher_temp_schedule"], **case.tolerance)


def literal(student: Tensor, teacher: Tensor, center: Tensor, t: float, sharp: float) -> Tensor:
    """Caron et al. 2021, Eq. 3 and Algorithm 1, one sample and one pair of views at a time."""
    terms = []
    for i in range(len(teacher)):
        for v in range(len(student)):
            if v != i:
                for n in range(student.shape[1]):
                    p = ((teacher[i, n] - center) / sharp).exp()
                    q = (student[v, n] / t).exp()
                    terms.append(-sum(p[k] / p.sum() * (q[k] / q.sum()).log() for k in range(len(p))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 4])
def test_the_equation_as_loops(views: int) -> None:
    student = torch.randn(views, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher, center = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    actual = dino(student, teacher, center, 0.3, 0.2)
    expected = literal(student, teacher.detach(), center, 0.3, 0.2)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(actual, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not dino(student.detach(), teacher, center).requires_grad


def test_teacher_gets_the_large_views_and_a_rising_momentum() -> None:
    method = DINO(num_prototypes=6, momentum=0.9)
    assert (list(method.online_views(8)), list(method.target_views(8))) == (list(range(8)), [0, 1])
    momenta = [method.target_momentum(progress / 4) for progress in range(5)]
    assert momenta == sorted(momenta) and momenta[0] == pytest.approx(0.9) and momenta[-1] == 1.0


def test_the_head_is_the_paper_s() -> None:
    """Three layers with GELU and without norm, then 65536 unit vectors of 256 that are compared with unit rows."""
    heads = DINO().heads(384)
    widths = [(layer.in_features, layer.out_features) for layer in heads["projection"].network[::2]]
    assert widths == [(384, 2048), (2048, 2048), (2048, 256)]
    assert all(isinstance(layer, nn.GELU) for layer in heads["projection"].network[1::2])
    last = heads["prototypes"].network
    assert last.weight.shape == (65536, 256) and last.through and heads["prototypes"].source == "projection"
    rows, head = torch.randn(4, 8), DINO(num_prototypes=6, bottleneck_dim=8).heads(12)["prototypes"].network
    with torch.no_grad():
        before = head(rows)
        head.weight.mul_(3)
        torch.testing.assert_close(head(rows), before)  # the gain stays 1
    normed = DINO(norm=True, layers=2).heads(384)["projection"].network
    assert [type(layer).__name__ for layer in normed] == ["Linear", "BatchNorm1d", "GELU", "Linear"]


def test_the_last_layer_waits() -> None:
    method, network, _ = small.parts("dino-4")
    for epoch, learns in ((0, False), (1, True)):
        images = next(small.batches(8, 1, 4))[1]
        rows = network(images)
        method.loss(rows, {"prototypes": rows["prototypes"][:2]}, batch(8, epoch))["loss"].backward()
        method.on_gradients(network.heads, batch(8, epoch), 0.0)
        assert (network.heads["prototypes"].weight.grad is not None) == learns
        assert all(p.grad is not None for p in network.heads["projection"].parameters())


def test_views_are_the_authors() -> None:
    large, second, *rest = PRESETS["dino"](cut=0.14)
    assert (large.scale, large.blur, large.solarise) == ((0.14, 1.0), 1.0, 0.0)
    assert (second.scale, second.blur, second.solarise) == ((0.14, 1.0), 0.1, 0.2)
    assert len(rest) == 8 and {(v.size, v.scale, v.blur, v.solarise) for v in rest} == {(96, (0.05, 0.14), 0.5, 0.0)}


@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 4, 3), (1, 4, 3)), ((2, 4, 3), (3, 4, 3))], ids=["one view", "a view too many"]
)
def test_invalid_input_is_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a view predicts the others"):
        dino(torch.randn(student), torch.randn(teacher), torch.zeros(3))
