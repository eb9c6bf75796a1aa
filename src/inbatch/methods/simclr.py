"""SimCLR: each view identifies the other view of its sample among all rows of the batch."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.functional import mean_other_views, normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.mixed_contrast import mixed_contrast
from inbatch.nn.negatives import Negatives, log_in_batch


def nt_xent(
    z: Float[Tensor, "v n d"], temperature: float = 0.1, views: Literal["mean", "sum"] = "mean",
    negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute NT-Xent of V views of N samples (Chen et al. 2020, Eq. 1), rows normalised inside.

    l_i = log sum_{k != i} exp(u_i . u_k / T) - mean over the sample's other views j of u_i . u_j / T,
    averaged over all V N rows. With V > 2, the log-probabilities of the positives are averaged, as in SupCon.
    views: "sum" adds the means of the views instead, as in google-research/simclr (V times the value).
    negatives: which samples are negatives, and how they count; None: all other samples alike.
    """
    if z.shape[0] < 2 or batch_count(z.shape[1], z) < 2:
        raise ValueError(f"NT-Xent needs at least 2 views of 2 samples, got {tuple(z.shape)} (views, samples, width)")
    u = normalize(z)
    positive = (u * mean_other_views(u)).sum(-1) / temperature
    loss = loss_mean(log_in_batch(u, temperature, negatives) - positive)
    return loss * len(u) if views == "sum" else loss


class SimCLR(Method):
    """A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709.

    temperature: T of Eq. 1.
    hidden_dim: width of the hidden layers of the projection; None is the width of the features.
    out_dim: width of the projection.
    layers: linear layers of the projection head.
    scale: "sum" doubles the loss, as in the authors' TensorFlow code.
    """

    views, negatives, mixed_keys = (2, None), ("drop-similar", "debias", "hard"), "other"
    presets = {
        "imagenet": {
            "source": "google-research/simclr, run.py and README: ResNet-50, 4096 images a batch",
            "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-4,
            "batch_size": 4096, "epochs": 100, "schedule.warmup_epochs": 10, "method.temperature": 0.1,
        },
        "cifar": {
            "source": 'the same README, CIFAR-10: ResNet-18, T 0.5, no blur, "around 91 %" after 1000 epochs',
            "views.name": "simclr_cifar", "optimizer.name": "lars", "optimizer.lr": 1.0, "optimizer.weight_decay": 1e-4,
            "batch_size": 512, "epochs": 1000, "schedule.warmup_epochs": 10, "method.temperature": 0.5,
        },
        "fast": {"source": "inbatch", "method.temperature": 0.2, "method.layers": 2, "method.hidden_dim": 512},
        "digits": {"source": "inbatch, embedded data", "method.temperature": 0.2},
    }  # fmt: skip
    own_rows = True

    def __init__(self, temperature: float = 0.1, hidden_dim: int | None = None, out_dim: int = 128, layers: int = 3,
                 scale: Literal["mean", "sum"] = "mean") -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.scale = temperature, scale
        self.hidden_dim, self.out_dim, self.layers = hidden_dim, out_dim, layers

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim, width)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, last="norm_scale"))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        options = self.temperature, self.scale, self.negatives_of(batch)
        return {"loss": nt_xent(online["projection"], *options)}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, every = query["projection"], keys["projection"]
        chosen = self.negatives_of(batch)
        losses = torch.stack([mixed_contrast(q, k, mixture, self.temperature, negatives=chosen) for k in every])
        return losses.mean() * (2 if self.scale == "sum" else 1)
