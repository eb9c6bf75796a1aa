"""HCL: SimCLR with a larger weight for hard negatives and a correction for false ones; the debiased loss at beta 0."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.functional import normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.mixed_contrast import mixed_contrast
from inbatch.nn.negatives import Negatives, log_in_batch, other_views


def hcl(
    z: Float[Tensor, "v n d"], temperature: float = 0.5, tau_plus: float = 0.1, beta: float = 1.0,
    negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the hard-negative contrastive loss (Robinson et al. 2021, Eq. 4 and 5), rows normalised inside.

    With e_ij = exp(u_i . u_j / T) and the M = V (N - 1) rows j of other samples,
    R_i = sum_j e_ij^(1 + beta) / mean_j e_ij^beta, p_i the mean of e over the row's other views and P_i their sum,
    Ng_i = max( (R_i - tau_plus M p_i) / (1 - tau_plus), M exp(-1 / T) ),
    l_i = log(P_i + Ng_i) - mean over the other views of u_i . u_j / T, averaged over all V N rows.
    beta = 0: the debiased loss (Chuang et al. 2020, Eq. 8); with tau_plus = 0, too: NT-Xent.
    negatives: samples that are left out, in `same`.
    """
    if z.shape[0] < 2 or batch_count(z.shape[1], z) < 2:
        raise ValueError(f"HCL needs at least 2 views of 2 samples, got {tuple(z.shape)} (views, samples, width)")
    u, chosen = normalize(z), replace(negatives or Negatives(), tau_plus=tau_plus, beta=beta)
    return loss_mean(log_in_batch(u, temperature, chosen) - other_views(u).mean(0) / temperature)


class HCL(Method):
    """Contrastive Learning with Hard Negative Samples, arXiv 2010.04592; debiased: arXiv 2007.00224.

    temperature: T. tau_plus: probability that another sample is of the same class.
    beta: weight of hard negatives; 0 is the debiased loss.
    hidden_dim, out_dim: widths of the projection's hidden layer (None: that of the features) and of the projection.
    """

    views, negatives, mixed_keys = (2, None), ("drop-similar",), "other"
    _imagenet = {
        "source": "SimCLR's for a batch of 256; T, tau_plus and beta of the authors on smaller images",
        "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-4,
        "batch_size": 256, "epochs": 100, "schedule.warmup_epochs": 10}  # fmt: skip
    _hcl = {
        "source": "joshr17/HCL, image/main.py and README: STL-10 with ResNet-50, T 0.5, tau_plus 0.1, beta 1",
        "views.name": "simclr_cifar", "optimizer.name": "adam", "optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-6,
        "schedule.name": "constant", "schedule.warmup_epochs": 0, "schedule.scaling": "none", "batch_size": 256,
        "epochs": 400, "method.hidden_dim": 512}  # fmt: skip
    _debiased = _hcl | {"source": "chingyaoc/DCL, main.py: the same with beta 0", "epochs": 500, "method.beta": 0.0}
    _digits = {"source": "inbatch, embedded data", "method.temperature": 0.2}
    presets = {"imagenet": _imagenet, "cifar": _hcl, "hcl": _hcl, "debiased": _debiased, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, beta: float = 1.0,
                 hidden_dim: int | None = None, out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        Negatives(tau_plus=tau_plus, beta=beta)  # raises an error for values outside of their range
        self.temperature, self.tau_plus, self.beta = temperature, tau_plus, beta
        self.hidden_dim, self.out_dim = hidden_dim, out_dim

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(2, self.hidden_dim, width), self.out_dim))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        options = self.temperature, self.tau_plus, self.beta
        return {"loss": hcl(online["projection"], *options, self.negatives_of(batch))}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        chosen = replace(self.negatives_of(batch) or Negatives(), tau_plus=self.tau_plus, beta=self.beta)
        q, every = query["projection"], keys["projection"]
        return torch.stack([mixed_contrast(q, k, mixture, self.temperature, negatives=chosen) for k in every]).mean()
