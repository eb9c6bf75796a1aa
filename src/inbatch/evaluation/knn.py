"""Exact k nearest neighbours, in tiles, without the matrix of all queries by all samples."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError
from inbatch.evaluation.embeddings import Embeddings, class_count, hits
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime.isolation import usual_numerics

_QUERIES, _BANK = 256, 1 << 16  # similarities in memory at a time: at most 64 MB in float32


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
    """Return class scores (Q, C), float64 on the CPU, from the k nearest rows of the bank; labels in 0..classes-1.

    cosine: the sum of exp(similarity / temperature) over the neighbours of the class (Wu et al. 2018, section 3.4).
    euclidean: the number of neighbours of the class, unweighted.
    chunk: queries at a time, 256 by default. ConfigError if k > M.
    """
    if distance not in ("cosine", "euclidean"):
        raise ConfigError(f'the distance is "cosine" or "euclidean", not {distance!r}.')
    if not 0 < k <= len(bank):
        raise ConfigError(f"k = {k} neighbours cannot be taken from {len(bank)} samples: choose 1 to {len(bank)}.")
    if distance == "cosine":
        query, bank, bias = F.normalize(query), F.normalize(bank), None
    else:
        # |q - b|^2 increases with |b|^2 / 2 - q.b; subtracting the mean first keeps the rounding small.
        mean = bank.mean(0)
        query, bank = query - mean, bank - mean
        bias = -bank.square().sum(1) / 2
    chunk = chunk or _QUERIES
    memory = query.new_empty(min(chunk, len(query)) * min(_BANK, len(bank)))
    near, place = zip(*(_nearest(rows, bank, bias, k, memory) for rows in query.split(chunk)), strict=True)
    similarity, neighbours = torch.cat(near).double().cpu(), labels.cpu()[torch.cat(place).cpu()]
    votes = similarity.div(temperature).exp() if distance == "cosine" else torch.ones_like(similarity)
    return votes.new_zeros(len(query), classes).scatter_add_(1, neighbours, votes)


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
        values, places = _largest(products, min(k, len(tile)))
        near.append(values)
        place.append(places + start)
    values, at = torch.cat(near, 1).topk(k, sorted=False) if len(near) > 1 else (near[0], None)
    return values, place[0] if at is None else torch.cat(place, 1).gather(1, at)


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


def knn(
    train: Embeddings,
    test: Embeddings,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Return top1 and top5 in [0, 1] with the protocol. Raises as `knn_scores`.

    Images without a label are left out. Equal scores are resolved to the smallest class.
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
