"""Gradient caching and ranks: every layout of a batch gives the step of plain autograd."""

import functools

import pytest
import small_methods as small
from rank_pool import on_ranks
from small_methods import VARIANTS, literal, train
from step_states import N, assert_same

from inbatch import api
from inbatch.data.views import Views
from inbatch.methods import METHODS
from inbatch.training import grad_cache
from inbatch.training.monitors.context_leak import leak


@functools.cache
def expected(variant: str, groups: int) -> dict[str, list]:
    """Compute the result by plain autograd; groups of one process and groups of several ranks give the same."""
    return literal(variant, N, groups)


@pytest.mark.grid(18)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_equal_plain_autograd(variant: str, groups: int) -> None:
    assert_same(train(variant, N, groups), expected(variant, groups))


def train_one(variant: str, groups: int, synced: bool, dropout: float) -> dict:
    small.DROPOUT = dropout
    return train(variant, N, groups, synced=synced)


@pytest.mark.grid(4)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_equal_plain_autograd(variant: str, world: int, groups: int) -> None:
    for result in on_ranks(world, train_one, variant, groups, False, 0.2):
        assert_same(result, expected(variant, world * groups))


def train_gathered(variants: tuple[str, ...], groups: int) -> list[dict]:
    """Train as a rank whose methods read the rows of all ranks, which is the default of a user's own method."""
    for variant in variants:
        METHODS[VARIANTS[variant][0]].own_rows = False  # this process ends with the test
    return [train_one(variant, groups, False, 0.2) for variant in variants]


@pytest.mark.parametrize("variants", [("simclr", "moco", "vicreg"), pytest.param((*VARIANTS,), marks=pytest.mark.slow)])
def test_gathered_rows_equal_plain_autograd(variants: tuple[str, ...]) -> None:
    for rank in on_ranks(2, train_gathered, variants, 2):
        for variant, result in zip(variants, rank, strict=True):
            assert_same(result, expected(variant, 4))


@pytest.mark.grid(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", [2, 4])
def test_synchronised_norm_is_one_group(variant: str, world: int) -> None:
    """With norm over all ranks, W ranks are one context group of the batch (no dropout: its draws are per rank)."""
    whole = on_ranks(1, train_one, variant, 1, False, 0.0)[0]
    for result in on_ranks(world, train_one, variant, 1, True, 0.0):
        assert_same(result, whole)


@pytest.mark.grid(1)
@pytest.mark.parametrize("plug", [{}, {"shuffle_groups": True}, {"curate": "redraw"}, {"fuse": "conv"}])
@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_only_one_groups_views_are_held(method: str, plug: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The views of a whole batch are never drawn at once: not by the step, by curation, or by the leak monitor."""
    settings = {"curate.warmup": 0.0} if "curate" in plug else {}
    named = {f"{key}.name" if key in ("curate", "fuse") else key: value for key, value in plug.items()}
    options = {"subset": 160, "batch_size": 32, "context": 8, "epochs": 3, "device": "cpu"}
    built = api.prepare("digits-canvas", method, settings=settings | named, **options)
    drawn, draw = [], Views.__call__
    monkeypatch.setattr(Views, "__call__", lambda self, batch: drawn.append(len(batch)) or draw(self, batch))
    built.step(next(iter(built.loader.epoch(1))), 5)
    assert max(drawn) <= 8 and sum(drawn) >= 2 * 32, "twice"
    leak(built, 1)
    assert max(drawn) <= 8


def test_backward_pass_holds_the_graph_of_one_group() -> None:
    """With several groups the first pass keeps no graph and returns only rows."""
    _, network, _ = small.parts("simclr")
    images = next(small.batches(N, 1, 2))[1]
    groups = [functools.partial(tuple, group) for group in grad_cache.cut(list(images), 4)]
    swept = grad_cache.forward_groups(network, network, groups, range(2), [1, 2, 3, 4], grad=True)
    assert swept.live is None and not swept.rows["projection"].requires_grad
    assert swept.rows["projection"].shape == (2, N, 8)
