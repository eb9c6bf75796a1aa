"""iSogCLR: SogCLR with a temperature for each sample, learned by its own rule."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_mean
from inbatch.nn.functional import normalize
from inbatch.nn.global_contrast import global_contrast, updated
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature


def isogclr(
    z: Float[Tensor, "2 n d"], log_s: Float[Tensor, "n"], tau: Float[Tensor, "n"], gamma: float = 0.8, rho: float = 6.0
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Compute the loss (Qiu et al. 2023, Algorithm 1), the new log s, and the temperatures' gradient.

    Loss and s are SogCLR's (`sogclr`, with u called s), with the temperature tau_i of the sample in place of T. The
    gradient, that of tau (log s + rho), is the mean of both views of log s_i + rho - mean_j p_ij h_i . h_j / tau_i.
    """
    loss, log_new, weighted = global_contrast(normalize(z), log_s, tau, gamma)
    slope = (log_new + rho - weighted / tau.to(weighted.dtype)).mean(0)
    return loss, torch.logaddexp(log_new[0], log_new[1]) - math.log(2), slope.detach()


class ISogCLR(Method):
    """Not All Semantics are Created Equal: Contrastive Learning with Automatic Temperature, arXiv 2305.11965.

    temperature: of every sample at the start. tau_min, tau_max: its range.
    rho: the larger, the closer the temperatures move to tau_min. eta: their learning rate.
    beta: share of the step in the moving average of their gradient. clip: bound of that gradient; None for no bound.
    gamma: share of the batch in the moving average of each sample's s, from the second epoch on.
    hidden_dim, out_dim: widths of the projection's hidden layer (None: that of the features) and of the projection.
    """

    log_s: Tensor
    tau: Tensor
    slope: Tensor
    _cifar = {
        "source": "zhqiu/contrastive-learning-iSogCLR, README: CIFAR-100, ResNet-50, lr 0.8 for 128 images",
        "views.name": "supcon", "optimizer.name": "sgd", "optimizer.lr": 1.6, "optimizer.weight_decay": 1e-4,
        "batch_size": 128, "epochs": 400, "schedule.warmup_epochs": 10,
        "method.rho": 0.4, "method.beta": 0.5, "method.eta": 0.03}  # fmt: skip
    _imagenet = _cifar | {
        "source": "inbatch, not tuned: SogCLR's training with the constants of the iSogCLR README",
        "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.075, "optimizer.weight_decay": 1e-6,
        "schedule.scaling": "sqrt", "batch_size": 256}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.temperature": 0.2, "method.rho": 0.4}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.1, tau_min: float = 0.05, tau_max: float = 1.0, rho: float = 6.0,
                 eta: float = 1e-3, beta: float = 0.9, clip: float | None = 3.0, gamma: float = 0.8,
                 hidden_dim: int | None = None, out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, tau_min, tau_max)
        if not (0 < gamma <= 1 and 0 < beta <= 1):
            raise ValueError(f"gamma {gamma:g} and beta {beta:g} are shares, above 0 and at most 1")
        if not tau_min <= temperature <= tau_max:
            raise ValueError(f"temperature {temperature:g} must be within tau_min {tau_min:g} and tau_max {tau_max:g}")
        if eta < 0 or (clip is not None and clip <= 0):
            raise ValueError(f"eta {eta:g} must be at least 0, and clip {clip} above 0 (null for no bound)")
        self.temperature, self.tau_min, self.tau_max = temperature, tau_min, tau_max
        self.rho, self.eta, self.beta, self.gamma, self.clip = rho, eta, beta, gamma, math.inf if clip is None else clip
        self.hidden_dim, self.out_dim = hidden_dim, out_dim

    def prepare(self, *, images: int, **sizes: int) -> None:
        for name, value in (("log_s", -torch.inf), ("tau", self.temperature), ("slope", 0.0)):
            self.register_buffer(name, torch.full((images,), value))

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(2, self.hidden_dim, width), self.out_dim))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        tau, gamma = self.tau[batch.index], 1.0 if batch.epoch == 0 else self.gamma
        loss, log_s, slope = isogclr(online["projection"], self.log_s[batch.index], tau, gamma, self.rho)
        slope = self.slope[batch.index].lerp(slope.clamp(-self.clip, self.clip).to(tau.dtype), self.beta)
        new = {"log_s": log_s, "tau": (tau - self.eta * slope).clamp(self.tau_min, self.tau_max), "slope": slope}
        state = {f"state.{k}": updated(getattr(self, k), batch.index, x) for k, x in new.items()}
        return {"loss": loss, "temperature": batch_mean(tau), **state}
