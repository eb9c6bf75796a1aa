"""Denominators of contrast within a batch: which samples are negatives of a query, and how they count."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.nn.batch_sums import batch_count, positions, whole
from inbatch.nn.logsumexp import SameGroup, check_temperature, logsumexp


@dataclass(frozen=True)
class Negatives:
    """Which samples are negatives of a query, and the correction of their sum.

    Attributes:
        same: (N,) integers; samples with equal integers are never negatives of each other. None: every other sample is
            a negative.
        tau_plus: probability that a negative is of the query's class, for the correction; None: no correction.
        beta: weight of hard negatives in the correction; 0: all count alike.
    """

    same: Int[Tensor, "n"] | None = None
    tau_plus: float | None = None
    beta: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for a probability or a weight outside of its range."""
        if self.tau_plus is not None and not 0 <= self.tau_plus < 1:
            raise ValueError(f"tau_plus {self.tau_plus:g} is a probability: it must be at least 0 and below 1")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta {self.beta:g} must be finite and at least 0")

    def log_sum(
        self, q: Float[Tensor, "a n d"], k: Float[Tensor, "b n d"], positive: Float[Tensor, "p a n"], temperature: float
    ) -> Float[Tensor, "a n"]:
        """Return log Ng_i for every query, -inf if the batch has no negative of it; no N x N matrix is held.

        With e_ij = exp(q_i . k_j / T), the mean m over the M_i negatives j of query i, and p_i the mean of
        exp(positive_i / T): without correction Ng_i = M_i m(e), else
        Ng_i = max( M_i (m(e^(1 + beta)) / m(e^beta) - tau_plus p_i) / (1 - tau_plus), M_i exp(-1 / T) ).
        All parts carry gradient, also the weights e^beta / m(e^beta); the lower bound has none.

        Args:
            q: A views of normalised queries.
            k: B views of normalised keys of the same samples.
            positive: products of each query with its P positives.
            temperature: T.
        """
        n, same = q.shape[1], positions(q.shape[1], q.device) if self.same is None else self.same
        queries, ids = q.flatten(0, 1), same.repeat(len(q))
        keys, key_ids = (queries, ids) if k is q else (k.flatten(0, 1), same.repeat(len(k)))
        weights = SameGroup(ids, key_ids)
        values, sizes = whole(same).unique(return_counts=True)
        others = batch_count(n, q) - sizes[torch.searchsorted(values, same)]
        count = (len(k) * others).to(q.dtype).log().repeat(len(q))
        return self._corrected(queries, keys, weights, count, positive.flatten(1), temperature).view(len(q), n)

    def log_keys(
        self, q: Float[Tensor, "n d"], keys: Float[Tensor, "m d"], positive: Float[Tensor, "n"], temperature: float
    ) -> Float[Tensor, "n"]:
        """Return log Ng_i for keys that are all negatives of every query: a memory bank."""
        count = q.new_full((len(q),), math.log(len(keys)))
        return self._corrected(q, keys, None, count, positive[None], temperature)

    def _corrected(
        self, q: Tensor, k: Tensor, weights: SameGroup | None, count: Tensor, positive: Tensor, temperature: float
    ) -> Tensor:
        """Return log Ng_i of rows; count: log M_i, positive: (P, n)."""
        check_temperature(temperature)
        how: Any = {"weights": weights, "shared": weights is None}  # keys without weights are a memory bank
        total = logsumexp(q, k, temperature / (1 + (self.beta if self.tau_plus is not None else 0)), **how)
        if self.tau_plus is None:
            return total
        if self.beta:
            total = count + total - logsumexp(q, k, temperature / self.beta, **how)
        total, least = total.masked_fill(count == -torch.inf, -torch.inf), count - 1 / temperature
        if not self.tau_plus:
            return total.where(total >= least, least)
        share = math.log(self.tau_plus / len(positive)) + count + (positive / temperature).logsumexp(0) - total
        corrected = total + (-torch.expm1(share.where(share < 0, -1))).log() - math.log1p(-self.tau_plus)
        return corrected.where((share < 0) & (corrected >= least), least)


def other_views(u: Float[Tensor, "v n d"]) -> Float[Tensor, "p v n"]:
    """Return the products of every row with the P = V - 1 rows of its sample in the other views."""
    return torch.stack([(u * u.roll(shift, 0)).sum(-1) for shift in range(1, len(u))])


def log_in_batch(
    u: Float[Tensor, "v n d"], temperature: float, negatives: Negatives | None = None
) -> Float[Tensor, "v n"]:
    """Return log( sum of exp(. / T) over the row's other views, + Ng_i ): the denominator of in-batch contrast."""
    if negatives is None:
        rows = u.flatten(0, 1)
        return logsumexp(rows, rows, temperature, exclude_self=True).view(u.shape[:2])
    positive = other_views(u)
    return torch.logaddexp((positive / temperature).logsumexp(0), negatives.log_sum(u, u, positive, temperature))


def log_across(
    q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], temperature: float, negatives: Negatives | None = None
) -> Float[Tensor, "n"]:
    """Return log( exp(q_i . k_i / T) + Ng_i ), with the negatives of a query among the keys of another view."""
    if negatives is None:
        return logsumexp(q, k, temperature)
    positive = (q * k).sum(-1)
    own = negatives.log_sum(q[None], k[None], positive[None, None], temperature)[0]
    return torch.logaddexp(positive / temperature, own)
