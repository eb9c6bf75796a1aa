"""Pairs of own rows and a block of rows of another rank: log-sum-exps and gradients (`passing`)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inbatch.nn import exponentials, triton_logsumexp
from inbatch.nn.exponentials import REACH, Exponentials, kernel_weights, logits, on_kernels, reach
from inbatch.nn.pair_weights import PairWeights, SameGroup
from inbatch.nn.tiles import LogSumExpConfig, zeros

LEAST = 2**17
"""Blocks with fewer pairs are materialised."""
_CHUNK = 2**20
"""Pairs in memory at once if tiles cannot be used."""

Side = tuple[Tensor, Tensor] | None
"""Log-sum-exps of rows and the gradients of these; None: none."""


class Block:
    """Pairs of own rows q and a block of keys k, which is None if the keys are q; as in `logsumexp.logsumexp`."""

    def __init__(
        self, q: Tensor, k: Tensor | None, scale: float, exclude_self: bool, weights: PairWeights | None,
        plan: LogSumExpConfig,
    ) -> None:  # fmt: skip
        self.q, self.k, self.keys, self.plan = q, k, q if k is None else k, plan
        self.pairs = scale, exclude_self, weights
        self.kernels = self.tiled = False
        if plan.mode == "always" or (plan.mode == "auto" and len(q) * len(self.keys) >= LEAST):
            self.kernels = on_kernels(q, self.keys, weights)
            self.tiled = not self.kernels and scale * reach(q, self.keys) <= REACH.get(q.dtype, 0)
        self.kept: dict[tuple[int, int], Tensor] = {}

    def sums(
        self, columns: bool = False, weighs: bool = False, keep: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the log-sum-exps of q, those of k if `columns`, and the means of k by q's softmax if `weighs`.

        keep: numbers of tiles that may be kept for `gradients`.
        """
        q, k = self.q, self.keys
        if self.kernels:
            lse, mean = self._sums_by_kernels(q, k, weighs, self._groups())
            other = self._sums_by_kernels(k, q, False, self._groups(flipped=True))[0] if columns else None
            return lse, other, mean
        if self.tiled:
            tiles = Exponentials(q, self.k, *self.pairs, self.plan)
            if columns:
                return *exponentials.both_sums(tiles), None
            tiles.keeps = keep
            lse, mean = exponentials.sums(tiles, weighs)
            self.kept = tiles.kept
            return lse, None, mean
        parts, means, other = [], [], q.new_full((len(k),), -torch.inf) if columns else None
        for _, values in self._chunks():
            parts.append(values.logsumexp(1))
            if other is not None:
                torch.logaddexp(other, values.logsumexp(0), out=other)
            if weighs:
                means.append(softmax_of(values, parts[-1][:, None]) @ k)
        return torch.cat(parts), other, torch.cat(means) if weighs else None

    def gradients(self, own: Side, other: Side, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return dq_i = sum_j W_ij k_j / T and dk_j = sum_i W_ij q_i / T, where needed.

        W_ij = g_i exp(S_ij - lse_i) for `own`, plus g_j exp(S_ij - lse_j) for `other`; of q against itself, dq alone.
        """
        q, k, scale = self.q, self.keys, self.pairs[0]
        if self.kernels:
            return (
                self._by_kernels(q, k, own, other, self._groups()) if needs[0] else None,
                self._by_kernels(k, q, other, own, self._groups(flipped=True)) if needs[1] else None,
            )
        if self.tiled:
            tiles = Exponentials(q, self.k, *self.pairs, self.plan)
            tiles.kept = self.kept
            if tiles.symmetric and own is not None:
                return exponentials.gradients(tiles, *own, (needs[0], False))
            return exponentials.pair_gradients(tiles, own, other, needs)
        dq, dk = (zeros(x) if need else None for x, need in zip((q, k), needs, strict=True))
        for start, values in self._chunks():
            rows, w = slice(start, start + len(values)), torch.zeros_like(values)
            for side, place in ((own, (rows, None)), (other, (None, slice(None)))):
                if side is not None:
                    lse, gradient = (x[rows, None] if place[0] else x[None] for x in side)
                    w += gradient * softmax_of(values, lse)
            if dq is not None:
                dq[rows] = scale * (w @ k)
            if dk is not None:
                dk.addmm_(w.T, q[rows], alpha=scale)
        return dq, dk

    def _groups(self, flipped: bool = False) -> SameGroup | None:
        """Return the weights that the kernels compute; flipped: of the keys with the queries."""
        weights = kernel_weights(self.pairs[2])
        return weights.flipped if weights is not None and flipped else weights

    def _sums_by_kernels(
        self, a: Tensor, b: Tensor, weighs: bool, weights: SameGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-sum-exps of rows a, and means of b, by the Triton kernels."""
        scale, exclude, _ = self.pairs
        return triton_logsumexp.forward(a, b, scale, exclude, 0, len(a), weighs, self.plan.products, weights)

    def _by_kernels(self, a: Tensor, b: Tensor, own: Side, other: Side, weights: SameGroup | None) -> Tensor:
        """Return the gradient of rows a by the Triton kernels."""
        (lse_a, grad_a), (lse_b, grad_b) = ((None, None) if side is None else side for side in (own, other))
        scale, exclude, _ = self.pairs
        sides = lse_a, grad_a, lse_b, grad_b
        return triton_logsumexp.backward(a, b, scale, exclude, 0, len(a), *sides, self.plan.products, weights)

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and the logits of some rows at a time."""
        size = max(1, _CHUNK // max(1, len(self.keys)))
        for start in range(0, max(1, len(self.q)), size):
            yield start, logits(self.q[start : start + size], self.keys, *self.pairs, first=start)


def softmax_of(values: Tensor, lse: Tensor) -> Tensor:
    """Return exp(values - lse), 0 for rows of which nothing was summed."""
    return (values - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
