"""Near duplicates within a batch: how they are found, and the same step for every number of groups and ranks."""

import pytest
import torch
from rank_pool import on_ranks
from small_methods import literal, train
from step_states import N, assert_same
from torch import Tensor

from inbatch.batch import Batch
from inbatch.context import negatives
from inbatch.context.negatives import Debias, DropSimilar, Hard, pairs_within, similar_groups
from inbatch.errors import ConfigError
from inbatch.methods import METHODS

FITS = [(method, "hard" if "hard" in METHODS[method].negatives else "group") for method in METHODS
        if METHODS[method].negatives]  # fmt: skip
FITS += [("simclr", "similar"), ("simclr", "group"), ("supcon", "group"), ("mocov3", "similar"), ("nnclr-3", "similar")]
FITS += [("moco", "group"), ("moco", "similar"), ("moco-symmetric", "group"), ("pcl", "similar")]


def components(rows: Tensor, threshold: float) -> tuple[list[int], int]:
    """Return the first sample of each sample's component, and the number of similar pairs, pair by pair."""
    z = (rows - rows.mean(0)).double()
    near = [(i, j) for i in range(len(z)) for j in range(i) if z[i] @ z[j] >= threshold * z[i].norm() * z[j].norm()]
    group = list(range(len(z)))
    for i, j in near * len(z):
        group[i] = group[j] = min(group[i], group[j])
    return group, len(near)


def test_groups_are_the_connected_components(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 4, generator=g)
    for threshold in (0.3, 0.9, 0.99):
        expected = components(rows, threshold)
        for held in (2**22, 100, 1):  # all at once, some rows at a time, one row at a time
            monkeypatch.setattr(negatives, "_HELD", held)
            group, pairs = similar_groups(rows, threshold)
            assert (group.tolist(), pairs) == expected
            sizes = [expected[0].count(x) for x in set(expected[0])]
            assert pairs_within(group) == sum(n * (n - 1) // 2 for n in sizes)


def test_a_chain_is_one_group() -> None:
    """A ~ B and B ~ C: all three, so that no similar pair is divided; the order does not matter."""
    angles = torch.tensor([0.0, 0.2, 0.4, 1.6, 3.2, 4.8])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    rows = torch.cat([rows, -rows])  # the mean is 0
    group, pairs = similar_groups(rows[torch.tensor([2, 0, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11])], 0.95)
    assert group[[0, 1, 3]].tolist() == [0, 0, 0]
    assert pairs < pairs_within(group)


def test_equal_rows_are_one_group_and_nothing_breaks() -> None:
    assert similar_groups(torch.ones(5, 3), 0.9)[1] == 0  # no direction is left
    rows = torch.randn(4, 3).repeat(2, 1)
    assert similar_groups(rows, 0.999)[0].tolist() == [0, 1, 2, 3] * 2


def test_known_groups_and_samples_without_one() -> None:
    drop = DropSimilar(by="group")
    drop.prepare(None)
    batch = Batch(torch.arange(6), torch.zeros(6).long(), group=torch.tensor([7, -1, 7, 2, -1, 7]))
    grouped, figures = drop(batch, lambda x, dim: x, 0)
    same = grouped.same.tolist()
    assert same[0] == same[2] == same[5] and len(set(same)) == 4 and figures == {"dropped_pairs": 3.0}


@pytest.mark.grid(4)
@pytest.mark.parametrize(("variant", "plug"), FITS)
@pytest.mark.parametrize("groups", [1, 4])
def test_groups_equal_plain_autograd(variant: str, plug: str, groups: int) -> None:
    actual, expected = train(variant, N, groups, plugs=(plug,)), literal(variant, N, groups, plugs=(plug,))
    assert_same(actual, expected)
    assert actual["loss"] != train(variant, N, groups)["loss"]


def train_one(variant: str, plug: str, groups: int) -> dict:
    return train(variant, N, groups, plugs=(plug,))


@pytest.mark.grid(2)
@pytest.mark.parametrize(("variant", "plug"), FITS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 2)])
def test_ranks_equal_plain_autograd(variant: str, plug: str, world: int, groups: int) -> None:
    for result in on_ranks(world, train_one, variant, plug, groups):
        assert_same(result, literal(variant, N, world * groups, plugs=(plug,)))


def test_wrong_values_are_refused() -> None:
    wrong = [(DropSimilar, "threshold", 0.0), (DropSimilar, "threshold", 1.1), (Hard, "tau_plus", 1.0)]
    for make, key, value in (*wrong, (Hard, "beta", -1.0), (Debias, "tau_plus", -0.1)):
        with pytest.raises(ConfigError, match=r"negatives\."):
            make(**{key: value})
