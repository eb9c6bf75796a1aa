"""Contrast of queries with prototypes, for mixed images and with near duplicates left out."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.batch import Batch, Mixture
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.clustering import Clusterings
from inbatch.nn.functional import logsumexp_rows, normalize, wide
from inbatch.nn.logsumexp import logsumexp
from inbatch.nn.negatives import log_add
from inbatch.nn.pair_weights import SameGroup


def prototype_loss(
    clusterings: Clusterings, plain: Callable[..., Tensor], q: Float[Tensor, "m d"], batch: Batch,
    mixture: Mixture | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the mean of the prototype terms of all clusterings.

    Args:
        clusterings: the clusterings.
        plain: the term where images are not mixed and no near duplicates are known.
        q: queries.
        batch: the batch; `batch.same` are the near duplicates.
        mixture: the samples and shares of the queries, if images are mixed.
    """
    if mixture is None and batch.same is None:
        return clusterings.mean(partial(plain, q), batch)
    return clusterings.mean(partial(chosen_proto_nce, q, samples=len(batch), mixture=mixture, same=batch.same), batch)


def chosen_proto_nce(
    q: Float[Tensor, "m d"], columns: Float[Tensor, "c d"], density: Float[Tensor, "c"],
    counts: Bool[Tensor, "c"] | None = None, *, samples: int, mixture: Mixture | None = None,
    same: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute PCL's prototype term for mixed images, or without the prototypes of near duplicates as negatives.

    -log( exp(q_n . c_n / phi_n) / sum_j exp(q_n . c_j / phi_j) ), averaged, as in `methods.pcl.proto_nce`.

    Args:
        q: queries, normalised inside.
        columns: the prototypes of the samples, then others; normalised inside.
        density: phi of every column.
        counts: False leaves a column out.
        samples: N, the number of samples.
        mixture: q are rows of mixed images; the target is shared by the prototypes of two samples.
        same: prototypes of samples with equal numbers are not negatives of each other; None: all are.
    """
    n = samples
    if not batch_count(len(q), q) or n > len(columns):
        raise ValueError(f"ProtoNCE needs a prototype for every query, got {len(columns)} for {n}")
    q, keys = normalize(q), normalize(columns).to(wide(q)) / density.to(wide(q))[:, None]
    own, others = keys.tensor_split([n])
    if counts is not None:
        own, others = own[counts[:n]], others[counts[n:]]
    if same is None:
        negative = logsumexp_rows(q, own, 1.0, others)
        return loss_mean(negative - (q * (keys[:n] if mixture is None else mixture.blend(keys[:n]))).sum(-1))
    places = torch.arange(n, device=q.device)[None] if mixture is None else mixture.positive
    among, rest = same if counts is None else same[counts[:n]], logsumexp(q, others, 1.0, shared=True)
    losses = []
    for place in places:
        positive = (q * keys[place]).sum(-1)
        negative = log_add(logsumexp(q, own, 1.0, weights=SameGroup(same[place], among)), rest)
        losses.append(torch.logaddexp(positive, negative) - positive)
    return loss_mean(losses[0] if mixture is None else mixture.shared(torch.stack(losses)))
