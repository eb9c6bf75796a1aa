"""Retrieval of images of the same class: mean average precision and recall at k, exact and independent of the order."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.errors import DataError, check_whole
from inbatch.evaluation.accuracy import halves
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.exact_search import unit_rows
from inbatch.runtime.isolation import usual_numerics

RANKS = (1, 5, 10)
"""Numbers of nearest images of `recall`."""
_NUMBERS = 1 << 21  # similarities in memory at a time: 16 MB, and several times that for what follows from them


@usual_numerics()
@torch.no_grad()
def retrieval(embeddings: Embeddings, ks: Sequence[int] = RANKS) -> dict[str, object]:
    """Return retrieval figures: each image is a query, all others are ranked by cosine similarity to it.

    An image is relevant if it is of the query's class. Public libraries mean different things by these names:

    - "map": mean over the queries of average precision over the whole ranking: the mean over the relevant images of the
      precision at their rank.
    - "recall": at k, the share of queries with at least one relevant image among the first k (as in metric learning;
      torchmetrics calls it hit rate).

    Queries without a relevant image ("left_out") count in neither. Images that are equally similar have no order:
    average precision takes the precision after the last of them, as scikit-learn does, and recall is the mean over
    their orders. Images without a label are left out.

    Args:
        embeddings: Features with labels.
        ks: Numbers of nearest images.

    Raises:
        ConfigError: If a k is not a whole number of at least 1.
        DataError: If no two images have the same class.
    """
    for k in ks:
        check_whole("k", k, least=1)
    known = embeddings.labelled()
    rows, labels = unit_rows(known.vectors.cpu()).double(), known.labels.cpu()
    relevant = labels.bincount()[labels] - 1
    queries = (relevant > 0).nonzero()[:, 0]
    if not len(queries):
        raise DataError(f"no two images of {known.name} have the same class: retrieval needs classes of two or more")
    precision, hits = [], []
    for at in queries.split(max(1, _NUMBERS // len(rows))):
        similarity = rows[at] @ rows.T  # exact: see `exact_search`
        similarity[torch.arange(len(at)), at] = -torch.inf
        similarity, order = (x[:, :-1] for x in similarity.sort(dim=1, descending=True))  # the query is last
        ranked = _Ranked(similarity, labels[order] == labels[at, None])
        precision.append(ranked.average_precision())
        hits.append(torch.stack([ranked.hit(min(k, len(rows) - 1)) for k in ks], 1))
    recall = torch.cat(hits).mean(0).tolist()
    return {
        "map": float(torch.cat(precision).mean()),
        "halves": halves(torch.cat(precision)),
        "recall": {str(k): value for k, value in zip(ks, recall, strict=True)},
        "distance": "cosine",
        "images": len(rows),
        "queries": len(queries),
        "left_out": len(rows) - len(queries),
    }


class _Ranked:
    """Relevant images in the order of similarity. Positions of equally similar images form a tie."""

    def __init__(self, similarity: Float[Tensor, "q m"], relevant: Bool[Tensor, "q m"]) -> None:
        count = relevant.shape[1]
        place = torch.arange(count).expand_as(relevant)
        differs = similarity[:, 1:] != similarity[:, :-1]
        begins = torch.nn.functional.pad(differs, (1, 0), value=True)
        ends = torch.nn.functional.pad(differs, (0, 1), value=True)
        self.relevant = relevant
        self.first = place.where(begins, 0).cummax(1).values
        self.last = place.where(ends, count).flip(1).cummin(1).values.flip(1)
        self.number = relevant.cumsum(1)  # of relevant images up to each position

    def average_precision(self) -> Float[Tensor, "q"]:
        precision = self.number.gather(1, self.last).double() / (self.last + 1)
        return (precision * self.relevant).sum(1) / self.number[:, -1]

    def hit(self, k: int) -> Float[Tensor, "q"]:
        """Return the probability of a relevant image among the first k, over the orders of equally similar images."""
        first, last = self.first[:, k - 1], self.last[:, k - 1]
        before = self.number.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0].where(first > 0, 0)
        good = self.number.gather(1, last[:, None])[:, 0] - before
        tied, drawn = last - first + 1, k - first
        bad = tied - good
        none = _log_choices(bad, drawn) - _log_choices(tied, drawn)  # that all that are drawn are not relevant
        missed = none.exp().where(drawn <= bad, 0.0)
        return (1 - missed).where(before == 0, 1.0)


def _log_choices(n: Int[Tensor, "q"], k: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    """Return the logarithm of the number of ways to choose k of n."""
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp(min=0) + 1)
