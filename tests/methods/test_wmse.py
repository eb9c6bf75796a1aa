"""W-MSE: whitening, sub-batches that depend only on the samples, and jitter if a covariance has no factor."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from torch import Tensor

import inbatch
from inbatch.batch import Batch
from inbatch.errors import ConfigError
from inbatch.losses import wmse
from inbatch.methods.wmse import WMSE, whiten
from inbatch.nn.functional import cholesky_with_jitter, moments

LOSSES = pytest.mark.parametrize("name", ["wmse_loss__1", "wmse_loss__2", "wmse_loss__3"])


def literal(z: Tensor, permutations: Tensor, size: int, eps: float, norm: bool) -> Tensor:
    """Ermolov et al. 2021, section 3: one sub-batch of one view at a time, one pair of rows at a time."""
    v, n, d = z.shape
    terms = []
    for order in permutations.tolist():
        white: dict[tuple[int, int], Tensor] = {}
        for start in range(0, n, size):
            group = order[start : start + size]
            for view in range(v):
                mean = sum(z[view, i] for i in group) / size
                cov = sum(torch.outer(z[view, i] - mean, z[view, i] - mean) for i in group) / (size - 1)
                matrix = torch.linalg.cholesky((1 - eps) * cov + eps * torch.eye(d, dtype=z.dtype)).inverse()
                white |= {(view, i): matrix @ (z[view, i] - mean) for i in group}
        for a, b in combinations(range(v), 2):
            for i in range(n):
                x, y = white[a, i], white[b, i]
                terms.append(2 - 2 * torch.cosine_similarity(x, y, 0) if norm else ((x - y) ** 2).mean())
    return sum(terms) / len(terms)


@DTYPES
@pytest.mark.parametrize("name", ["wmse_whitening__1", "wmse_whitening__2"])
def test_vectors_of_whitening(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Value and gradient, and the authors' layer in evaluation: the same functions with running statistics."""
    case = Case(golden, name, dtype)
    m, eps = case.options["momentum"], case.options["eps"]
    x = case.leaf("x")
    mean, cov = moments(x)
    lower, jitter = cholesky_with_jitter(cov, eps)
    y = whiten(x, mean, lower)
    case.check(y, "y")
    assert jitter == 0
    (y * case["cotangent"]).sum().backward()
    case.check(x.grad, "grad_x")

    running_mean, running_cov = m * mean, m * cov + (1 - m) * torch.eye(x.shape[1], dtype=dtype)
    case.check(running_mean[0], "running_mean")
    case.check(running_cov, "running_cov")
    case.check(whiten(case["x_eval"], running_mean, cholesky_with_jitter(running_cov, eps)[0]), "y_eval")


