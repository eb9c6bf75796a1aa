"""Exact k nearest neighbours, in tiles, without the matrix of all queries by all samples.

Products are computed in the type of the features. Where their rounding could decide, because similarities around the
k-th or class scores are nearly equal, the query is repeated in float64 (`_settled`). Neighbours that are equally near
in float64 have equal votes, so that neither the order of the bank nor tiles, threads and device decide.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError, DataError, check_whole
from inbatch.evaluation.accuracy import hits
from inbatch.evaluation.embeddings import Embeddings, matched
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime import shared_work
from inbatch.runtime.isolation import usual_numerics, usual_state

_QUERIES, _BANK = 256, 1 << 16  # similarities in memory at a time: at most 64 MB in float32
_MORE = 32  # nearest rows that are listed in addition to k
_EXACT = 1 << 22  # numbers in float64 in memory at a time: 32 MB
_EQUAL = 1e-12  # difference of equal similarities in float64, relative to the largest possible similarity


def check_neighbours(k: int, bank: int, temperature: float, distance: str) -> None:
    """Raise ConfigError unless k-NN can be computed with these settings from `bank` samples."""
    if distance not in ("cosine", "euclidean"):
        raise ConfigError(f'the distance is "cosine" or "euclidean", not {distance!r}.')
    check_whole("k", k)
    if not 0 < k <= bank:
        raise ConfigError(f"k = {k} neighbours cannot be taken from {bank} samples: choose 1 to {bank}.")
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature of k-NN is {temperature!r}: choose a finite number above 0.")


@usual_numerics()
@torch.no_grad()
def knn_scores(
    query: Float[Tensor, "q d"],
    bank: Float[Tensor, "m d"],
    labels: Int[Tensor, "m"],
    classes: int,
    *,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    chunk: int | None = None,
) -> Float[Tensor, "q c"]:
    """Return logarithms of class scores (Q, C), float64 on the CPU, from the k nearest rows of the bank.

    cosine: the score is the sum of exp(similarity / temperature) over the neighbours of the class (Wu et al. 2018,
    section 3.4). euclidean: it is the number of neighbours of the class. The logarithm is -inf without a neighbour.
    Rows that are as near as the k-th share the votes that are left for them in equal parts.

    Args:
        query: vectors to classify.
        bank: vectors with known classes.
        labels: classes of the bank, 0 to `classes` - 1.
        classes: number of classes.
        k: number of neighbours.
        temperature: temperature of the cosine similarity, above 0.
        distance: "cosine" or "euclidean".
        chunk: queries at a time, 256 by default.

    Raises:
        ConfigError: for another distance, a k that is not in 1 to M, or a temperature that is not above 0.
        DataError: for labels that are not in 0 to `classes` - 1.
    """
    check_neighbours(k, len(bank), temperature, distance)
    if query.shape[1:] != bank.shape[1:]:
        raise DataError(
            f"queries of shape {tuple(query.shape)} do not have the width of the bank, {tuple(bank.shape)}: use "
            "features of one encoder"
        )
    if (
        labels.shape != bank.shape[:1]
        or labels.is_floating_point()
        or not 0 <= int(labels.min()) <= int(labels.max()) < classes
    ):
        span = f"from {labels.min()} to {labels.max()}" if labels.numel() else "without a label"
        raise DataError(
            f"the labels of the bank must be {len(bank):,} whole numbers from 0 to {classes - 1}, not {labels.dtype} "
            f"{tuple(labels.shape)} {span}"
        )
    if query.device.type == "mps":  # it has no float64
        query, bank = query.cpu(), bank.cpu()
    search = _Search(bank, labels.cpu(), classes, k, temperature if distance == "cosine" else None)
    near, place, size = search.nearest_rows(query, chunk or _QUERIES)
    rounding = size * torch.finfo(query.dtype).eps * (math.sqrt(query.shape[1]) + 8)  # three times the measured one
    scores = search.scores(near[:, :k], search.labels[place[:, :k]])
    doubt = search.depends_on_rounding(near, scores, rounding)
    # Rows beyond the list can be as near as the k-th if even the last of the list is.
    beyond = doubt & (near[:, -1] >= near[:, k - 1] - rounding) & (near.shape[1] < len(bank))
    for queries, listed in ((doubt & ~beyond, True), (beyond, False)):
        if queries.any():
            at = queries.nonzero()[:, 0]
            scores[at] = search.exact_scores(query[at.to(query.device)], size[at], place[at] if listed else None)
    return scores


@dataclass(frozen=True)
class _Search:
    """Settings of `knn_scores` for several queries; without a temperature, the distance is Euclidean."""

    bank: Float[Tensor, "m d"]
    labels: Int[Tensor, "m"]
    classes: int
    k: int
    temperature: float | None

    def nearest_rows(
        self, query: Float[Tensor, "q d"], chunk: int
    ) -> tuple[Float[Tensor, "q n"], Int[Tensor, "q n"], Float[Tensor, "q"]]:
        """Return similarities of the k nearest rows and some more, nearest first, their places, and the largest size.

        The similarity is q.b of unit rows, or q.b - |b|^2 / 2, which increases as the distance |q - b| decreases.
        """
        mean = self.bank.mean(0) if self.temperature is None else None
        rows, keys = _placed(query, mean), _placed(self.bank, mean)
        bias = None if mean is None else -keys.square().sum(1) / 2
        count = min(self.k + _MORE, len(keys))
        memory = rows.new_empty(min(chunk, len(rows)) * min(_BANK, len(keys)))
        parts = (_nearest(block, keys, bias, count, memory) for block in rows.split(chunk))
        near, place = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        near, order = near.double().sort(dim=1, descending=True)
        longest = keys.norm(dim=1).max()
        size = torch.ones(len(rows)) if mean is None else (rows.norm(dim=1) * longest + longest**2 / 2).cpu()
        return near, place.gather(1, order), size.double()

    def scores(self, similarity: Float[Tensor, "q n"], labels: Int[Tensor, "q n"]) -> Float[Tensor, "q c"]:
        """Return the scores of neighbours with a whole vote each."""
        group = labels + self.classes * torch.arange(len(labels))[:, None]
        return self._sums(self._votes(similarity).flatten(), group.flatten(), len(labels))

    def _votes(self, similarity: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the logarithms of votes."""
        return torch.zeros_like(similarity) if self.temperature is None else similarity / self.temperature

    def _sums(self, votes: Float[Tensor, "n"], group: Int[Tensor, "n"], queries: int) -> Float[Tensor, "q c"]:
        """Return the log-sum-exp of the votes of each group, query x classes + class; -inf without a vote."""
        most = votes.new_full((queries * self.classes,), -torch.inf).scatter_reduce_(0, group, votes, "amax")
        sums = torch.zeros_like(most).scatter_add_(0, group, (votes - most[group]).exp_())
        return sums.log_().add_(most).view(queries, self.classes)

    def depends_on_rounding(
        self, near: Float[Tensor, "q n"], scores: Float[Tensor, "q c"], rounding: Float[Tensor, "q"]
    ) -> Bool[Tensor, "q"]:
        """Return the queries whose k nearest rows, best class or five best classes may be equal or in another order."""
        doubt = torch.zeros(len(near), dtype=torch.bool)
        if near.shape[1] > self.k:
            doubt |= near[:, self.k - 1] - near[:, self.k] <= rounding
        if self.temperature is not None:  # without weights, scores are exact
            best = scores.topk(min(6, self.classes)).values
            gap = best[:, :-1] - best[:, 1:]
            doubt |= (gap[:, ::4] <= rounding[:, None] / self.temperature).any(1)
        return doubt

    def exact_scores(
        self, query: Float[Tensor, "q d"], size: Float[Tensor, "q"], place: Int[Tensor, "q n"] | None
    ) -> Float[Tensor, "q c"]:
        """Return the scores from similarities in float64: those that differ by at most `_EQUAL` are equal.

        Args:
            query: the queries.
            size: largest similarity of each query.
            place: rows of the bank that include the k nearest and all that are as near; by default the whole bank.
        """
        mean = self.bank.mean(0, dtype=torch.float64) if self.temperature is None else None
        rows = max(1, _EXACT // (len(self.bank) if place is None else place.shape[1] * self.bank.shape[1]))
        scores = []
        for at in torch.arange(len(query)).split(rows):
            block = query[at.to(query.device)]
            if place is None:
                tiles = self.bank.split(max(1, _EXACT // self.bank.shape[1]))
                parts = [_exact(block, tile, mean) for tile in tiles]
                labels = self.labels.expand(len(block), -1)
            else:
                parts = [_exact(block, self.bank[place[at].to(self.bank.device)], mean)]
                labels = self.labels[place[at]]
            scores.append(self._shared(torch.cat(parts, 1), labels, _EQUAL * size[at, None]))
        return torch.cat(scores)

    def _shared(
        self, similarity: Float[Tensor, "q n"], labels: Int[Tensor, "q n"], equal: Float[Tensor, "q 1"]
    ) -> Float[Tensor, "q c"]:
        """Return the scores of the k nearest; those equal to the k-th share the votes that the nearer ones leave."""
        least = largest(similarity, self.k)[0].amin(1, keepdim=True)
        nearer, tied = similarity > least + equal, (similarity - least).abs() <= equal
        share = (self.k - nearer.sum(1)).double() / tied.sum(1)
        query, column = (nearer | tied).nonzero(as_tuple=True)
        votes = self._votes(similarity[query, column])
        votes += share[query].log().masked_fill(nearer[query, column], 0)
        return self._sums(votes, query * self.classes + labels[query, column], len(similarity))


def _placed(rows: Float[Tensor, "*n d"], mean: Float[Tensor, "d"] | None) -> Float[Tensor, "*n d"]:
    """Return unit rows, or rows without the mean of the bank, which keeps the rounding of distances small."""
    return F.normalize(rows, dim=-1) if mean is None else rows - mean


def _exact(query: Tensor, bank: Tensor, mean: Tensor | None) -> Float[Tensor, "q n"]:
    """Return similarities in float64, on the CPU, to a bank for all queries (N, D) or for each (Q, N, D)."""
    rows, keys = _placed(query.double(), mean), _placed(bank.double(), mean)
    products = rows @ keys.T if keys.ndim == 2 else (keys @ rows[:, :, None])[:, :, 0]
    return (products if mean is None else products - keys.square().sum(-1) / 2).cpu()


def _nearest(query: Tensor, bank: Tensor, bias: Tensor | None, k: int, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarities (Q, k) and rows of the bank of the k nearest, merged from the nearest of each tile."""
    near, place = [], []
    for start in range(0, len(bank), _BANK):
        tile = bank[start : start + _BANK]
        products = memory[: len(query) * len(tile)].view(len(query), len(tile))
        with fast_products():
            torch.mm(query, tile.T, out=products)
        if bias is not None:
            products += bias[start : start + _BANK]
        values, places = largest(products, min(k, len(tile)))
        near.append(values)
        place.append(places + start)
    values, at = torch.cat(near, 1).topk(k, sorted=False) if len(near) > 1 else (near[0], None)
    return values, place[0] if at is None else torch.cat(place, 1).gather(1, at)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest numbers of each row and their positions, in no order.

    They are in the k blocks with the largest maxima: a search for these and then within them is two short searches
    instead of a long one. Column i of x is in block i % width, so that adjacent columns of x are in different blocks.
    """
    size = math.isqrt(x.shape[1] // k)
    if size < 4:
        values, place = x.topk(k, sorted=False)
        return values, place
    width = x.shape[1] // size
    whole = size * width
    best = x[:, :whole].unflatten(1, (size, width)).amax(1).topk(k, sorted=False).indices
    members = best[:, None] + torch.arange(0, whole, width, device=x.device)[:, None]
    rest = torch.arange(whole, x.shape[1], device=x.device).expand(len(x), -1)
    place = torch.cat([members.flatten(1), rest], 1)
    values, at = x.gather(1, place).topk(k, sorted=False)
    return values, place.gather(1, at)


@usual_state()
def knn(
    train: Embeddings,
    test: Embeddings,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return the figures of `hits` with the protocol. Raises as `knn_scores`.

    Images without a label are left out. Classes without a vote are never a hit, classes of equal score share one.
    Inside `shared_work.sharing`, each rank does a part of the queries.
    """
    train, test, classes = matched(train, test)
    query, bank = test.vectors.to(device), train.vectors.to(device)
    own = shared_work.span(len(query), _QUERIES)
    query = query[own.start : own.stop]
    scores = knn_scores(query, bank, train.labels, classes, k=k, temperature=temperature, distance=distance)
    scores = shared_work.joined(scores)
    cosine = distance == "cosine"
    protocol = {
        "k": k,
        "distance": distance,
        "weights": "exp(similarity / temperature)" if cosine else "equal",
        "temperature": temperature if cosine else None,
        "normalisation": "l2" if cosine else "none",
        "ties": "shared",
        "classes": classes,
    }
    return {**hits(scores, test.labels, train.classes, equal_scores(temperature, distance)), **protocol}


def equal_scores(temperature: float, distance: str) -> float:
    """Return the largest difference of results of `knn_scores` that count as equal."""
    return _EQUAL / min(1.0, temperature) if distance == "cosine" else _EQUAL
