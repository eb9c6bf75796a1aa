"""Sums of pairwise sigmoid losses: value and gradients are those of the literal equation, in tiles and over ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor

from inbatch.nn import logsumexp, sigmoid_sums, tiles
from inbatch.nn.pair_weights import PairWeights, SameGroup
from inbatch.nn.sigmoid_sums import sigmoid_sum

N, M, WIDTH = 17, 23, 5
IDS, KEY_IDS = torch.arange(N) % 6, torch.arange(M) % 6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, also partial ones, in small matrices."""
    monkeypatch.setattr(tiles, "TILE", 5)
    monkeypatch.setattr(tiles, "APART", 0)


@dataclass(frozen=True)
class Ramp:
    """Weights that are not function of groups."""

    def tile(self, rows: slice, columns: slice) -> Tensor:
        i, j = torch.arange(rows.start, rows.stop), torch.arange(columns.start, columns.stop)
        return (i[:, None] + 2 * j) % 4 / 2


def rows(n: int, seed: int, dtype: torch.dtype = torch.float64, length: float = 1.0) -> Tensor:
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (length * x).to(dtype).requires_grad_()


Case = tuple[list[Tensor], SameGroup | None, PairWeights | None]


def cases(dtype: torch.dtype = torch.float64, length: float = 1.0) -> Iterator[Case]:
    q, k, b = rows(N, 1, dtype, length), rows(M, 2, dtype, length), rows(N, 3, dtype)[:, 0].detach().requires_grad_()
    yield [q, k, b], None, None
    yield [q, k, b], SameGroup(IDS, KEY_IDS), None
    yield [q, k, b], None, SameGroup(IDS, KEY_IDS, 0.25)
    yield [q, k, b], SameGroup(IDS // 2, KEY_IDS // 2), Ramp()
    yield [q, k.detach(), b.detach()], None, None
    yield [q.detach(), k, b.detach()], None, SameGroup(IDS, KEY_IDS)
    yield [q, q], SameGroup(IDS, IDS), None


def literal(x: list[Tensor], positive: SameGroup | None, weights: PairWeights | None) -> Tensor:
    """Add the losses pair by pair, in float64, of positive and negative logits alike."""
    q, k, b = (v.double() for v in (*x, torch.zeros(len(x[0])))[:3])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        same = torch.arange(len(k)) == i if positive is None else positive.k_ids == positive.q_ids[i]
        logit = torch.where(same, -1.0, 1.0) * (k @ q[i] + b[i])
        loss = logit.clamp(min=0) + torch.log1p((-logit.abs()).exp())
        w = 1 if weights is None else weights.tile(slice(i, i + 1), slice(0, len(k)))[0].double()
        total = total + (w * loss).sum()
    return total


def value_and_gradients(value: Tensor, x: list[Tensor]) -> list[Tensor]:
    leaves = list(dict.fromkeys(v for v in x if v.requires_grad))
    return [value, *torch.autograd.grad(3 * value, leaves)]


@pytest.mark.parametrize("mode", ["always", "never"])
def test_value_and_gradients_equal_the_literal_equation(mode: logsumexp.Mode) -> None:
    for dtype, length, tolerance in (
        (torch.float64, 1.0, 1e-12),
        (torch.float64, 30.0, 1e-12),  # logits beyond the cap
        (torch.float32, 0.1, 1e-5),
        (torch.float32, 8.0, 1e-5),
    ):
        for x, positive, weights in cases(dtype, length):
            with logsumexp.using(mode=mode):
                value = sigmoid_sum(*x, positive=positive, weights=weights)
            expected = value_and_gradients(literal(x, positive, weights), x)
            for a, b in zip(value_and_gradients(value, x), (y.detach().double() for y in expected), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_small_losses_keep_their_relative_precision() -> None:
    """At a logit of -40 the loss is 4e-18, which 1 + p or 1 - sigmoid would round away."""
    q = torch.full((8, 1), 1.0, dtype=torch.float32)
    for logit in (-10.0, -40.0):
        everything = SameGroup(torch.zeros(8).long(), torch.ones(8).long())  # no positives
        with logsumexp.using(mode="always"):
            value = sigmoid_sum(q, logit * q, positive=everything)
        assert float(value) == pytest.approx(64 * math.log1p(math.exp(logit)), rel=1e-5)


def test_gradient_equals_finite_differences() -> None:
    q, k, b = rows(6, 1), rows(7, 2), rows(6, 3)[:, 0].detach().requires_grad_()
    with logsumexp.using(mode="always"):
        weights = SameGroup(IDS[:6], KEY_IDS[:7], 0.5)
        assert torch.autograd.gradcheck(lambda q, k, b: sigmoid_sum(q, k, b, weights=weights), (q, k, b))


def test_no_matrix_of_pairs_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the sum nor for its gradients; it is chosen by size."""
    calls: list[bool] = []
    whole = sigmoid_sums._whole
    monkeypatch.setattr(sigmoid_sums, "_whole", lambda *args: calls.append(True) or whole(*args))
    monkeypatch.setattr(sigmoid_sums, "LEAST", N * M)
    x, positive, weights = next(cases())
    sigmoid_sum(*x, positive=positive, weights=weights)
    assert not calls
    sigmoid_sum(x[0], x[1][1:], x[2])
    assert calls
    own = sigmoid_sums._LogisticTiles(*x, positive, weights, tiles.LogSumExpConfig())
    assert own.buffer().numel() <= 2 * 5 * 5


def on_a_rank() -> list[list[float]]:
    import torch.distributed as dist

    tiles.TILE, tiles.APART = 5, 0
    out = []
    with logsumexp.using(mode="always", rank=dist.get_rank(), world=dist.get_world_size(), add=dist.all_reduce):
        for x, positive, weights in cases():
            value = sigmoid_sum(*x, positive=positive, weights=weights)
            out += [y.flatten().tolist() for y in value_and_gradients(value, x)]
    return out


def test_ranks_share_the_tiles() -> None:
    expected: list[list[float]] = []
    for x, positive, weights in cases():
        expected += [y.flatten().tolist() for y in value_and_gradients(literal(x, positive, weights), x)]
    for values in on_ranks(2, on_a_rank):
        for a, b in zip(values, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-11, abs=1e-11)


def test_wrong_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="need as many ids"):
        sigmoid_sum(rows(N, 0), rows(M, 1), positive=SameGroup(IDS, IDS))
