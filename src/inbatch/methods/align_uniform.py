"""Alignment and uniformity: a sample's two views close together, all samples spread over the sphere."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_logsumexp, loss_mean
from inbatch.nn.functional import logsumexp_excluding_self, normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature


def align_uniform(z: Float[Tensor, "2 n d"], t: float = 2.0, weight: float = 1.0, alpha: float = 2.0) -> Losses:
    """Compute alignment and uniformity (Wang and Isola 2020, Section 4.1), rows normalised inside.

    l = mean_i |u_i - u'_i|^alpha + weight (U + U') / 2, with U = log mean_{i != j} exp(-t |u_i - u_j|^2) of one view's
    rows. Because |u_i - u_j|^2 = 2 - 2 u_i . u_j for unit rows, U is a log-sum-exp of products at the temperature
    1 / 2t, and no matrix is held.
    """
    n = batch_count(z.shape[1], z)
    if z.shape[0] != 2 or n < 2:
        raise ValueError(f"uniformity needs 2 views of at least 2 samples, got {tuple(z.shape)}")
    check_power(alpha)
    u = normalize(z)
    pairs = torch.stack([batch_logsumexp(logsumexp_excluding_self(view, 1 / (2 * t))) for view in u])
    uniformity = pairs.mean() - math.log(n * (n - 1)) - 2 * t
    squares = (u[0] - u[1]).square().sum(-1)
    alignment = loss_mean(squares if alpha == 2 else torch.linalg.vector_norm(u[0] - u[1], dim=-1) ** alpha)
    return {"loss": alignment + weight * uniformity, "alignment": alignment, "uniformity": uniformity}


def mixed_align_uniform(
    q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], mixture: Mixture, t: float = 2.0, weight: float = 1.0,
    alpha: float = 2.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute it for rows of mixed images: aligned with the keys of their two samples, by share.

    The uniformity is that of the mixed rows and of the keys. Rows are normalised inside.
    """
    rows = normalize(q), normalize(k)
    squares = (rows[0] - rows[1][mixture.positive]).square().sum(-1)
    alignment = loss_mean(mixture.shared(squares if alpha == 2 else squares ** (alpha / 2)))
    counts = [batch_count(len(x), x) for x in rows]
    sums = [batch_logsumexp(logsumexp_excluding_self(x, 1 / (2 * t))) for x in rows]
    uniformity = [x - math.log(n * (n - 1)) - 2 * t for x, n in zip(sums, counts, strict=True)]
    return alignment + weight * torch.stack(uniformity).mean()


def check_power(alpha: float) -> None:
    """Raise ValueError for a power below 1, whose gradient is infinite where two views are equal."""
    if not 1 <= alpha < math.inf:
        raise ValueError(f"alpha {alpha:g} must be finite and at least 1")


class AlignUniform(Method):
    """Understanding Contrastive Representation Learning through Alignment and Uniformity, arXiv 2005.10242.

    t: sharpness of the uniformity's kernel. weight: of the uniformity. alpha: power of the distances of two views.
    hidden_dim: width of the projection's hidden layers; None is the width of the features.
    out_dim: width of the projection. layers: its linear layers.
    """

    presets = {
        "imagenet": {
            "source": "inbatch, not tuned: the losses of the STL-10 code, SimCLR's training", "views.name": "simclr",
            "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-4, "batch_size": 256,
            "epochs": 100, "schedule.warmup_epochs": 10,
        },
        "cifar": {
            "source": "ssnl/align_uniform, examples/stl10/main.py: steps at 155, 170 and 185 of 200 epochs",
            "views.name": "mocov1", "views.min_scale": 0.08, "optimizer.name": "sgd", "optimizer.lr": 0.12,
            "optimizer.weight_decay": 1e-4, "batch_size": 768, "epochs": 200, "schedule.name": "step",
            "schedule.milestones": [0.775, 0.85, 0.925], "schedule.warmup_epochs": 0, "method.layers": 1,
        },
        "digits": {"source": "inbatch, embedded data"},
    }  # fmt: skip
    own_rows, mixed_keys = True, "other"

    def __init__(self, t: float = 2.0, weight: float = 1.0, alpha: float = 2.0, hidden_dim: int | None = None,
                 out_dim: int = 128, layers: int = 2) -> None:  # fmt: skip
        super().__init__()
        check_temperature(1 / (2 * t) if t > 0 else t)
        check_power(alpha)
        self.t, self.weight, self.alpha = t, weight, alpha
        self.hidden_dim, self.out_dim, self.layers = hidden_dim, out_dim, layers

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(self.layers, self.hidden_dim, width), self.out_dim))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return align_uniform(online["projection"], self.t, self.weight, self.alpha)

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, how = query["projection"], (self.t, self.weight, self.alpha)
        return torch.stack([mixed_align_uniform(q, k, mixture, *how) for k in keys["projection"]]).mean()
