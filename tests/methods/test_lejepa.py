"""LeJEPA: vectors, SIGReg as loops, its directions, memory and the conventions of other implementations."""

import math
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from rank_pool import on_ranks
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.losses import lejepa, sigreg
from inbatch.methods.lejepa import LeJEPA
from inbatch.nn import slicing
from inbatch.nn.logsumexp import using
from inbatch.nn.slicing import random_directions


def literal(z: Tensor, directions: Tensor, points: int = 17, t_max: float = 3.0) -> Tensor:
    """The statistic of one sample of rows: the trapezoid rule over [-t_max, t_max], one direction at a time."""
    terms = []
    for a in directions.T:
        x, step = z @ (a / a.norm()), t_max / (points - 1)
        for j in range(1 - points, points):
            t = j * step
            normal = math.exp(-(t**2) / 2)
            real, imaginary = sum(torch.cos(t * x)) / len(x) - normal, sum(torch.sin(t * x)) / len(x)
            terms.append(step * (0.5 if abs(j) == points - 1 else 1) * normal * (real**2 + imaginary**2))
    return len(z) * sum(terms) / directions.shape[1]


@DTYPES
def test_vectors_of_sigreg(golden: Path, dtype: torch.dtype) -> None:
    """Statistics along single directions, and both conventions for several views."""
    case = Case(golden, "lejepa_ep__1", dtype)
    x, axes = case.leaf("x"), torch.eye(case.options["slices"], dtype=dtype)
    loss = sigreg(x[None], axes)
    case.check(loss, "loss")
    loss.backward()
    case.check(x.grad, "grad_x")
    case.check(torch.stack([sigreg(x.detach()[None], axis[:, None]) for axis in axes]), "stat")

    case = Case(golden, "lejepa_sigreg__1", dtype)
    z = case.leaf("z")
    loss = sigreg(z[None], case["directions"])
    case.check(loss, "loss")
    loss.backward()
    case.check(z.grad, "grad_z")

    case = Case(golden, "lejepa_sigreg__views", dtype)
    for samples, name in (("view", ""), ("all", "_flat")):
        z = case.leaf("z")
        loss = sigreg(z, case["directions"], samples)
        case.check(loss, "loss" + name)
        loss.backward()
        case.check(z.grad, "grad_z" + name)


@DTYPES
def test_vectors_of_the_loss(golden: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, terms and gradient, through function and method, and the value of stable-pretraining."""
    for name, views, names in (("1", None, ["z"]), ("multicrop", 2, ["z_global", "z_local"])):
        case = Case(golden, f"lejepa_loss__{name}", dtype)
        lamb, parts = case.options["lamb"], [case.leaf(x) for x in names]
        z, directions = torch.cat(parts), case["directions"]
        losses = lejepa(z, directions, lamb, views)
        for term, expected in (("loss", "loss"), ("invariance", "inv"), ("sigreg", "sigreg")):
            case.check(losses[term], expected)
        losses["loss"].backward()
        for part, x in zip(parts, names, strict=True):
            case.check(part.grad, f"grad_{x}")
        theirs = lejepa(z, directions, lamb, views, "all", weights="sum")
        case.check(theirs["loss"], "loss_stable_pretraining")
        monkeypatch.setattr("inbatch.methods.lejepa.random_directions", lambda *_, d=directions: d)
        batch = unlabelled(z.shape[1])
        assert torch.equal(LeJEPA(lamb, global_views=views).loss({"projection": z}, {}, batch)["loss"], losses["loss"])


def test_sigreg_as_loops_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of directions, and directions shared by ranks, give the same value and gradient."""
    z, directions = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    expected = sum(literal(view, directions, 9, 2.0) for view in z) / 2
    torch.testing.assert_close(sigreg(z, directions, points=9, t_max=2.0), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        sigreg(z, directions, scale="one", points=9, t_max=2.0), expected / 5, rtol=1e-12, atol=0
    )
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sigreg(leaf, directions), leaf)
    monkeypatch.setattr(slicing, "CHUNK", 20)
    value = sigreg(leaf, directions)
    torch.testing.assert_close(value.detach(), sum(literal(view, directions) for view in z) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient, rtol=1e-12, atol=1e-15)
    shares = []
    for rank in range(3):
        with using(rank=rank, world=3):
            shares.append(sigreg(z, directions))
    torch.testing.assert_close(sum(shares), value.detach(), rtol=1e-12, atol=0)


