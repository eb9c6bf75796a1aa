"""Random draws are uniform, independent along every part of their key, and the same on every machine and version."""

import itertools

import pytest
import torch
from scipy import stats

from inbatch import rng

INDEX = torch.arange(4000)
KEY = dict(seed=1, epoch=2, index=INDEX, view=3, count=8, attempt=0)


def test_draws_are_uniform():
    for seed in (0, 1, 2**40):
        u = rng.uniform(seed, 0, INDEX, 0, 8)
        assert u.shape == (4000, 8) and u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
        for column in u.T:
            assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_pairs_of_neighbours_fill_the_square_evenly():
    """Pairs of draws along the sample and along the column fill 16 x 16 cells evenly (chi-squared test)."""
    u = rng.uniform(5, 0, INDEX, 0, 8)
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        cells = (a.flatten() * 16).long() * 16 + (b.flatten() * 16).long()
        assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("part", ["seed", "epoch", "view", "attempt", "index"])
def test_every_part_of_the_key_gives_an_independent_stream(part):
    other = {**KEY, part: KEY[part] + 1}
    a, b = rng.uniform(**KEY), rng.uniform(**other)
    assert not (a == b).all(1).any()
    assert stats.pearsonr(a.flatten(), b.flatten()).pvalue > 1e-3


def test_parts_of_the_key_are_not_interchangeable():
    streams = [rng.uniform(s, e, INDEX[:50], v, 4, a) for s, e, v, a in itertools.product(range(3), repeat=4)]
    assert len({tuple(row) for stream in streams for row in stream.tolist()}) == 81 * 50


def test_a_sample_draws_the_same_in_any_batch_and_any_count():
    u = rng.uniform(**KEY)
    indices = torch.tensor([17, 3, 3999, 3])
    assert torch.equal(rng.uniform(1, 2, indices, 3, 8), u[indices])
    assert torch.equal(rng.uniform(1, 2, INDEX, 3, 3), u[:, :3])


def test_pinned_values():
    """Changed values would change every earlier run: the same seed would draw other views and another order."""
    assert rng.fold(0) == 8147104208329303767
    assert rng.fold(1, 2, 3) == 8640775144763925196
    u = rng.uniform(1, 2, torch.tensor([0, 1, 49_999]), 3, 3, 4)
    assert torch.equal(
        (u * 2**24).long(),
        torch.tensor([[14855181, 8568622, 9581979], [8641578, 3319428, 14887120], [5722721, 12750235, 1154441]]),
    )
    assert rng.permutation(3, 1, 8).tolist() == [1, 4, 0, 2, 5, 3, 6, 7]


def test_large_and_negative_keys():
    u = rng.uniform(2**63 - 1, 10**6, torch.tensor([0, 2**40, 2**62]), 200, 4)
    assert torch.isfinite(u).all() and len(u.unique()) == 12
    assert rng.fold(-1) != rng.fold(1)


def test_fold_depends_on_every_part_its_place_and_their_number():
    keys = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (2**63,), (1, 2, 3), (3, 2, 1), (1, 2, 3, 0)]
    assert len({rng.fold(*key) for key in keys}) == len(keys)
    assert all(0 <= rng.fold(*key) < 2**63 for key in keys)
    # One bit of the key changes half the bits of the result.
    turned = [(rng.fold(7, 9) ^ rng.fold(7 ^ 1 << bit, 9)).bit_count() for bit in range(62)]
    assert 28 < sum(turned) / len(turned) < 35


def test_permutation_is_one_and_changes_with_the_epoch():
    orders = [rng.permutation(0, epoch, 100) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert torch.equal(orders[1], rng.permutation(0, 1, 100))


def test_torch_generator_is_left_alone():
    before = torch.get_rng_state()
    rng.uniform(**KEY)
    rng.permutation(0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())
