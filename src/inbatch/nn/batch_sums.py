"""Sums, means and statistics over the samples of the whole batch, whatever part of it this rank holds.

A loss is a pure function of rows and names no rank. In one process, and in a step in which every rank holds the rows of
the whole batch, these functions are those of PyTorch. If each rank holds its own rows (`tiles.PLAN` has peers), they
reach over all ranks: every rank computes the loss of the whole batch from its own rows. A value that is summed over
ranks gets the sum of the gradients of all ranks. Each rank propagates the loss back, so that gradients are W times
those of the whole batch, and their mean over W ranks, as DistributedDataParallel computes it, is exact.
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
    """Sum over ranks; its gradient is summed, too, because every rank's result depends on every rank's term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        x = x.clone(memory_format=torch.contiguous_format)
        peers.add(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        ctx.peers.add(gradient)
        return gradient, None


def batch_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor that each computed from its own samples; x itself in one process."""
    peers = _peers()
    return x if peers is None else _Sum.apply(x, peers)


def batch_mean(x: Tensor, dim: int | None = None, keepdim: bool = False, count: int | None = None) -> Tensor:
    """Return the mean over a dimension that contains the samples, or over all dimensions.

    count: number of entries on all ranks, if it is known.
    """
    if _peers() is None:
        return x.mean() if dim is None else x.mean(dim, keepdim)
    if dim is None:
        return batch_sum(x.sum()) / (batch_count(x.numel(), x.detach()) if count is None else count)
    return batch_sum(x.sum(dim, keepdim)) / batch_count(x.shape[dim], x.detach())


def batch_var(x: Tensor, dim: int, correction: int = 1, keepdim: bool = False) -> Tensor:
    """Return the variance over a dimension that contains the samples."""
    if _peers() is None:
        return x.var(dim, correction=correction, keepdim=keepdim)
    away = (x - batch_mean(x, dim, keepdim=True)).square().sum(dim, keepdim)
    return batch_sum(away) / (batch_count(x.shape[dim], x.detach()) - correction)


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