def test_no_array_of_all_projections_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest array is that of the rows, or of a chunk."""
    monkeypatch.setattr(slicing, "CHUNK", 2**10)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    z = torch.randn(2, 128, 8, requires_grad=True)
    with Watch():
        sigreg(z, random_directions(8, 300)).backward()
    assert 0 < max(largest) <= 8 * 300


def test_directions_are_a_function_of_seed_and_step() -> None:
    """Equal for a number and for a buffer, different for each step and seed, and uniform on the sphere."""
    first = random_directions(5, 4000, 3, 1)
    assert torch.equal(first, random_directions(5, 4000, torch.tensor(3), 1))
    for step, seed in ((4, 1), (3, 2)):
        assert abs(float((random_directions(5, 4000, step, seed) * first).sum(0).mean())) < 0.03
    torch.testing.assert_close(first.square().sum(0), torch.ones(4000).double())
    torch.testing.assert_close(first @ first.T / 800, torch.eye(5).double(), rtol=0, atol=0.08)
    assert first.mean(1).abs().max() < 0.03 and random_directions(1, 3).abs().eq(1).all()


def test_every_step_has_its_directions_and_a_resumed_run_the_same() -> None:
    method, z, batch = LeJEPA(slices=3), {"projection": torch.randn(2, 6, 4)}, unlabelled(6)
    values = []
    for _ in range(3):
        values.append(float(method.loss(z, {}, batch)["loss"]))
        state = {name: x.clone() for name, x in method.state_dict().items()}
        method.after_step(z, {}, batch, 0.0)
    again = LeJEPA(slices=3)
    again.load_state_dict(state)
    assert len(set(values)) == 3 and float(again.loss(z, {}, batch)["loss"]) == values[-1]
    other = Batch(batch.index, batch.label, seed=1)
    assert float(again.loss(z, {}, other)["loss"]) != values[-1]


def test_the_statistic_recognises_normal_rows() -> None:
    """1.05 on average for any number of normal rows; more for rows that are narrow, collapsed or of another shape."""
    for n in (50, 200):
        directions = random_directions(8, 40)
        normal = torch.randn(30, n, 8, generator=torch.Generator().manual_seed(n))
        assert float(sigreg(normal, directions)) == pytest.approx(1.0526, abs=0.12)
        for other in (0.3 * normal, 0 * normal, normal.sign()[..., :1].expand(-1, -1, 8), normal + 1):
            assert float(sigreg(other, directions)) > 2


def projected(rank: int) -> list[float]:
    """Return value and gradient of SIGReg whose directions the ranks share."""
    from inbatch.runtime import distributed

    z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    with using(rank=distributed.rank(), world=distributed.world(), add=distributed.add_):
        loss = sigreg(z, random_directions(4, 5))
    loss.backward()
    return [loss.item(), *z.grad.flatten().tolist()]


@pytest.mark.slow
def test_ranks_share_the_directions() -> None:
    for result in on_ranks(2, projected, 0):
        assert result == pytest.approx(projected(0), rel=1e-12)


def test_invalid_input_is_refused() -> None:
    z, directions = torch.randn(2, 4, 3), torch.randn(3, 2)
    for call in (
        lambda: lejepa(z[:1], directions), lambda: lejepa(z, directions, global_views=3),
        lambda: sigreg(z[:, :0], directions), lambda: sigreg(z, directions[:, :0]),
        lambda: sigreg(z, directions, points=1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"views|SIGReg"):
            call()
    for options in ({"lamb": 1.5}, {"lamb": math.nan}, {"slices": 0}, {"global_views": 0}, {"global_views": 3}):
        with pytest.raises(ValueError, match="choose"):
            LeJEPA(**options).prepare(images=9, classes=0, batch=4, views=2)


def test_the_projection_is_that_of_the_minimal_example() -> None:
    with torch.device("meta"):
        network = LeJEPA().heads(512)["projection"].network
    assert [layer.out_features for layer in network if isinstance(layer, nn.Linear)] == [2048, 2048, 16]
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in network) == 2 and isinstance(network[-1], nn.Linear)
