"""TiCo: views close together, and rows away from the directions that the rows of past batches occupied."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_sum, loss_mean
from inbatch.nn.functional import normalize, product
from inbatch.nn.heads import Head, mlp
from inbatch.nn.schedules import cosine


def tico(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], covariance: Float[Tensor, "d d"], beta: float = 0.9,
         rho: float = 8.0, detach: bool = True) -> tuple[Losses, Float[Tensor, "d d"]]:  # fmt: skip
    """Compute invariance and covariance contrast (Zhu et al. 2022, Algorithm 1) and the new covariance C.

    With unit rows a_n (online) and b_n (target network, no gradient), C <- beta C + (1 - beta) mean_n a_n a_n^T and
    l = 1 - mean_n a_n . b_n + rho mean_n a_n^T C a_n, with the new C. Rows are normalised inside.
    detach: no gradient through this batch's part of C, else it has its share of the gradient.
    """
    if a.shape != b.shape or not batch_count(len(a), a):
        raise ValueError(f"TiCo needs a target for every row, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = normalize(a), normalize(b.detach())
    past = a.detach() if detach else a
    covariance = beta * covariance.to(a.dtype) + (1 - beta) / batch_count(len(a), a) * batch_sum(product(past.T, past))
    invariance, contrast = 1 - loss_mean((a * b).sum(-1)), loss_mean((product(a, covariance) * a).sum(-1))
    return {"loss": invariance + rho * contrast, "invariance": invariance, "contrast": contrast}, covariance.detach()


class TiCo(Method):
    """Transformation Invariance and Covariance Contrast, arXiv 2206.10698.

    beta: of the moving covariance. rho: weight of the contrast.
    detach: whether this batch's part of the covariance has no gradient.
    momentum: initial momentum of the target network; it rises to 1 along half a cosine.
    hidden_dim, out_dim: width of the hidden layer of the projection, and of its rows.
    """

    target = ("projection",)
    covariance: Tensor
    _imagenet = {
        "source": "second-hand: lightly's ImageNet benchmark, BYOL's views and schedule", "views.name": "byol",
        "optimizer.name": "lars", "optimizer.lr": 0.2, "optimizer.weight_decay": 1.5e-6, "batch_size": 256,
        "epochs": 100, "schedule.warmup_epochs": 10}  # fmt: skip
    _cifar = {"source": "inbatch, not tuned: BYOL's for CIFAR", "views.name": "simclr_cifar", "optimizer.name": "sgd",
        "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4, "batch_size": 512, "epochs": 200,
        "schedule.warmup_epochs": 0, "method.hidden_dim": 1024}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.hidden_dim": 256, "method.out_dim": 64}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, beta: float = 0.9, rho: float = 8.0, momentum: float = 0.99, hidden_dim: int = 4096,
                 out_dim: int = 256, detach: bool = True) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta is the share of the past in the covariance, from 0 to below 1, not {beta:g}")
        self.beta, self.rho, self.detach, self.momentum = beta, rho, detach, momentum
        self.hidden_dim, self.out_dim = hidden_dim, out_dim
        self.register_buffer("covariance", torch.zeros(out_dim, out_dim))

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, self.hidden_dim, self.out_dim))}

    def online_views(self, views: int) -> Sequence[int]:
        return (0,)

    def target_views(self, views: int) -> Sequence[int]:
        return (1,)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        rows = online["projection"][0], target["projection"][0]
        losses, covariance = tico(*rows, self.covariance, self.beta, self.rho, self.detach)
        return losses | {"state.covariance": covariance.to(self.covariance.dtype)}

    def target_momentum(self, progress: float) -> float:
        return cosine(progress, self.momentum, 1.0)
