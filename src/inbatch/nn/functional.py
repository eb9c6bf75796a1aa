"""Equations that several methods share, and delicate numerics.

Pure functions of tensors of any floating type, computed in float32 or wider, also under autocast. The log-sum-exps
are here so that methods do not decide how they are computed: `nn.logsumexp` does.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from inbatch.nn import logsumexp
from inbatch.nn.batch_sums import (
    batch_count,
    batch_log_softmax,
    batch_sum,
    centred,
    loss_mean,
    loss_sum,
    loss_var,
    own_rows,
    positions,
    whole,
)  # fmt: skip
from inbatch.nn.negatives import Negatives


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the tensor in float32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nan_if_overflow(size: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Replace infinity by nan in a divisor: its square exceeded the range of its type, and its quotients would be 0."""
    return size.masked_fill(size == torch.inf, torch.nan)


def scale_by_temperature(x: Float[Tensor, "*shape"], temperature: float) -> Float[Tensor, "*shape"]:
    """Return x / T; ValueError unless T is a finite number above 0."""
    logsumexp.check_temperature(temperature)
    return wide(x) / temperature


def normalize(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Normalise rows to length 1.

    A row shorter than 1e-12 is left unchanged, so that its gradient does not grow by 1e12; a row too long to be squared
    (1e19 in float32) becomes nan.
    """
    return _Normalize.apply(wide(x))


class _Normalize(torch.autograd.Function):
    """Autograd function of `normalize`: half the time of its parts, which keep eight tensors of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        short = length < 1e-12
        u = x / nan_if_overflow(length.masked_fill(short, 1))
        ctx.save_for_backward(x, u, length, short)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, u, length, short = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: operations that autograd can follow
            length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).masked_fill(short, 1)
            u = x / length
        along = (gradient * u).sum(-1, keepdim=True).masked_fill(short, 0)
        return torch.addcmul(gradient, u, along, value=-1).div_(nan_if_overflow(length.masked_fill(short, 1)))


