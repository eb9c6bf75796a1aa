"""Kendall's tau-b against scipy's, and pooled over groups."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from inbatch.evaluation.rank_correlation import Group, kendall_tau, pooled_tau


def test_tau_equals_that_of_scipy_also_with_ties() -> None:
    generator = np.random.default_rng(0)
    for n, levels in ((2, 100), (7, 100), (30, 4), (50, 1000)):
        x, y = generator.integers(0, levels, (2, n)).tolist()
        expected = kendalltau(x, y).statistic
        assert kendall_tau(x, y) == pytest.approx(expected, nan_ok=True)
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1 and kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


def test_tau_is_pooled_over_pairs_within_groups() -> None:
    up, down = Group([1, 2, 3], [1, 2, 3], "abc"), Group([1, 2], [2, 1], "ab")
    assert pooled_tau([up]).value == 1 and pooled_tau([up, down]).value == pytest.approx((3 - 1) / 4)
    shifted = Group([101, 102, 103], [-1, 0, 1], "abc")  # pairs of different groups are not compared
    assert pooled_tau([up, shifted]).value == 1
    missing = Group([1, math.nan, 3], [1, 5, 3], "abc")
    assert pooled_tau([missing]).value == 1 and math.isnan(pooled_tau([Group([math.nan], [1], "a")]).value)


def test_interval_resamples_units() -> None:
    """Copies of a setting narrow the interval of independent runs, not that of one setting."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=12)
    y = (x + generator.normal(size=12)).tolist()
    once = pooled_tau([Group(x, y, list(range(12)))], 500)
    assert once.low < once.value < once.high < 1 and once == pooled_tau([Group(x, y, list(range(12)))], 500)
    noisy, values = np.repeat(x, 4) + 1e-9 * np.arange(48), np.repeat(y, 4) + 1e-9 * np.arange(48)
    settings = pooled_tau([Group(noisy, values, np.repeat(range(12), 4).tolist())], 500)
    runs = pooled_tau([Group(noisy, values, list(range(48)))], 500)
    assert runs.high - runs.low < 0.75 * (settings.high - settings.low)
