"""Denominators of contrast within a batch: which samples are negatives of a query, and how they count."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
        bank: (L,) integers; a row of the memory bank is not a negative of the samples with an equal integer in `same`.
            None: every row of it is a negative.
        tau_plus: probability that a negative is of the query's class, for the correction; None: no correction.
        beta: weight of hard negatives in the correction; 0: all count alike.
    """

    same: Int[Tensor, "n"] | None = None
    tau_plus: float | None = None
    beta: float = 0.0
    bank: Int[Tensor, "l"] | None = None

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
        others = batch_count(n, q) - _sizes(same, whole(same))
        count = (len(k) * others).to(q.dtype).log().repeat(len(q))

        def sums(t: float) -> Tensor:
            return logsumexp(queries, keys, t, weights=weights)

        return self._corrected(sums, count, positive.flatten(1), temperature).view(len(q), n)

    def log_keys(
        self, q: Float[Tensor, "n d"], keys: Float[Tensor, "m d"], positive: Float[Tensor, "n"], temperature: float
    ) -> Float[Tensor, "n"]:
        """Return log Ng_i for the keys of a memory bank, which are negatives of every query but those of its group."""
        count = q.new_full((len(q),), math.log(len(keys)))
        if self.bank is not None:
            count = self._in_bank(q, keys, self.same).log()
        return self._corrected(lambda t: self._of_bank(q, keys, self.same, t), count, positive[None], temperature)

    def _of_bank(self, q: Tensor, keys: Tensor, ids: Tensor | None, temperature: float) -> Tensor:
        """Return the log-sum-exps of queries of these groups over the keys of a memory bank."""
        weights = None if self.bank is None or ids is None else SameGroup(ids, self.bank)
        return logsumexp(q, keys, temperature, weights=weights, shared=True)

    def _in_bank(self, q: Tensor, keys: Tensor, ids: Tensor | None) -> Tensor:
        """Return the number of negatives among the keys of a memory bank."""
        every = q.new_full((len(q),), len(keys))
        return every if self.bank is None or ids is None else every - _sizes(ids, self.bank)

    def log_mixed(
        self, q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], places: Int[Tensor, "m"], positive: Float[Tensor, "m"],
        temperature: float, queue: Float[Tensor, "l d"] | None = None, own: bool = False,
    ) -> Float[Tensor, "m"]:  # fmt: skip
        """Return log Ng_i of rows of mixed images, for one of the two samples of each as its positive.

        Negatives are the keys of the batch, except those of that sample and of its near duplicates, and of the queue.

        Args:
            q: queries, rows of mixed images.
            k: keys of the batch, one view.
            places: positions in the batch of the positives.
            positive: products of the queries with them.
            temperature: T.
            queue: rows of a memory bank.
            own: leave out the keys of the batch, so that only those of the queue are negatives.
        """
        same = positions(len(k), k.device) if self.same is None else self.same
        ids, count = same[places], q.new_zeros(len(q))
        if not own:
            count += batch_count(len(k), k) - _sizes(ids, whole(same))
        if queue is not None:
            count += self._in_bank(q, queue, ids)

        def sums(t: float) -> Tensor:
            of_queue = None if queue is None else self._of_bank(q, queue, ids, t)
            if own and of_queue is not None:
                return of_queue
            of_batch = logsumexp(q, k, t, weights=SameGroup(ids, same))
            return of_batch if of_queue is None else log_add(of_batch, of_queue)

        return self._corrected(sums, count.log(), positive[None], temperature)

    def _corrected(
        self, sums: Callable[[float], Tensor], count: Tensor, positive: Tensor, temperature: float
    ) -> Tensor:
        """Return log Ng_i of rows; sums: T -> log-sum-exps of negatives, count: log M_i, positive: (P, n)."""
        check_temperature(temperature)
        total = sums(temperature / (1 + (self.beta if self.tau_plus is not None else 0)))
        if self.tau_plus is None:
            return total
        if self.beta:
            total = count + total - sums(temperature / self.beta)
        total, least = total.masked_fill(count == -torch.inf, -torch.inf), count - 1 / temperature
        if not self.tau_plus:
            return total.where(total >= least, least)
        share = math.log(self.tau_plus / len(positive)) + count + (positive / temperature).logsumexp(0) - total
        corrected = total + (-torch.expm1(share.where(share < 0, -1))).log() - math.log1p(-self.tau_plus)
        return corrected.where((share < 0) & (corrected >= least), least)


def _sizes(ids: Int[Tensor, "m"], every: Int[Tensor, "n"]) -> Int[Tensor, "m"]:
    """Return for each number how many of all numbers are equal to it."""
    values, sizes = every.unique(return_counts=True)
    place = torch.searchsorted(values, ids).clamp(max=len(values) - 1)
    return sizes[place].where(values[place] == ids, 0)


def log_add(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return log(e^a + e^b); where both are -inf, with a gradient of 0 instead of nan."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b).masked_fill(empty, -torch.inf)


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
