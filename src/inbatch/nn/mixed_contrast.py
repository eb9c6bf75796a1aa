"""Contrast of rows of mixed images, whose target is shared by two samples."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from inbatch.batch import Mixture
from inbatch.nn.batch_sums import batch_count, batch_softmax, loss_mean, positions
from inbatch.nn.functional import (
    logsumexp_excluding_self,
    logsumexp_rows,
    nearest,
    normalize,
    scale_by_temperature,
    sum_by_class,
)
from inbatch.nn.logsumexp import logsumexp
from inbatch.nn.negatives import Negatives
from inbatch.nn.pair_weights import SameGroup


def mixed_contrast(
    q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], mixture: Mixture, temperature: float,
    queue: Float[Tensor, "l d"] | None = None, smooth: float = 0.0, neighbours: int = 10,
    negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute InfoNCE of mixed rows: the sum over their two samples p, by share w_p, of the loss with positive k_p.

    l_i = log( sum_j exp(q_i . k_j / T) + sum_j exp(q_i . queue_j / T) ) - sum_p w_ip q_i . k_p / T, averaged (Lee et
    al. 2021, arXiv 2010.08887). With candidates "own" and a queue, the first sum is the term of k_p alone. Queries
    and keys are normalised inside.

    Args:
        q: queries, rows of mixed images.
        k: keys of the whole batch, rows of plain images.
        mixture: the samples and shares of the queries.
        temperature: T, unless the mixture has its own.
        queue: unit rows, more negatives.
        smooth: share of the target given to the nearest rows of the queue, as in `info_nce`.
        neighbours: number of nearest rows.
        negatives: which samples are negatives of each of the two, and how they count: l_i is then the sum over p of
            w_ip (log( exp(q_i . k_p / T) + Ng_ip ) - q_i . k_p / T). None: all other samples alike.
    """
    q, k, t = normalize(q), normalize(k), mixture.temperature or temperature
    queue = None if queue is None else queue.to(q.dtype)
    positive = (q * mixture.blend(k)).sum(-1) / t
    own = queue is not None and mixture.candidates == "own"
    if negatives is not None:
        each = (q * k[mixture.positive]).sum(-1)
        logs = [negatives.log_mixed(q, k, *one, t, queue, own) for one in zip(mixture.positive, each, strict=True)]
        loss = loss_mean(mixture.shared(torch.logaddexp(each / t, torch.stack(logs)) - each / t))
    elif own:
        each = (q * k[mixture.positive]).sum(-1) / t
        loss = loss_mean(mixture.shared(torch.logaddexp(each, logsumexp_rows(q, None, t, queue)) - each))
    else:
        loss = loss_mean(logsumexp_rows(q, k, t, queue) - positive)
    if smooth and queue is not None:
        near = embedding_bag(nearest(q, queue, count=neighbours), queue, mode="mean")
        loss = loss + smooth * loss_mean(positive - (q * near).sum(-1) / t)
    return loss


def mixed_dcl(
    q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], mixture: Mixture, temperature: float = 0.1,
    sigma: float | None = None, detach: bool = False, negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute DCL of mixed rows: the sum over their two samples p, by share, of the loss with positive k_p.

    l_ip = -w_ip q_i . k_p / T + log sum_{j != p} exp(q_i . k_j / T), averaged over i; rows are normalised inside.

    Args:
        q: queries, rows of mixed images.
        k: keys of the whole batch, rows of plain images.
        mixture: the samples and shares of the queries.
        temperature: T.
        sigma: None is DCL, w = 1; else DCLW, w_ip = 2 - M softmax_i(q_i . k_p / sigma).
        detach: no gradient through w.
        negatives: which samples count in the sum, and how; without any, the sum's logarithm is left out.
    """
    q, k = normalize(q), normalize(k)
    rank, losses = torch.arange(len(k), device=k.device), []
    for places in mixture.positive:
        keys = k[(rank + len(q)).index_put((places,), rank[: len(q)]).argsort()]  # row i is the positive of query i
        positive = (q * keys[: len(q)]).sum(-1)
        one = torch.ones_like(positive)
        weight = (
            one if sigma is None else 2 - batch_count(len(q), q) * batch_softmax(scale_by_temperature(positive, sigma))
        )
        if negatives is None:
            negative = logsumexp_excluding_self(q, temperature, keys)
        else:
            negative = negatives.log_mixed(q, k, places, positive, temperature)
            negative = negative.masked_fill(negative == -torch.inf, 0)
        losses.append(negative - (weight.detach() if detach else weight) * positive / temperature)
    return loss_mean(mixture.shared(torch.stack(losses)))


def mixed_supcon(
    q: Float[Tensor, "m d"], keys: Float[Tensor, "v n d"], label: Int[Tensor, "n"], mixture: Mixture,
    temperature: float = 0.07, base_temperature: float = 0.07, negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute SupCon of mixed rows: the sum over their two samples, by share, of the loss with its class positive.

    The positives of a class are all its rows in `keys`, and all rows of `keys` are in the denominator.

    Args:
        q: queries, rows of mixed images.
        keys: rows of plain images of the whole batch, of one or several views.
        label: classes of the batch; -1: unlabelled, a class of its own.
        mixture: the samples and shares of the queries.
        temperature: T.
        base_temperature: the loss is multiplied by T / T_base.
        negatives: rows of one group with a sample are in its denominator only if they are of its class.
    """
    q, u = normalize(q), normalize(keys)
    ids = label.where(label >= 0, -1 - positions(len(label), label.device))
    total, members = sum_by_class(u.mean(0), ids)
    mean, every = total / members[:, None], u.flatten(0, 1)
    if negatives is None or negatives.same is None:
        candidates = logsumexp_rows(q, every, temperature)
    else:
        same, kinds = (x.repeat(len(u)) for x in (negatives.same, ids))
        weights = [SameGroup(negatives.same[p], same, 0.0, ids[p], kinds) for p in mixture.positive]
        candidates = mixture.shared(torch.stack([logsumexp(q, every, temperature, weights=w) for w in weights]))
    loss = candidates - (q * mixture.blend(mean)).sum(-1) / temperature
    return scale_by_temperature(loss_mean(loss), base_temperature / temperature)
