"""Barlow Twins: two views agree in every feature, and different features are uncorrelated."""

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_var, centred, loss_sum
from inbatch.nn.functional import nan_if_overflow, product, wide
from inbatch.nn.heads import Head, hidden_widths, mlp


def cross_correlation(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], eps: float = 1e-5
) -> Float[Tensor, "d d"]:  # fmt: skip
    """Return the correlation over the batch of every feature of one view with every feature of the other.

    Zbontar et al. 2021, Eq. 2; eps is added to the (biased) variances, as in batch normalisation.
    """
    a, b = (centred(x, 0) / nan_if_overflow((batch_var(x, 0, correction=0) + eps).sqrt()) for x in (wide(a), wide(b)))
    return loss_sum(product(a.T, b)) / batch_count(len(a), a)


def barlow_twins(z: Float[Tensor, "v n d"], lambd: float = 0.0051, scale: float = 1.0) -> Losses:
    """Return "loss" = scale (on + offdiagonal off), on = sum_i (1 - C_ii)^2, off = sum_{i != j} C_ij^2 (Eq. 1).

    Also returns its terms "on_diagonal" and "off_diagonal". All are averaged over pairs of views; rows are not
    normalised.
    """
    if z.shape[0] < 2 or batch_count(z.shape[1], z) < 2:
        raise ValueError(f"Barlow Twins needs 2 views of 2 samples, got {tuple(z.shape)} (views, samples, width)")
    on, off = [], []
    for a, b in combinations(wide(z), 2):
        c = cross_correlation(a, b)
        on.append((1 - c.diagonal()).square().sum())
        off.append(c.square().fill_diagonal_(0).sum())
    agree, repeat = torch.stack(on).mean(), torch.stack(off).mean()
    return {"loss": scale * (agree + lambd * repeat), "on_diagonal": agree, "off_diagonal": repeat}


class BarlowTwins(Method):
    """Self-Supervised Learning via Redundancy Reduction, arXiv 2103.03230.

    lambd: lambda of Eq. 1.
    scale: factor of the whole loss: 1/32 in the authors' first release, 0.1 (CIFAR) or 0.025 in solo-learn.
    hidden_dim, out_dim, layers: widths and number of linear layers of the projection; the last has no bias.
    """

    views = (2, None)
    presets = {
        "imagenet": {
            "source": "barlowtwins, main.py and README: lr 0.2 for weights, 0.0048 for biases and norms",
            "views.name": "barlow", "optimizer.name": "lars", "optimizer.lr": 0.2, "optimizer.vector_lr": 0.0048,
            "optimizer.weight_decay": 1e-6, "batch_size": 2048, "epochs": 1000, "schedule.warmup_epochs": 10,
            "schedule.end": 0.001,
        },
        "cifar": {
            "source": "lightly's CIFAR-10 benchmark (the authors have none): 0.06 for 128 images, k-NN 84.2 % at 200",
            "views.name": "simclr_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4,
            "batch_size": 128, "epochs": 200, "schedule.warmup_epochs": 0,
            "method.lambd": 0.005, "method.hidden_dim": 2048, "method.out_dim": 2048,
        },
        "digits": {"source": "inbatch, embedded data", "method.hidden_dim": 256, "method.out_dim": 256},
    }  # fmt: skip
    own_rows = True

    def __init__(self, lambd: float = 0.0051, scale: float = 1.0, hidden_dim: int = 8192, out_dim: int = 8192,
                 layers: int = 3) -> None:  # fmt: skip
        super().__init__()
        self.lambd, self.scale, self.hidden_dim, self.out_dim, self.layers = lambd, scale, hidden_dim, out_dim, layers

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, last="plain"))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return barlow_twins(online["projection"], self.lambd, self.scale)