@DTYPES
@LOSSES
def test_vectors(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    o, z = case.options, case.leaf("z")
    losses = wmse(z, case["perms"], o["w_size"], o["eps"], o["norm"])
    case.check(losses["loss"], "loss")
    assert losses["jitter"] == 0
    losses["loss"].backward()
    case.check(z.grad, "grad_z")
    assert (z.grad.flatten(1).norm(dim=1) > 0.01).all()  # every view has one


@DTYPES
@LOSSES
def test_vectors_through_the_method(
    golden: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With draws whose order is the vector's permutation."""
    case = Case(golden, name, dtype)
    o, z = case.options, case.leaf("z")
    monkeypatch.setattr("inbatch.methods.wmse.uniform", lambda *key: case["perms"].argsort(1).T.float())
    method = WMSE(o["w_size"], o["w_iter"], o["eps"], o["norm"], out_dim=o["dim"])
    loss = method.loss({"projection": z}, {}, unlabelled(o["batch"]))["loss"]
    case.check(loss, "loss")
    loss.backward()
    case.check(z.grad, "grad_z")


@pytest.mark.parametrize(
    ("views", "iterations", "eps", "norm"), [(2, 1, 0.0, True), (3, 2, 0.0, True), (4, 2, 0.1, False)]
)
def test_the_equation_in_loops(views: int, iterations: int, eps: float, norm: bool) -> None:
    z = torch.randn(views, 12, 3, dtype=torch.float64)
    cuts = torch.stack([torch.randperm(12) for _ in range(iterations)])
    actual, expected = (z.clone().requires_grad_() for _ in range(2))
    loss, slow = wmse(actual, cuts, 6, eps, norm)["loss"], literal(expected, cuts, 6, eps, norm)
    torch.testing.assert_close(loss, slow, rtol=1e-11, atol=0)
    loss.backward()
    slow.backward()
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-11)


def cuts(method: WMSE, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[list[frozenset[int]]]:
    """Return the sub-batches of every split of a batch by the method, as sets of samples."""
    seen = []
    monkeypatch.setattr("inbatch.methods.wmse.wmse", lambda z, permutations, *rest: seen.append(permutations) or {})
    method.loss({"projection": torch.zeros(2, len(batch), method.out_dim)}, {}, batch)
    (permutations,) = seen
    assert torch.equal(permutations.sort(1).values, torch.arange(len(batch)).expand(method.w_iter, -1))
    groups = batch.index[permutations].unflatten(1, (-1, method.w_size))
    return [[frozenset(group) for group in cut] for cut in groups.tolist()]


def test_sub_batches_hang_on_seed_epoch_and_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method, label = WMSE(8, 3, out_dim=4), torch.full((32,), -1)
    index = torch.randperm(1000)[:32]
    first = cuts(method, Batch(index, label), monkeypatch)
    assert first == cuts(method, Batch(index, label), monkeypatch), "not pure"
    assert first == cuts(method, Batch(index.flip(0), label), monkeypatch), "the order of the samples matters"
    others = [Batch(index, label, seed=1), Batch(index, label, epoch=1), Batch(index + 1000, label)]
    again = [cuts(method, other, monkeypatch) for other in others]
    every = [*first, *again[0], *again[1], [{i - 1000 for i in group} for group in again[2][0]]]
    assert len({frozenset(map(frozenset, cut)) for cut in every}) == len(every), "the same cut twice"


def test_order_does_not_matter_where_draws_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inbatch.methods.wmse.uniform", lambda seed, epoch, index, *rest: torch.zeros(len(index), 1))
    method, index = WMSE(4, out_dim=2), torch.randperm(16)
    groups = [cuts(method, Batch(i, torch.full((16,), -1)), monkeypatch) for i in (index, index.flip(0))]
    assert groups[0] == groups[1]


def test_whitened_rows_are_white() -> None:
    x = torch.randn(3, 64, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 7
    mean, cov = moments(x)
    mean, cov = moments(whiten(x, mean, cholesky_with_jitter(cov)[0]))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
    torch.testing.assert_close(cov, torch.eye(5, dtype=torch.float64).expand(3, 5, 5), rtol=0, atol=1e-10)


DEPENDENT = {
    "the same twice": lambda z: torch.cat([z[..., :3], z[..., :3]], -1),
    "one direction": lambda z: z[..., :1] * torch.linspace(1, 2, 6),
    "dead": lambda z: z * (torch.arange(6) < 4),
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "small": lambda z: 1e-6 * z[..., :1].expand_as(z),
}


@DTYPES
@pytest.mark.parametrize("kind", DEPENDENT)
def test_dependent_features_get_jitter_and_a_warning(kind: str, dtype: torch.dtype) -> None:
    z = DEPENDENT[kind](torch.randn(2, 32, 6)).to(dtype).requires_grad_()
    with pytest.warns(UserWarning, match="features depend on each other") as warned:
        losses = wmse(z, torch.randperm(32)[None], 16)
    assert len(warned) == 1 and losses["jitter"] in torch.tensor([1e-5, 1e-3, 0.1], dtype=dtype)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and z.grad.isfinite().all()


def test_jitter_is_added_where_it_is_needed_and_as_much() -> None:
    spoilt = torch.diag(torch.tensor([3.0, 1.0, 0.0, -5e-4]))
    with pytest.warns(UserWarning, match="jitter"):
        lower, jitter = cholesky_with_jitter(torch.stack([torch.eye(4), spoilt, torch.ones(4, 4), torch.zeros(4, 4)]))
    torch.testing.assert_close(jitter, torch.tensor([0, 1e-3, 1e-5, 1e-5]))
    assert torch.equal(lower[0], torch.eye(4))
    torch.testing.assert_close(lower[1] @ lower[1].T, spoilt + 1e-3 * spoilt.diagonal().mean() * torch.eye(4))


def test_shrinking_needs_no_jitter() -> None:
    z = DEPENDENT["dead"](torch.randn(2, 32, 6))
    assert wmse(z, torch.arange(32)[None], 16, eps=0.01)["jitter"] == 0


@pytest.mark.filterwarnings("ignore:features depend on each other")
def test_nan_stays_nan() -> None:
    z = torch.randn(2, 32, 6)
    z[0, 0, 0] = torch.nan
    assert wmse(z, torch.arange(32)[None], 16)["loss"].isnan()


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 32, 4), 16), ((2, 32, 4), 12), ((2, 32, 16), 16), ((2, 8, 4), 16)],
    ids=["one view", "no divisor", "too wide", "larger than the batch"],
)  # fmt: skip
def test_invalid_input_is_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match=f"w_size {size}"):
        wmse(torch.randn(shape), torch.arange(shape[1])[None], size)


def test_a_batch_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    for method, batch in ((WMSE(), 192), (WMSE(w_size=64), 128)):
        with pytest.raises(ValueError, match="w_size"):
            method.prepare(images=1000, classes=0, batch=batch, views=2)
    WMSE().prepare(images=1000, classes=0, batch=256, views=4)
    with pytest.raises(ConfigError, match="w_size 48"):
        inbatch.pretrain("digits-canvas", "wmse", out=tmp_path / "run", settings={"method.w_size": 48}, quiet=True)
    assert not (tmp_path / "run" / "recipe.json").exists()
