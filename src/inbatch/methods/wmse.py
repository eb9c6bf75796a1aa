"""W-MSE: a sample's views agree after the rows of its sub-batch are whitened, which prevents collapse."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.errors import check_range
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_max, loss_mean, own_share, whole
from inbatch.nn.functional import cholesky_with_jitter, moments, normalize, wide
from inbatch.nn.heads import Head, mlp
from inbatch.rng import uniform


def whiten(x: Float[Tensor, "*b n d"], mean: Float[Tensor, "*b 1 d"], lower: Float[Tensor, "*b d d"]
           ) -> Float[Tensor, "*b n d"]:  # fmt: skip
    """Return L^-1 (x - mean) for every row: of covariance I if L is the Cholesky factor of the rows' covariance."""
    return torch.linalg.solve_triangular(lower, (wide(x) - mean).mT, upper=False).mT


def _fits(views: int, n: int, width: int, size: int) -> None:
    if views < 2 or n % size or size <= width:
        raise ValueError(
            f"W-MSE needs 2 views, and w_size {size} to divide the batch, {n}, and to exceed out_dim, {width}"
        )


def wmse(
    z: Float[Tensor, "v n d"], permutations: Int[Tensor, "k m"], size: int = 128, eps: float = 0.0, norm: bool = True
) -> Losses:
    """Squared distance of whitened rows, over all samples and pairs of views (Ermolov et al. 2021, section 3).

    permutations: each divides the M samples of the whole batch into sub-batches of `size`, whitened separately per
        view with their own mean and factor; their losses are averaged, with gradient through all of it. Computed in
        float64: if features are nearly dependent, the float32 gradient differs. "jitter": the largest that was added
        for a factor.
    norm: whitened rows are normalised (2 - 2 cos); else the distance is divided by D, as in the authors' code.
    """
    _fits(len(z), batch_count(z.shape[1], z), z.shape[2], size)
    x = whole(z, 1).double()[:, own_share(permutations.reshape(-1, size))]  # (V, K N / size, size, D)
    mean, cov = moments(x)
    lower, jitter = cholesky_with_jitter(cov, eps)
    y = whiten(x, mean, lower).flatten(1, 2)
    y = normalize(y) if norm else y / z.shape[2] ** 0.5
    i, j = torch.triu_indices(len(z), len(z), 1, device=z.device)
    loss = loss_mean((y[i] - y[j]).square().sum(-1), count=len(i) * permutations.numel())
    most = batch_max(torch.cat([jitter.new_zeros(1), jitter.flatten()]))  # a rank may have no sub-batch
    return {"loss": loss.to(wide(z).dtype), "jitter": most}


class WMSE(Method):
    """Whitening for Self-Supervised Representation Learning, arXiv 2007.06346; with 4 views it is W-MSE 4.

    w_size: samples of a sub-batch. w_iter: averaged divisions of the batch. eps: shrinks covariances towards I.
    norm: whitened rows are normalised. hidden_dim, out_dim: widths of the projection's hidden layer and of its rows.
    """

    views = (2, None)
    _cifar = {
        "source": "htdt/self-supervised, README, W-MSE 2", "batch_size": 512, "epochs": 1000,
        "schedule.scaling": "none", "views.name": "wmse", "optimizer.name": "adam", "optimizer.lr": 3e-3,
        "optimizer.weight_decay": 1e-6, "schedule.name": "step", "schedule.milestones": (0.95, 0.975),
        "schedule.warmup_epochs": 5.15}  # fmt: skip
    _imagenet = _cifar | {
        "source": "the same README, ImageNet-100, W-MSE 2: SimCLR's crops and colours, no blur",
        "views.name": "simclr", "views.blur": 0.0, "optimizer.lr": 2e-3, "epochs": 240, "schedule.warmup_epochs": 2.02,
        "schedule.milestones": (0.7917, 0.8958), "method.w_size": 256, "method.out_dim": 128}  # fmt: skip
    _four = _cifar | {"source": "the same, W-MSE 4", "views.num_views": 4, "batch_size": 256,
        "schedule.warmup_epochs": 2.56}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.w_size": 64, "method.hidden_dim": 256, "method.out_dim": 32}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "cifar4": _four, "digits": _digits}
    own_rows = True

    def __init__(self, w_size: int = 128, w_iter: int = 1, eps: float = 0.0, norm: bool = True, hidden_dim: int = 1024,
                 out_dim: int = 64) -> None:  # fmt: skip
        super().__init__()
        check_range(1, w_size=w_size, w_iter=w_iter)
        check_range(0, 1, eps=eps)
        self.w_size, self.w_iter, self.eps = w_size, w_iter, eps
        self.norm, self.hidden_dim, self.out_dim = norm, hidden_dim, out_dim

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        _fits(views, batch, self.out_dim, self.w_size)

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, self.hidden_dim, self.out_dim))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        index = whole(batch.index)
        order = index.argsort()  # the loss must not depend on the order of the samples
        draws = uniform(batch.seed, batch.epoch, index[order], -1, self.w_iter)  # view -1: views are 0, 1, ...
        return wmse(online["projection"], order[draws.argsort(dim=0, stable=True).T], self.w_size, self.eps, self.norm)
