"""MMCR: the means of the samples' views span as many directions as possible (maximum manifold capacity)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean, whole
from inbatch.nn.functional import normalize
from inbatch.nn.heads import Head, hidden_widths, mlp


def nuclear_norm(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b"]:
    """Return the sum of the singular values; nan if a value is not finite, for which LAPACK would raise an error."""
    if not x.isfinite().all():
        return x.sum((-2, -1)) * torch.nan
    return torch.linalg.svd(x, full_matrices=False).S.sum(-1)  # svdvals has other bits without a graph


def mmcr(
    z: Float[Tensor, "v n d"],
    target: Float[Tensor, "w n d"] | None = None,
    lmbda: float = 0.0,
    local: Literal["online", "all"] = "online",
) -> Losses:
    """Compute the manifold capacity loss (Yerxa et al. 2023, Eq. 3), rows normalised inside.

    l = -|C|_* + lmbda mean_n |Z_n|_*, with the nuclear norm |.|_* (sum of singular values), C the N means of the
    samples' unit rows over the views, and Z_n the unit rows (V, D) of one sample. target: rows of a target network
    without gradient; C is then the mean of both networks' means. local: "all" adds its rows to Z_n.
    """
    if not z.shape[0] or not batch_count(z.shape[1], z):
        raise ValueError(f"MMCR needs views of samples, got {tuple(z.shape)} (views, samples, width)")
    u = normalize(z)
    centre, rows = u.mean(0), u
    if target is not None:
        teacher = normalize(target.detach())
        centre = (centre + teacher.mean(0)) / 2
        rows = torch.cat([u, teacher]) if local == "all" else u
    losses = {"global": nuclear_norm(whole(centre))}
    losses |= {"local": loss_mean(nuclear_norm(rows.transpose(0, 1)))} if lmbda else {}
    return {"loss": lmbda * losses.get("local", 0.0) - losses["global"]} | losses


class MMCR(Method):
    """Learning Efficient Coding of Natural Images with Maximum Manifold Capacity Representations, arXiv 2303.03307.

    lmbda: weight of the nuclear norms of the single samples.
    momentum: of a target network whose rows join the means; 0 is without target network.
    local: rows of a sample whose norm counts: "online", or "all" with those of the target network.
    hidden_dim, layers, out_dim: width of the projection's hidden layers, their number plus 1, and width of its rows.
    """

    views = (2, None)
    _imagenet = {
        "source": "ThomasYerxa/mmcr, mmcr/imagenet/train.py", "views.name": "byol", "optimizer.name": "lars",
        "optimizer.lr": 0.6, "optimizer.weight_decay": 1e-6, "batch_size": 2048, "epochs": 100,
        "schedule.warmup_epochs": 10, "schedule.end": 1e-3}  # fmt: skip
    _cifar = {
        "source": "the same repository, pretrain_cifar_stl.py: constant rate", "views.name": "simclr_cifar",
        "views.num_views": 40, "optimizer.name": "adam", "optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-6,
        "schedule.name": "constant", "schedule.warmup_epochs": 0, "schedule.scaling": "none", "batch_size": 32,
        "epochs": 500, "method.hidden_dim": 512, "method.layers": 2, "method.out_dim": 128}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "views.num_views": 4, "method.hidden_dim": 256, "method.layers": 2,
        "method.out_dim": 64}  # fmt: skip
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, lmbda: float = 0.0, momentum: float = 0.0, local: Literal["online", "all"] = "online",
                 hidden_dim: int = 8192, layers: int = 3, out_dim: int = 512) -> None:  # fmt: skip
        super().__init__()
        self.lmbda, self.momentum, self.local = lmbda, momentum, local
        self.target = ("projection",) if momentum else ()  # type: ignore[misc]  # declared for the class
        self.hidden_dim, self.layers, self.out_dim = hidden_dim, layers, out_dim

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, last="plain"))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return mmcr(online["projection"], target.get("projection"), self.lmbda, self.local)
