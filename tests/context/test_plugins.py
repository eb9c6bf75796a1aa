"""Every plug-in with every method gives the same result for every number of groups and ranks."""

import functools
import itertools

import pytest
import small_methods as small
from rank_pool import on_ranks
from small_methods import PLUGS, literal, train
from step_states import N, assert_same

from inbatch.methods import METHODS

TOGETHER = ("all conv", "all set")
ALONE = [name for name in PLUGS if name not in TOGETHER]
PAIRS = [(method, plugs) for method in METHODS for plugs in TOGETHER]
PAIRS += itertools.product(("simclr", "moco", "byol", "simclr-joined", "swav-4"), ALONE)
"""All plug-ins together with every method; single plug-ins with a few methods."""


@functools.cache
def expected(variant: str, plugs: str, groups: int) -> dict[str, list]:
    """Compute the result by plain autograd; groups of one process and groups of several ranks give the same."""
    return literal(variant, N, groups, plugs=PLUGS[plugs])


@pytest.mark.grid(8)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_equal_plain_autograd(variant: str, plugs: str, groups: int) -> None:
    assert_same(train(variant, N, groups, plugs=PLUGS[plugs]), expected(variant, plugs, groups))


def train_one(variant: str, plugs: str, groups: int, synced: bool, dropout: float) -> dict:
    small.DROPOUT = dropout
    return train(variant, N, groups, synced=synced, plugs=PLUGS[plugs])


@pytest.mark.grid(1)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 2)])
def test_ranks_equal_plain_autograd(variant: str, plugs: str, world: int, groups: int) -> None:
    for result in on_ranks(world, train_one, variant, plugs, groups, False, 0.2):
        assert_same(result, expected(variant, plugs, world * groups))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
def test_a_group_over_two_ranks_is_one_group(variant: str, plugs: str) -> None:
    """With synchronised norm, fusion and attention also extend over ranks."""
    whole = on_ranks(1, train_one, variant, plugs, 1, True, 0.0)[0]
    # Norms over ranks add in another order, and W-MSE whitens 4 samples in 2 dimensions here: a condition number of
    # 20,000 (measured) amplifies that rounding more than in any other method.
    tolerance = 1e-10 if variant == "wmse" else 1e-12
    for result in on_ranks(2, train_one, variant, plugs, 1, True, 0.0):
        assert_same(result, whole, tolerance)
