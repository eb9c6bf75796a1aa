"""k nearest neighbours: exact, in chunks, so that no matrix of all queries by all samples exists."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError
from inbatch.evaluate.embeddings import Embeddings, class_count, hits

_CELLS = 1 << 25  # similarities held at a time: 128 MB in float32


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
    """Class scores (Q, C), float64 on the CPU, from the k nearest rows of the bank; labels in 0..classes-1.

    cosine: the sum of exp(similarity / temperature) over the neighbours of the class (Wu et al. 2018, section 3.4).
    euclidean: the number of neighbours of the class, unweighted.
    chunk: queries at a time, by default as many as fit into 128 MB of similarities. ConfigError if k > M.
    """
    if distance not in ("cosine", "euclidean"):
        raise ConfigError(f'the distance is "cosine" or "euclidean", not {distance!r}.')
    if not 0 < k <= len(bank):
        raise ConfigError(f"k = {k} neighbours cannot be taken from {len(bank)} samples: choose 1 to {len(bank)}.")
    if distance == "cosine":
        query, bank, bias = F.normalize(query), F.normalize(bank), None
    else:
        # |q - b|^2 grows with |b|^2 / 2 - q.b; taking the mean off first keeps the rounding small.
        mean = bank.mean(0)
        query, bank = query - mean, bank - mean
        bias = -bank.square().sum(1) / 2
    labels = labels.cpu()
    chunk = chunk or max(1, _CELLS // len(bank))
    scores = torch.zeros(len(query), classes, dtype=torch.float64)
    for start in range(0, len(query), chunk):
        near = F.linear(query[start : start + chunk], bank, bias).topk(k, sorted=False)
        weight = near.values.double().cpu().div(temperature).exp() if distance == "cosine" else None
        votes = torch.ones(near.indices.shape, dtype=torch.float64) if weight is None else weight
        scores[start : start + chunk].scatter_add_(1, labels[near.indices.cpu()], votes)
    return scores


def knn(
    train: Embeddings,
    test: Embeddings,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """top1 and top5 in [0, 1] with the protocol; images without a label are left out. Errors as in `knn_scores`.

    Equal scores go to the smallest class.
    """
    train, test = train.labelled(), test.labelled()
    query, bank = test.vectors.to(device), train.vectors.to(device)
    classes = class_count(train, test)
    scores = knn_scores(query, bank, train.labels, classes, k=k, temperature=temperature, distance=distance)
    cosine = distance == "cosine"
    protocol = {
        "k": k,
        "distance": distance,
        "weights": "exp(similarity / temperature)" if cosine else "equal",
        "temperature": temperature if cosine else None,
        "normalisation": "l2" if cosine else "none",
        "classes": classes,
    }
    return {**hits(scores, test.labels), **protocol}
