"""Sums, means and statistics over the samples of the whole batch, whatever part of it this rank holds.

A loss is a pure function of rows and names no rank. In one process, and in a step in which every rank holds the rows of
the whole batch, these functions are those of PyTorch. If each rank holds its own rows (`tiles.PLAN` has peers), they
reach over all ranks: every rank computes the loss of the whole batch from its own rows. A value that is summed over
ranks gets the sum of the gradients of all ranks. Each rank propagates the loss back, so that gradients are W times
those of the whole batch, and their mean over W ranks, as DistributedDataParallel computes it, is exact.

Terms of the loss (`loss_sum`, `loss_mean`, `loss_var`) have a gradient that every rank knows: it is not exchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inbatch.nn.tiles import PLAN, Peers, using


def _peers() -> Peers | None:
    return PLAN.get().peers


def own_rows() -> bool:
    """Return whether each rank holds its own rows of the batch."""
    return _peers() is not None


@contextmanager
def replicated() -> Iterator[None]:
    """Compute within the context from tensors that are equal on all ranks: no sum reaches over ranks."""
    with using(peers=None):
        yield


def batch_count(own: int, like: Tensor) -> int:
    """Return the number of samples of the whole batch, of which this rank holds `own`."""
    peers = _peers()
    return own if peers is None else sum(peers.sizes(like.new_empty(own, 0)))


def positions(own: int, device: torch.device) -> Tensor:
    """Return the positions in the whole batch of the samples that this rank holds."""
    peers, place = _peers(), torch.arange(own, device=device)
    return place if peers is None else place + sum(peers.sizes(place)[: peers.rank])


class _Sum(torch.autograd.Function):
    """Sum over ranks; its gradient is summed, too, because every rank's result depends on every rank's term.

    equal: the gradient is the same on all ranks, so that their sum is W times it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, equal: bool) -> Tensor:
        ctx.peers, ctx.equal = peers, equal
        x = x.clone(memory_format=torch.contiguous_format)
        peers.add(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.equal:
            return gradient * ctx.peers.world, None, None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        ctx.peers.add(gradient)
        return gradient, None, None


def batch_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor that each computed from its own samples; x itself in one process."""
    peers = _peers()
    return x if peers is None else _Sum.apply(x, peers, False)


def loss_sum(x: Tensor) -> Tensor:
    """Return `batch_sum` as a term of the loss, whose backward pass needs no communication.

    All ranks must compute the same from it, so that they have the same gradient of it: the loss, from values that are
    equal on all ranks. A sum that a rank combines with its own rows, such as a mean that it subtracts from them, has
    another gradient on each rank; it needs `batch_sum`.
    """
    peers = _peers()
    return x if peers is None else _Sum.apply(x, peers, True)


def batch_mean(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Return the mean over a dimension that contains the samples, or over all dimensions."""
    if _peers() is None:
        return x.mean() if dim is None else x.mean(dim, keepdim)
    if dim is None:
        return batch_sum(x.sum()) / batch_count(x.numel(), x.detach())
    return batch_sum(x.sum(dim, keepdim)) / batch_count(x.shape[dim], x.detach())


def loss_mean(x: Tensor, count: int | None = None) -> Tensor:
    """Return the mean over all dimensions as a term of the loss (`loss_sum`).

    count: number of entries on all ranks, if it is known.
    """
    if _peers() is None:
        return x.mean()
    return loss_sum(x.sum()) / (batch_count(x.numel(), x.detach()) if count is None else count)


def centred(x: Tensor, dim: int) -> Tensor:
    """Return x minus its mean over a dimension that contains the samples.

    On several ranks the mean has no gradient. Use the result only in sums over the samples of products with centred
    values, such as (co)variances: the gradient of the mean, a sum of centred values, is 0 there.
    """
    return x - batch_mean(x if _peers() is None else x.detach(), dim, keepdim=True)


def batch_var(x: Tensor, dim: int, correction: int = 1) -> Tensor:
    """Return the variance over a dimension that contains the samples."""
    if _peers() is None:
        return x.var(dim, correction=correction)
    return batch_sum(centred(x, dim).square().sum(dim)) / (batch_count(x.shape[dim], x.detach()) - correction)


def loss_var(x: Tensor, dim: int, correction: int = 1) -> Tensor:
    """Return the variance over a dimension that contains the samples, for terms of the loss (`loss_sum`)."""
    if _peers() is None:
        return x.var(dim, correction=correction)
    return loss_sum(centred(x, dim).square().sum(dim)) / (batch_count(x.shape[dim], x.detach()) - correction)


def batch_norm(x: Tensor, dim: int) -> Tensor:
    """Return the Euclidean norm over a dimension of samples, which becomes 1; the gradient of a norm of 0 is 0."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm if _peers() is None else torch.linalg.vector_norm(whole(norm[None]), dim=0)


def batch_logsumexp(x: Tensor, dim: int = 0, keepdim: bool = False) -> Tensor:
    """Return the log-sum-exp over a dimension that contains the samples."""
    peers = _peers()
    if peers is None:
        return x.logsumexp(dim, keepdim)
    own = x.logsumexp(dim, keepdim)
    top = own.detach().clone(memory_format=torch.contiguous_format)
    peers.largest(top)
    top = top.masked_fill(top.isinf(), 0)
    return batch_sum((own - top).exp()).log() + top


def batch_softmax(x: Tensor, dim: int = 0) -> Tensor:
    """Return the soft-max over a dimension that contains the samples, for own samples."""
    return x.softmax(dim) if _peers() is None else (x - batch_logsumexp(x, dim, keepdim=True)).exp()


def batch_log_softmax(x: Tensor, dim: int = 0) -> Tensor:
    """Return the logarithm of `batch_softmax`."""
    return x.log_softmax(dim) if _peers() is None else x - batch_logsumexp(x, dim, keepdim=True)


class _Whole(torch.autograd.Function):
    """The entries of all ranks along the first dimension; the gradient of own entries is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, ctx.sizes = peers, peers.sizes(x)
        return peers.gather(x, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        ctx.peers.add(gradient)
        return gradient.split(ctx.sizes)[ctx.peers.rank], None


def whole(x: Tensor, dim: int = 0) -> Tensor:
    """Return the entries of all samples, on every rank: for indices, and for equations that need all rows at once."""
    peers = _peers()
    return x if peers is None else _Whole.apply(x.movedim(dim, 0), peers).movedim(0, dim)


def batch_max(x: Tensor) -> Tensor:
    """Return the largest entry over all ranks, without gradient."""
    peers, top = _peers(), x.detach().max()
    if peers is not None:
        top = top.clone()
        peers.largest(top)
    return top


def own_share(x: Tensor, dim: int = 0) -> Tensor:
    """Return this rank's share of a tensor that is equal on all ranks, if each holds its own rows; else all of it."""
    peers = _peers()
    if peers is None:
        return x
    return x.tensor_split(peers.world, dim)[peers.rank]
