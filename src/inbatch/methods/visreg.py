"""VISReg: views agree, features have mean 0 and variance 1, and rows are normal along random directions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_mean, batch_norm
from inbatch.nn.functional import invariance, wide
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.slicing import check_options, random_directions, wasserstein


def visreg(z: Float[Tensor, "v n d"], directions: Float[Tensor, "d k"], lamb: float = 0.9,
           global_views: int | None = None, eps: float = 1e-6) -> Losses:  # fmt: skip
    """Return "loss" = lamb (center + scale + shape) + (1 - lamb) invariance, and its four terms (arXiv 2606.02572).

    With the mean m and the standard deviation s (biased, plus eps) of each feature of each view:
    center: mean of m^2. scale: mean of (s - 1)^2.
    shape: mean squared difference of the projections of (z - m) / s, sorted, and the quantiles of N(0, 1); s has no
        gradient here.
    invariance: mean of (z_v - c)^2, with c the mean of a sample's first `global_views` rows (None: of all).
    directions: one per column, see `inbatch.nn.slicing.random_directions`.
    """
    check_eps(eps)
    away = invariance(z, global_views)
    z = wide(z)
    mean = batch_mean(z, 1, keepdim=True)
    deviation = batch_norm(z - mean, 1) / batch_count(z.shape[1], z) ** 0.5 + eps
    center, scale = mean.square().mean(), (deviation - 1).square().mean()
    shape = wasserstein((z - mean) / deviation.detach(), directions)
    loss = lamb * (center + scale + shape) + (1 - lamb) * away
    return {"loss": loss, "invariance": away, "center": center, "scale": scale, "shape": shape}


def check_eps(eps: float) -> None:
    """Raise ValueError unless eps is finite and above 0: a constant feature is divided by it."""
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps {eps:g} must be finite and above 0")


class VISReg(Method):
    """VISReg, arXiv 2606.02572.

    lamb: weight of the terms other than the invariance. slices: number of directions, others in each step.
    global_views: the first views, whose mean all views approach (None: all). eps: added to standard deviations.
    hidden_dim, layers: of the projection. out_dim: its width; None is a third of the features'.
    """

    views = (2, None)
    step: Tensor
    _imagenet = {"source": "HaiyuWu/visreg, ImageNet-1k: 4 large and 6 small crops; 100 epochs, colours of SwAV here",
        "views.name": "swav", "views.num_large_crops": 4, "views.num_small_crops": 6, "optimizer.name": "adamw",
        "optimizer.lr": 9e-4, "optimizer.weight_decay": 0.05, "epochs": 100, "schedule.warmup_epochs": 5,
        "schedule.scaling": "none", "method.slices": 4096, "method.global_views": 4}  # fmt: skip
    _cifar = {"source": "inbatch, after the authors' Imagenette: lamb 0.6, AdamW 1e-3, 800 epochs",
        "views.name": "simclr_cifar", "views.num_views": 4, "optimizer.name": "adamw", "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 0.05, "batch_size": 256, "epochs": 800, "schedule.warmup_epochs": 5,
        "schedule.scaling": "none", "method.lamb": 0.6}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.hidden_dim": 256, "method.lamb": 0.6}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, lamb: float = 0.9, slices: int = 256, global_views: int | None = None, eps: float = 1e-6,
                 hidden_dim: int = 2048, out_dim: int | None = None, layers: int = 3) -> None:  # fmt: skip
        super().__init__()
        check_eps(eps)
        self.lamb, self.slices, self.global_views, self.eps = lamb, slices, global_views, eps
        self.hidden, self.out_dim = hidden_widths(layers, hidden_dim), out_dim
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        check_options(self.lamb, self.slices, self.global_views, views)

    def heads(self, width: int) -> dict[str, Head]:
        out = width // 3 if self.out_dim is None else self.out_dim
        return {"projection": Head(mlp(width, *self.hidden, out, activation=nn.GELU))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        directions = random_directions(z.shape[2], self.slices, self.step, batch.seed, z.device)
        return visreg(z, directions, self.lamb, self.global_views, self.eps)

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.step += 1
