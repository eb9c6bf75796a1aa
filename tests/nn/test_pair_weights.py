"""Weights per pair: value and gradient are those of the literal equation, in tiles, materialised and over ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor

from inbatch.nn import logsumexp, row_blocks, tiles
from inbatch.nn.functional import normalize
from inbatch.nn.logsumexp import SameGroup

N, M, WIDTH = 17, 23, 5
IDS, KEY_IDS = torch.arange(N) % 6, torch.arange(M) % 6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, also partial ones, in small matrices."""
    monkeypatch.setattr(tiles, "TILE", 7)
    monkeypatch.setattr(tiles, "APART", 0)
    monkeypatch.setattr(logsumexp, "_BLOCK", 100)


@dataclass(frozen=True)
class Matrix:
    """Weights of any size, not symmetric, from a matrix."""

    w: Tensor

    def tile(self, rows: slice, columns: slice) -> Tensor:
        return self.w[rows, columns]


def matrix(n: int, m: int) -> Matrix:
    w = torch.rand(n, m, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Matrix(w * (w > 0.3) * 4)


def rows(n: int, seed: int) -> Tensor:
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x).requires_grad_()


def literal(q: Tensor, k: Tensor, t: float, exclude_self: bool, w: Tensor) -> Tensor:
    sums = []
    for i in range(len(q)):
        others = torch.tensor([j for j in range(len(k)) if not (exclude_self and i == j)])
        sums.append((w[i, others] * (k[others] @ q[i] / t).exp()).sum().log())
    return torch.stack(sums)


def cases() -> Iterator[tuple[str, Tensor, Tensor, bool, logsumexp.PairWeights]]:
    u, q, k = rows(N, 0), rows(N, 1), rows(M, 2)
    for weight in (0.0, 0.25, 3.0):
        yield f"symmetric {weight}", u, u, True, SameGroup(IDS, IDS, weight)
        yield f"keys {weight}", q, k, False, SameGroup(IDS, KEY_IDS, weight)
    yield "the same rows, other ids", u, u, True, SameGroup(IDS, IDS // 2, 0.5)
    yield "the same rows, any weights", u, u, False, matrix(N, N)
    yield "keys, any weights", q, k, True, matrix(N, M)
    yield "keys without gradient", q, k.detach(), False, SameGroup(IDS, KEY_IDS, 0.0)
    yield "queries without gradient", q.detach(), k, False, SameGroup(IDS, KEY_IDS, 0.5)


def value_and_gradients(value: Tensor, q: Tensor, k: Tensor) -> list[Tensor]:
    leaves = [x for x in ((q,) if k is q else (q, k)) if x.requires_grad]
    return [value, *torch.autograd.grad((value * torch.linspace(-1, 2, len(value))).sum(), leaves)]


@pytest.mark.parametrize("mode", ["always", "never"])
def test_value_and_gradient_equal_the_literal_equation(mode: logsumexp.Mode) -> None:
    for name, q, k, exclude_self, weights in cases():
        w = weights.tile(slice(0, len(q)), slice(0, len(k)))
        for t in (0.5, 0.0015):  # logits too large for tiles take blocks of the matrix
            expected = literal(q, k, t, exclude_self, w)
            assert expected.isfinite().all()
            with logsumexp.using(mode=mode):
                value = logsumexp.logsumexp(q, k, t, exclude_self, weights)
            for a, b in zip(value_and_gradients(value, q, k), value_and_gradients(expected, q, k), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11, msg=lambda m, n=name, t=t: f"{n}, {t}: {m}")


def test_gradient_equals_finite_differences() -> None:
    q, k = rows(5, 3), rows(9, 4)
    with logsumexp.using(mode="always"):
        weights = SameGroup(IDS[:5], KEY_IDS[:9], 0.3)
        assert torch.autograd.gradcheck(lambda q, k: logsumexp.logsumexp(q, k, 0.3, False, weights), (q, k))
        weights = SameGroup(KEY_IDS[:9], KEY_IDS[:9], 0.3)
        symmetric = SameGroup(weights.q_ids, weights.q_ids, 0.3)
        assert torch.autograd.gradcheck(lambda k: logsumexp.logsumexp(k, k, 0.3, True, symmetric), k)


def test_only_symmetric_weights_halve_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    u, halves = rows(N, 0), []
    monkeypatch.setattr(logsumexp._Tiled, "apply", lambda q, k, *rest: halves.append(k is None) or q.sum())
    with logsumexp.using(mode="always"):
        for weights in (None, SameGroup(IDS, IDS), SameGroup(IDS, IDS.clone()), matrix(N, N)):
            logsumexp.logsumexp(u, u, 0.5, weights=weights)
    assert halves == [True, True, False, False]


@pytest.mark.parametrize("mode", ["always", "never"])
def test_rows_without_a_pair_are_minus_infinity_and_give_no_gradient(mode: logsumexp.Mode) -> None:
    ids = torch.tensor([0] * 9 + [1])  # rows of group 0 have one pair each, the row of group 1 has nine
    for t in (0.5, 0.0015):
        for exclude_self, groups, empty in ((True, torch.zeros(10).long(), range(10)), (False, ids, ())):
            u, q, k = rows(10, 0), rows(10, 1), rows(10, 2)
            for a, b in ((u, u), (q, k), (q, k.detach())):
                with logsumexp.using(mode=mode):
                    value = logsumexp.logsumexp(a, b, t, exclude_self, SameGroup(groups, groups))
                assert [i for i in range(10) if value[i] == -torch.inf] == list(empty)
                leaves = [x for x in ((a,) if b is a else (a, b)) if x.requires_grad]
                for gradient in torch.autograd.grad(torch.logaddexp(value, torch.zeros(10)).sum(), leaves):
                    assert gradient.isfinite().all() and (not empty or not gradient.any())


def on_a_rank() -> list[list[float]]:
    logsumexp.LEAST, row_blocks.LEAST, tiles.TILE, tiles.APART = 0, 0, 5, 0
    import torch.distributed as dist

    def add(x: Tensor) -> None:
        dist.all_reduce(x)

    out = []
    with logsumexp.using(rank=dist.get_rank(), world=dist.get_world_size(), add=add):
        for _, q, k, exclude_self, weights in cases():
            value = logsumexp.logsumexp(q, k, 0.5, exclude_self, weights)
            out += [x.flatten().tolist() for x in value_and_gradients(value, q, k)]
    return out


def test_ranks_share_the_tiles() -> None:
    expected: list[list[float]] = []
    with logsumexp.using(mode="never"):
        for _, q, k, exclude_self, weights in cases():
            value = logsumexp.logsumexp(q, k, 0.5, exclude_self, weights)
            expected += [x.flatten().tolist() for x in value_and_gradients(value, q, k)]
    for values in on_ranks(2, on_a_rank):
        for a, b in zip(values, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12)


def test_wrong_weights_are_refused() -> None:
    q, k = rows(N, 0), rows(M, 1)
    for ids, key_ids, weight, words in (
        (IDS, KEY_IDS, -0.5, "at least 0"),
        (IDS, KEY_IDS, math.inf, "finite"),
        (IDS.float(), KEY_IDS, 0.0, "integer"),
        (KEY_IDS, IDS, 0.0, "17 queries and 23 keys need as many ids, got 23 and 17"),
    ):
        with pytest.raises(ValueError, match=words):
            logsumexp.logsumexp(q, k, 0.5, weights=SameGroup(ids, key_ids, weight))
