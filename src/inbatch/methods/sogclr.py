"""SogCLR: SimCLR with negatives of the whole data set, whose sum is estimated by one number per sample."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import whole
from inbatch.nn.functional import normalize
from inbatch.nn.global_contrast import global_contrast, updated
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature


def sogclr(
    z: Float[Tensor, "2 n d"], log_u: Float[Tensor, "n"], temperature: float = 0.1,
    gamma: Float[Tensor, ""] | float = 0.9,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:  # fmt: skip
    """Compute the global contrastive loss (Yuan et al. 2022, Algorithm 1) and the new log u; rows normalised inside.

    For a row h_i of either view, with h_j the 2 (N - 1) rows of the other samples: g_i = mean_j exp(h_i . h_j / T),
    u_i <- (1 - gamma) u_i + gamma g_i, and l_i = mean_j (exp(h_i . h_j / T) / u_i) h_i . h_j - h_i . h'_i with constant
    weights. The loss is the mean over samples of the sum of both views, and a sample's new u the mean of its two. Its
    value is a surrogate and can be negative: its gradient estimates that of T log u_i - h_i . h'_i.
    log_u: logarithms of the samples' u before the step, -inf for 0.
    """
    check_temperature(temperature)
    loss, log_new, _ = global_contrast(normalize(z), log_u, temperature, gamma)
    return loss, torch.logaddexp(log_new[0], log_new[1]) - math.log(2)


class SogCLR(Method):
    """Provable Stochastic Optimization for Global Contrastive Learning, arXiv 2202.12387.

    temperature: T. gamma: share of the batch in the moving average of each sample's u.
    first: u = g without average for a batch of which no sample was seen before ("batch"), or in the first epoch
        ("epoch"), as LibAUC's `adjust_gamma` does.
    hidden_dim, out_dim: widths of the projection's hidden layer (None: that of the features) and of the projection.
    """

    log_u: Tensor
    _imagenet = {
        "source": "Optimization-AI/SogCLR, README: ResNet-50, lr 0.075 times the root of the batch",
        "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.075, "optimizer.weight_decay": 1e-6,
        "schedule.scaling": "sqrt", "batch_size": 256, "epochs": 400, "schedule.warmup_epochs": 10,
        "method.hidden_dim": 2048}  # fmt: skip
    _cifar = _imagenet | {"source": "inbatch, not tuned: that of ImageNet, with SimCLR's views for CIFAR",
        "views.name": "simclr_cifar", "method.hidden_dim": 512}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.temperature": 0.2}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.1, gamma: float = 0.9, first: Literal["batch", "epoch"] = "batch",
                 hidden_dim: int | None = None, out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is the share of the batch in the average, above 0 and at most 1, not {gamma:g}")
        self.temperature, self.gamma, self.first = temperature, gamma, first
        self.hidden_dim, self.out_dim = hidden_dim, out_dim

    def prepare(self, *, images: int, **sizes: int) -> None:
        self.register_buffer("log_u", torch.full((images,), -torch.inf))

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(2, self.hidden_dim, width)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, last="norm_plain"))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        old = self.log_u[batch.index]
        seen = self.log_u[whole(batch.index)]
        new = seen.isneginf().all() if self.first == "batch" else torch.as_tensor(batch.epoch == 0, device=old.device)
        gamma = torch.where(new, old.new_ones(()), self.gamma)
        loss, log_u = sogclr(online["projection"], old, self.temperature, gamma)
        return {"loss": loss, "state.log_u": updated(self.log_u, batch.index, log_u)}
