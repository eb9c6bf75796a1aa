"""Contrast with an estimate of each sample's sum over the whole data set: the part that SogCLR and iSogCLR share."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.nn.batch_sums import batch_count, loss_sum, whole
from inbatch.nn.functional import logsumexp_excluding_self


def global_contrast(
    u: Float[Tensor, "v n d"], log_estimate: Float[Tensor, "n"], temperature: Float[Tensor, "n"] | float,
    gamma: Float[Tensor, ""] | float,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2 n"], Float[Tensor, "2 n"]]:  # fmt: skip
    """Return the surrogate loss of two views (Yuan et al. 2022, Eq. 3 and 5), and per row log e and the sum w.

    For a row u_i, its 2 (N - 1) negatives u_j (both views of the other samples) and the temperature T_i of its sample:
    g_i = mean_j exp(u_i . u_j / T_i), e_i = (1 - gamma) exp(log_estimate_i) + gamma g_i, w_i = mean_j p_ij u_i . u_j
    with p_ij = exp(u_i . u_j / T_i) / e_i held constant. The loss is the mean over samples of the sum over both views
    of w_i - u_i . u'_i. Its gradient is that of T_i log e_i without the factor gamma; its value is not an objective.

    Only tiles of the similarities are held. With constant p, w is quadratic in the rows, so that its gradient G is a
    constant, too: it is computed here from the log-sum-exps of the negatives, and the loss is linear in G.

    Args:
        u: unit rows of V = 2 views.
        log_estimate: log of each sample's estimate before this step; -inf is an estimate of 0.
        temperature: T.
        gamma: share of this batch in the new estimate.
    """
    n = batch_count(u.shape[1], u)
    if len(u) != 2 or n < 2:
        raise ValueError(f"global contrast needs 2 views of at least 2 samples, got {tuple(u.shape)}")
    t = torch.as_tensor(temperature, dtype=u.dtype, device=u.device).expand(u.shape[1])
    share = torch.as_tensor(gamma, dtype=u.dtype, device=u.device)
    with torch.enable_grad(), torch.autocast(u.device.type, enabled=False):
        q, k = (x.detach().requires_grad_() for x in (u / t[:, None], u))
        log_mean = torch.stack([
            torch.logaddexp(logsumexp_excluding_self(q[v], 1.0, k[v]), logsumexp_excluding_self(q[v], 1.0, k[1 - v]))
            for v in (0, 1)
        ]) - math.log(2 * (n - 1))  # fmt: skip
        batch = log_mean.detach()
        log_new = torch.logaddexp(log_estimate.to(u.dtype) + (-share).log1p(), batch + share.log())
        # sum_j p_ij d(u_i . u_j) = T_i (g_i / e_i) d(log g_i), where q and k are the two places of a row.
        of_queries, of_keys = torch.autograd.grad((t * (batch - log_new).exp() * log_mean).sum(), (q, k))
    weighted = (q.detach() * of_queries).sum(-1)
    linear = (u * (of_queries / t[:, None] + of_keys)).sum()
    negatives = linear - (linear - weighted.sum()).detach()
    return loss_sum(negatives - 2 * (u[0] * u[1]).sum()) / n, log_new, weighted


def updated(numbers: Float[Tensor, "m"], index: Int[Tensor, "n"], new: Float[Tensor, "n"]) -> Float[Tensor, "m"]:
    """Return the numbers of all samples, with new ones for those of a batch.

    A sample that is in the batch more than once gets its largest number, in any order of the batch and on any device.
    """
    return numbers.scatter_reduce(0, whole(index), whole(new.detach()).to(numbers.dtype), "amax", include_self=False)