def product(a: Float[Tensor, "*batch n m"], b: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*batch n k"]:
    """Return the matrix product, not in half precision under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def moments(x: Float[Tensor, "*b n d"]) -> tuple[Float[Tensor, "*b 1 d"], Float[Tensor, "*b d d"]]:
    """Return mean and unbiased covariance of the rows."""
    x = wide(x)
    mean = x.mean(-2, keepdim=True)
    return mean, product((x - mean).mT, x - mean) / (x.shape[-2] - 1)


def covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return the unbiased covariance of the rows of the whole batch, a term of the loss (`batch_sums.loss_sum`)."""
    x = wide(x)
    away = centred(x, -2)
    return loss_sum(product(away.mT, away)) / (batch_count(len(x), x) - 1)


def variance_hinge(z: Float[Tensor, "v n d"], eps: float = 1e-4) -> Float[Tensor, ""]:
    """Return the mean over views and features of max(0, 1 - sqrt(Var + eps)) (VICReg, Bardes et al. 2022, Eq. 1).

    It measures how far features are below a standard deviation of 1. Variances are unbiased, rows are not normalised.
    """
    return (1 - (loss_var(wide(z), 1) + eps).sqrt()).relu().mean()


def cholesky_with_jitter(
    cov: Float[Tensor, "*b d d"], eps: float = 0.0
) -> tuple[Float[Tensor, "*b d d"], Float[Tensor, "*b"]]:
    """Return the lower Cholesky factor of (1 - eps) cov + eps I and the jitter added to it (0 if none was needed).

    If there is no factor (linearly dependent features), the smallest sufficient value of 1e-5, 1e-3 and 0.1, times the
    mean of the diagonal (1 if that is 0), is added to the diagonal, with a warning.
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    cov = (1 - eps) * cov + eps * eye
    lower, failed = torch.linalg.cholesky_ex(cov)
    jitter = torch.zeros_like(failed, dtype=cov.dtype)
    if not failed.any():
        return lower, jitter
    warnings.warn(
        "features depend on each other: a covariance had no Cholesky factor until jitter was added to it (more "
        "samples, fewer features or a larger eps help)", stacklevel=3,
    )  # fmt: skip
    mean = cov.detach().diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = mean.masked_fill(mean == 0, 1)[..., None, None] * eye
    for step in (1e-5, 1e-3, 0.1):
        jitter = jitter.masked_fill(failed != 0, step)
        lower, failed = torch.linalg.cholesky_ex(cov + jitter[..., None, None] * unit)
    return lower, jitter


def logsumexp_excluding_self(
    u: Float[Tensor, "n d"], temperature: float, keys: Float[Tensor, "m d"] | None = None
) -> Float[Tensor, "n"]:
    """Return log sum_{k != i} exp(u_i . keys_k / T) for every row i: the denominator of in-batch contrast."""
    return logsumexp.logsumexp(u, u if keys is None else keys, temperature, exclude_self=True)


def logsumexp_rows(
    q: Float[Tensor, "n d"], keys: Float[Tensor, "k d"] | None, temperature: float,
    bank: Float[Tensor, "m d"] | None = None,
) -> Float[Tensor, "n"]:  # fmt: skip
    """Return log sum_k exp(q_i . k / T) for every row i, over all keys.

    Args:
        q: queries.
        keys: rows of the batch.
        temperature: T.
        bank: more keys, which are not rows of the batch: a memory bank, or prototypes.
    """
    if keys is None or bank is None or not own_rows():
        every = [x for x in (keys, bank) if x is not None]
        return logsumexp.logsumexp(
            q, every[0] if len(every) == 1 else torch.cat(every), temperature, shared=keys is None
        )
    of_bank = logsumexp.logsumexp(q, bank, temperature, shared=True)
    return torch.logaddexp(logsumexp.logsumexp(q, keys, temperature), of_bank)


def sum_by_class(
    x: Float[Tensor, "n d"], ids: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:  # fmt: skip
    """Return for every sample the sum of x over the samples of its class, and their number.

    ids: class of every sample; negative: alone in it.
    """
    values, sizes = whole(ids).unique(return_counts=True)
    place = torch.searchsorted(values, ids)
    alone = int((values < 0).sum())
    known, table = (ids >= 0)[:, None], x.new_zeros(max(1, len(values) - alone), x.shape[1])
    total = batch_sum(table.index_add(0, (place - alone).clamp(min=0), x * known))
    return torch.where(known, total.index_select(0, (place - alone).clamp(min=0)), x), sizes[place]


def nearest(
    q: Float[Tensor, "n d"], keys: Float[Tensor, "k d"], leave_out: Bool[Tensor, "k"] | None = None, count: int = 1
) -> Int[Tensor, "n count"]:
    """Return the indices of the keys with the largest products with each row, largest first, without gradient.

    Args:
        q: queries.
        keys: keys.
        leave_out: True for keys that are ignored.
        count: number of keys per query.
    """
    return logsumexp.nearest(q, keys, leave_out, count)


def info_nce(
    q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], queue: Float[Tensor, "m d"], temperature: float = 0.07,
    smooth: float = 0.0, neighbours: int = 10, negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute InfoNCE of queries with their own key and a queue of unit rows (He et al. 2020, Eq. 1).

    l_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T)) ), averaged; queries and
    keys are normalised inside, keys carry no gradient.

    Args:
        q: queries.
        k: one key per query.
        queue: unit rows, the negatives.
        temperature: T.
        smooth: share of the target that is moved from the own key, in equal parts, to the nearest `neighbours` of the
            query in the queue (Lin et al. 2023, arXiv 2212.07158).
        neighbours: number of nearest rows of the queue.
        negatives: which rows of the queue are negatives, and how they count; None: all alike.
    """
    if q.shape != k.shape or not batch_count(len(q), q):
        raise ValueError(f"InfoNCE needs a key for every query, got {tuple(q.shape)} and {tuple(k.shape)}")
    if not (0 <= smooth < 1 and (smooth == 0 or 1 <= neighbours <= len(queue))):
        raise ValueError(
            f"InfoNCE gives a share below 1 to 1 to {len(queue)} neighbours, got smooth {smooth:g}, {neighbours}"
        )
    q, k = normalize(q), normalize(k.detach())
    queue = queue.to(q.dtype)
    own, chosen = (q * k).sum(-1), Negatives() if negatives is None else negatives
    positive = own / temperature
    loss = torch.logaddexp(positive, chosen.log_keys(q, queue, own, temperature)) - positive
    if smooth:
        near = embedding_bag(nearest(q, queue, count=neighbours), queue, mode="mean")
        loss = loss + smooth * (positive - (q * near).sum(-1) / temperature)
    return loss_mean(loss)


def mean_other_views(x: Float[Tensor, "v n d"]) -> Float[Tensor, "v n d"]:
    """Return for every row the mean of its sample's rows in the other views."""
    return (x.sum(0) - x) / (len(x) - 1)


def invariance(z: Float[Tensor, "v n d"], global_views: int | None = None) -> Float[Tensor, ""]:
    """Return the mean of (z_v - c)^2 over views, samples and features.

    c is the mean of a sample's first `global_views` rows (None: of all of them); it carries gradient.
    """
    if z.shape[0] < 2 or not 1 <= (len(z) if global_views is None else global_views) <= len(z):
        raise ValueError(f"needs at least 2 views, and 1 to {len(z)} global views, got {len(z)} and {global_views}")
    z = wide(z)
    return loss_mean((z - z[:global_views].mean(0)).square())


def koleo(z: Float[Tensor, "v n d"], neighbours: int = 1, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Compute KoLeo, -mean log of the distance to the nearest other row of the view (Sablayrolles et al. 2019).

    Rows are normalised inside. The gradient reaches a row and its neighbours; their choice has none. As in the code of
    DINOv2, eps is added to each component of the difference and to the distance.

    Args:
        z: rows of the whole batch; views do not see each other.
        neighbours: number of nearest rows per row, over which the logarithms are averaged.
        eps: the constant.
    """
    n = batch_count(z.shape[1], z)
    if not (len(z) and 1 <= neighbours < n):
        raise ValueError(f"KoLeo needs a view, and 1 to {n - 1} neighbours of {n} rows, got {len(z)}, {neighbours}")
    logs = []
    for u in normalize(z):
        # The row itself is one of the nearest, or as near as the others: then the last is left out.
        every = whole(u)
        near = nearest(u, every, count=neighbours + 1)
        own = near == positions(len(u), u.device)[:, None]
        near = near.gather(1, own.long().argsort(dim=1, stable=True)[:, :neighbours])
        logs.append((torch.linalg.vector_norm(u[:, None] - every[near] + eps, dim=-1) + eps).log())
    return -loss_mean(torch.stack(logs))


def sinkhorn(
    scores: Float[Tensor, "*views n k"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "*views n k"]:
    """Return soft assignments of N rows to K columns that are used equally, for each view separately; no gradient.

    exp(scores / epsilon), scaled `iterations` times to columns of equal sums and then to rows that sum to 1, in
    logarithms: no score is too large (Cuturi 2013; Caron et al. 2020, Eq. 3 to 5).
    """
    samples = batch_count(scores.shape[-2], scores.detach())  # a rank may have none
    if iterations < 1 or not samples or 0 in (*scores.shape[:-2], scores.shape[-1]):
        raise ValueError(f"Sinkhorn needs scores and an iteration, got {tuple(scores.shape)} and {iterations}")
    log = scale_by_temperature(scores.detach(), epsilon)
    for _ in range(iterations):
        log = batch_log_softmax(log, -2).log_softmax(-1)
    return log.exp()


def cross_prediction(p: Float[Tensor, "a n k"], logits: Float[Tensor, "v n k"]) -> Float[Tensor, ""]:
    """Return -sum_k p_i[k] log softmax(logits_j)[k], averaged over samples, the first A views i and other views j."""
    if len(logits) < 2 or not 1 <= len(p) <= len(logits) or p.shape[1:] != logits.shape[1:]:
        raise ValueError(f"a view predicts the others of the same rows, got {tuple(p.shape)} and {tuple(logits.shape)}")
    log = wide(logits).log_softmax(-1)
    return -loss_mean((p * mean_other_views(log)[: len(p)]).sum(-1))
