"""VICReg: views agree, every feature keeps its variance, and different features are uncorrelated."""

from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.functional import covariance, variance_hinge, wide
from inbatch.nn.heads import Head, hidden_widths, mlp


def vicreg(
    z: Float[Tensor, "v n d"], sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0,
    variance: Literal["mean", "sum"] = "mean", eps: float = 1e-4,
) -> Losses:  # fmt: skip
    """Return "loss" = sim invariance + std variance + cov covariance (Bardes et al. 2022, Eq. 6), and its terms.

    invariance: mean squared difference of two views' rows (Eq. 5), also over features, as in the authors' code.
    variance: mean over features of max(0, 1 - sqrt(Var + eps)) (Eq. 1), averaged over the two views as in the
        authors' code, or added with "sum", as in Eq. 6.
    covariance: squared covariances of different features, summed and divided by D (Eq. 4), added over the two views.
    All three are averaged over the pairs of views; rows are not normalised, variances are unbiased.
    """
    if z.shape[0] < 2 or batch_count(z.shape[1], z) < 2:
        raise ValueError(f"VICReg needs 2 views of 2 samples, got {tuple(z.shape)} (views, samples, width)")
    z = wide(z)
    away = torch.stack([loss_mean((a - b).square()) for a, b in combinations(z, 2)]).mean()
    narrow = variance_hinge(z, eps) * (1 if variance == "mean" else 2)
    shared = torch.stack([covariance(view).square().fill_diagonal_(0).sum() for view in z]).mean() * 2 / z.shape[2]
    loss = sim_coeff * away + std_coeff * narrow + cov_coeff * shared
    return {"loss": loss, "invariance": away, "variance": narrow, "covariance": shared}


def mixed_vicreg(
    q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], mixture: Mixture, sim_coeff: float = 25.0,
    std_coeff: float = 25.0, cov_coeff: float = 1.0, variance: Literal["mean", "sum"] = "mean", eps: float = 1e-4,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the loss of rows of mixed images: the invariance is that with the keys of their two samples, by share.

    Variance and covariance are those of the mixed rows and of the keys.
    """
    rows = wide(q), wide(k)
    away = loss_mean(mixture.shared((rows[0] - rows[1][mixture.positive]).square().mean(-1)))
    narrow = torch.stack([variance_hinge(x[None], eps) for x in rows]).mean() * (1 if variance == "mean" else 2)
    shared = torch.stack([covariance(x).square().fill_diagonal_(0).sum() for x in rows]).sum() / q.shape[1]
    return sim_coeff * away + std_coeff * narrow + cov_coeff * shared


class VICReg(Method):
    """Variance-Invariance-Covariance Regularization, arXiv 2105.04906.

    sim_coeff, std_coeff, cov_coeff: coefficients of the three terms (lambda, mu and nu of Eq. 6); without std,
    features collapse.
    variance: its term is the "mean" of the two views', as in the authors' code, or their "sum", as in solo-learn.
    eps: added to the variances under the root.
    hidden_dim, out_dim, layers: widths and number of linear layers of the expander; the last has no bias.
    """

    views, mixed_keys = (2, None), "other"
    presets = {
        "imagenet": {
            "source": "vicreg, main_vicreg.py and README, 1000 epochs: base lr 0.2 (100 epochs: 0.3, 512 images)",
            "views.name": "vicreg", "optimizer.name": "lars", "optimizer.lr": 0.2, "optimizer.weight_decay": 1e-6,
            "batch_size": 2048, "epochs": 1000, "schedule.warmup_epochs": 10, "schedule.end": 0.001,
        },
        "cifar": {
            "source": "solo-learn, scripts/pretrain/cifar/vicreg.yaml, online linear 92.07 %; its LARS also clips",
            "views.name": "vicreg", "views.min_scale": 0.2, "views.blur": 0.0, "views.blur_second": 0.0,
            "views.solarise": 0.1, "views.solarise_second": 0.1, "optimizer.name": "lars", "optimizer.lr": 0.3,
            "optimizer.weight_decay": 1e-4, "optimizer.eta": 0.02, "batch_size": 256, "epochs": 1000,
            "schedule.warmup_epochs": 10, "method.variance": "sum", "method.hidden_dim": 2048, "method.out_dim": 2048,
        },
        "digits": {"source": "inbatch, embedded data", "method.hidden_dim": 256, "method.out_dim": 256},
    }  # fmt: skip
    own_rows = True

    def __init__(self, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0,
                 variance: Literal["mean", "sum"] = "mean", eps: float = 1e-4, hidden_dim: int = 8192,
                 out_dim: int = 8192, layers: int = 3) -> None:  # fmt: skip
        super().__init__()
        self.sim_coeff, self.std_coeff, self.cov_coeff = sim_coeff, std_coeff, cov_coeff
        self.variance, self.eps = variance, eps
        self.hidden_dim, self.out_dim, self.layers = hidden_dim, out_dim, layers

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, last="plain"))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return vicreg(online["projection"], self.sim_coeff, self.std_coeff, self.cov_coeff, self.variance, self.eps)

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, how = query["projection"], (self.sim_coeff, self.std_coeff, self.cov_coeff, self.variance, self.eps)
        return torch.stack([mixed_vicreg(q, k, mixture, *how) for k in keys["projection"]]).mean()
