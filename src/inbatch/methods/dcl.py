"""DCL: SimCLR without the positive pair in the denominator; DCLW: larger weights for distant positive pairs."""

from itertools import permutations

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_softmax, loss_mean
from inbatch.nn.functional import logsumexp_excluding_self, normalize, scale_by_temperature
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.mixed_contrast import mixed_dcl
from inbatch.nn.negatives import Negatives


def dcl(z: Float[Tensor, "v n d"], temperature: float = 0.1, sigma: float | None = None, symmetric: bool = True,
        detach: bool = False, negatives: Negatives | None = None) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the decoupled contrastive loss (Yeh et al. 2021, Eq. 6), rows normalised inside.

    l_i = -w_i u_i . v_i / T + log( sum_{k != i} exp(u_i . u_k / T) + sum_{k != i} exp(u_i . v_k / T) ), averaged over
    pairs of views u, v. sigma: None is DCL, w_i = 1; else DCLW (Eq. 7), w_i = 2 - N softmax_i(u_i . v_i / sigma).
    symmetric: all ordered pairs, else view 0 with every other. detach: no gradient through w.
    negatives: which samples count in the sum, and how; without any, the sum's logarithm is left out.
    """
    n = batch_count(z.shape[1], z)
    if z.shape[0] < 2 or n < 2:
        raise ValueError(f"DCL needs at least 2 views of 2 samples, got {tuple(z.shape)} (views, samples, width)")
    u = normalize(z)
    losses = []
    for i, j in permutations(range(len(u)), 2):
        if symmetric or i == 0:
            positive = (u[i] * u[j]).sum(-1)
            one = torch.ones_like(positive)
            weight = one if sigma is None else 2 - n * batch_softmax(scale_by_temperature(positive, sigma))
            if negatives is None:
                pairs = [logsumexp_excluding_self(u[i], temperature, *keys) for keys in ((), (u[j],))]
                negative = torch.logaddexp(*pairs)
            else:
                negative = negatives.log_sum(u[i, None], u[[i, j]], positive[None, None], temperature)[0]
                negative = negative.masked_fill(negative == -torch.inf, 0)
            losses.append(loss_mean(negative - (weight.detach() if detach else weight) * positive / temperature))
    return torch.stack(losses).mean()


class DCL(Method):
    """Decoupled Contrastive Learning, arXiv 2110.06848.

    temperature: T. weighted: use DCLW. sigma: of the weights of DCLW. detach: the weights of DCLW carry no gradient.
    symmetric: average both directions of a pair of views, else only view 0 has the others as positives.
    hidden_dim, out_dim: widths of the projection's hidden layer (None: that of the features) and of the projection.
    """

    views, negatives, mixed_keys = (2, None), ("drop-similar", "debias", "hard"), "other"
    _imagenet = {
        "source": "SimCLR's, with the batch and the length of arXiv 2110.06848; no code of its authors was found",
        "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-4,
        "batch_size": 256, "epochs": 200, "schedule.warmup_epochs": 10}  # fmt: skip
    _cifar = {
        "source": "raminnakhli/Decoupled-Contrastive-Learning, run_simclr.sh, README: Adam 1e-3, no schedule",
        "views.name": "simclr_cifar", "optimizer.name": "adam", "optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-6,
        "schedule.name": "constant", "schedule.warmup_epochs": 0, "schedule.scaling": "none", "batch_size": 128,
        "epochs": 100,
    }  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.temperature": 0.2}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.1, weighted: bool = False, sigma: float = 0.5, symmetric: bool = True,
                 detach: bool = False, hidden_dim: int | None = None, out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, sigma)
        self.temperature, self.sigma = temperature, sigma if weighted else None
        self.symmetric, self.detach, self.hidden_dim, self.out_dim = symmetric, detach, hidden_dim, out_dim

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(2, self.hidden_dim, width), self.out_dim))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        options = self.temperature, self.sigma, self.symmetric, self.detach, self.negatives_of(batch)
        return {"loss": dcl(online["projection"], *options)}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, how = query["projection"], (mixture.temperature or self.temperature, self.sigma, self.detach)
        chosen = self.negatives_of(batch)
        return torch.stack([mixed_dcl(q, k, mixture, *how, chosen) for k in keys["projection"]]).mean()
