"""Paired differences over few seeds: tests, intervals, correction for several, and the seeds that one needs."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

LEVEL = 0.05
"""Significance level, for all comparisons of a table together."""
POWER = 0.8
"""Probability of showing a true difference, for which numbers of seeds are planned."""
CAUTION = 0.8
"""Confidence of the upper limit of the spread that is used for a cautious number of seeds (Browne 1995)."""
MOST = 10_000
"""Number of seeds above which a plan is not stated as a number."""
EXACT = 16
"""Differences up to which all sign patterns are counted; more are sampled."""
_SAMPLES = 100_000


@dataclass(frozen=True)
class Difference:
    """Paired differences of two variants, one for each seed that both have, and their tests.

    Attributes:
        values: The differences.
        p: Two-sided p value of the paired t-test; None for fewer than two differences, or equal ones.
        sign_p: Two-sided p value of the sign-flip permutation test; None for fewer than two.
        interval: 95 % confidence interval of the mean difference from the t distribution; None for fewer than two.
    """

    values: tuple[float, ...]
    p: float | None
    sign_p: float | None
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float | None:
        """Mean difference; None without one."""
        return mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the differences; None for fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def least_sign_p(self) -> float | None:
        """Smallest p value that the sign-flip test can reach with this many seeds."""
        return smallest_sign_p(len(self.values)) if len(self.values) > 1 else None

    def json(self) -> dict[str, Any]:
        """Return the difference as plain values."""
        return {
            "values": list(self.values), "mean": self.mean, "deviation": self.deviation, "p": self.p,
            "sign_flip_p": self.sign_p, "smallest_sign_flip_p": self.least_sign_p,
            "interval": None if self.interval is None else list(self.interval),
        }  # fmt: skip


def paired(values: Sequence[float]) -> float | None:
    """Return the p value of the two-sided t-test that paired differences have mean 0.

    It is 1 if all differences are 0, and None for fewer than two.
    """
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return 1.0 if values[0] == 0 else 0.0
    from scipy.stats import ttest_1samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly equal differences: p is close to 0, but inexact
        return float(ttest_1samp(values, 0.0).pvalue)


def difference(values: Sequence[float]) -> Difference:
    """Return the differences with their tests; without spread, which tests would take for certainty, p is None."""
    p = paired(values) if len(set(values)) > 1 else None
    return Difference(tuple(values), p, sign_flip(values), interval(values))


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Return the confidence interval of the mean of normally distributed values; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(1 - level / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def sign_flip(values: Sequence[float]) -> float | None:
    """Return the two-sided p value of the permutation test that differences are symmetric around 0.

    It counts the sign patterns whose mean is at least as far from 0: all of them up to `EXACT` differences, else a
    sample by a fixed seed. None for fewer than two differences.
    """
    if len(values) < 2:
        return None
    import numpy as np

    count = len(values)
    if count <= EXACT:
        signs = (np.arange(2**count)[:, None] >> np.arange(count) & 1) * 2 - 1
    else:
        signs = np.random.default_rng(0).integers(0, 2, (_SAMPLES, count)) * 2 - 1
    rows = np.asarray(values, float)
    as_far = np.abs(signs @ rows) >= abs(rows.sum()) - 1e-12 * np.abs(rows).sum()  # sums in another order are equal
    return float(as_far.mean() if count <= EXACT else (as_far.sum() + 1) / (len(as_far) + 1))


def smallest_sign_p(seeds: int) -> float:
    """Return the smallest p value of the two-sided sign-flip test: 2 of 2 ** seeds patterns."""
    return 2.0 ** (1 - seeds)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm's method for their number, in the same order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def power_of(effect: float, deviation: float, seeds: int, level: float = LEVEL) -> float:
    """Return the probability that the two-sided paired t-test shows a true difference.

    Args:
        effect: The true mean difference.
        deviation: Standard deviation of the differences, above 0.
        seeds: Number of differences, at least 2.
        level: Significance level.
    """
    from scipy.stats import chi2, nct, t

    degrees, shift = seeds - 1, abs(effect) / deviation * math.sqrt(seeds)
    limit = float(t.ppf(1 - level / 2, degrees))
    if shift > limit + 35:  # where scipy's noncentral t underflows: the estimated deviation alone decides
        return float(chi2.cdf(degrees * (shift / limit) ** 2, degrees))
    upper, lower = float(nct.sf(limit, degrees, shift)), float(nct.cdf(-limit, degrees, shift))
    return min(1.0, upper + (0.0 if math.isnan(lower) else lower))


def seeds_for(effect: float, deviation: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """Return the smallest number of seeds that shows a true difference with this power; None for above `MOST`.

    Args:
        effect: The true mean difference.
        deviation: Standard deviation of the differences; 0 needs two seeds.
        level: Significance level.
        power: Required probability.
    """
    if not effect:
        return None
    if not deviation:
        return 2
    low, high = 1, 2
    while power_of(effect, deviation, high, level) < power:
        if high >= MOST:
            return None
        low, high = high, min(MOST, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(effect, deviation, middle, level) >= power else (middle, high)
    return high


def detectable(deviation: float, seeds: int, level: float = LEVEL, power: float = POWER) -> float:
    """Return the smallest true difference that this number of seeds shows with this power."""
    from scipy.optimize import brentq

    if not deviation:
        return 0.0
    high = 1.0
    while power_of(high, 1.0, seeds, level) < power:
        high *= 2
    return deviation * float(brentq(lambda effect: power_of(effect, 1.0, seeds, level) - power, 0.0, high, xtol=1e-6))


def largest_deviation(deviation: float, count: int, confidence: float = CAUTION) -> float:
    """Return the upper confidence limit of a standard deviation that was estimated from `count` normal values."""
    from scipy.stats import chi2

    return deviation * math.sqrt((count - 1) / float(chi2.ppf(1 - confidence, count - 1)))
