"""Sigmoid: every pair of rows of two views is classified by itself, as one sample or two."""

from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, batch_mean, loss_sum
from inbatch.nn.functional import normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.pair_weights import SameGroup
from inbatch.nn.sigmoid_sums import sigmoid_sum


def pairwise_sigmoid(
    z: Float[Tensor, "v n d"], scale: float | Tensor = 10.0, bias: float | Tensor = -10.0,
    group: Int[Tensor, "n"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the pairwise sigmoid loss (SigLIP, Zhai et al. 2023, Section 3.2), rows normalised inside.

    -(1/N) sum_ij log sigmoid(y_ij (t u_i . u'_j + b)) with y = 1 for rows of one sample (or of one group) and -1 for
    others; with V > 2, the mean over pairs of views. scale and bias are t and b, numbers or one per row (V, N): those
    of the first view of a pair are used.
    """
    if z.shape[0] < 2 or not batch_count(z.shape[1], z):
        raise ValueError(f"the sigmoid loss needs at least 2 views of a sample, got {tuple(z.shape)}")
    u = normalize(z)
    t, b = (torch.as_tensor(x, dtype=u.dtype, device=u.device).expand(u.shape[:2]) for x in (scale, bias))
    groups = None if group is None else SameGroup(group, group)
    sums = [sigmoid_sum(u[i] * t[i, :, None], u[j], b[i], groups) for i, j in combinations(range(len(u)), 2)]
    return torch.stack(sums).mean() / batch_count(u.shape[1], u)


def mixed_sigmoid(
    q: Float[Tensor, "m d"], k: Float[Tensor, "n d"], mixture: Mixture, scale: Float[Tensor, "m"],
    bias: Float[Tensor, "m"],
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute it for rows of mixed images, whose share in a sample is the label of their pair; rows normalised inside.

    The cross-entropy of a logit x and a label w is log(1 + exp(x)) - w x.
    """
    q, k = normalize(q) * scale[:, None], normalize(k)
    none = SameGroup(torch.zeros_like(mixture.positive[0]), torch.ones(len(k), dtype=torch.long, device=k.device))
    labelled = loss_sum((q * mixture.blend(k)).sum() + bias.sum())
    return (sigmoid_sum(q, k, bias, none) - labelled) / batch_count(len(q), q)


class ScaledRows(nn.Module):
    """Rows followed by their scale exp(t') and bias b: (N, D) -> (N, D + 2)."""

    def __init__(self, scale: float, bias: float) -> None:
        super().__init__()
        self.log_scale, self.bias = nn.Parameter(torch.tensor(scale).log()), nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.stack([self.log_scale.exp(), self.bias]).expand(len(x), 2)], 1)


class Sigmoid(Method):
    """Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, between views of images.

    scale, bias: t and b at the start; both learn, in the head "scaled". hidden_dim: width of the projection's hidden
        layers, by default that of the features. out_dim: width of its output. layers: its linear layers.
    """

    online = ("scaled",)
    views, mixed_keys = (2, None), "other"
    _coco = {"source": "google-research/big_vision, COCO: rate, decay, batch", "batch_size": 512, "optimizer.lr": 1e-3,
        "optimizer.name": "adamw", "optimizer.weight_decay": 0.01, "schedule.scaling": "none"}  # fmt: skip
    presets = {
        "imagenet": _coco | {"views.name": "simclr", "epochs": 100, "schedule.warmup_epochs": 10},
        "cifar": _coco | {"views.name": "simclr_cifar", "epochs": 500, "schedule.warmup_epochs": 10},
        "digits": {"source": "inbatch, embedded data", "method.layers": 2},
    }
    own_rows = True

    def __init__(self, scale: float = 10.0, bias: float = -10.0, hidden_dim: int | None = None, out_dim: int = 128,
                 layers: int = 3) -> None:  # fmt: skip
        super().__init__()
        if not 0 < scale < float("inf") or not abs(bias) < float("inf"):
            raise ValueError(f"scale {scale:g} must be finite and above 0, and bias {bias:g} finite")
        self.scale, self.bias = scale, bias
        self.hidden_dim, self.out_dim, self.layers = hidden_dim, out_dim, layers

    def heads(self, width: int) -> dict[str, Head]:
        projection = mlp(width, *hidden_widths(self.layers, self.hidden_dim, width), self.out_dim, last="norm_scale")
        return {"projection": Head(projection), "scaled": Head(ScaledRows(self.scale, self.bias), "projection")}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z, t, b = online["scaled"].tensor_split((-2, -1), -1)
        loss = pairwise_sigmoid(z, t[..., 0], b[..., 0])
        return {"loss": loss, "scale": batch_mean(t.detach()), "bias": batch_mean(b.detach())}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        (z, t, b), every = query["scaled"].tensor_split((-2, -1), -1), keys["scaled"][..., :-2]
        return torch.stack([mixed_sigmoid(z, k, mixture, t[:, 0], b[:, 0]) for k in every]).mean()
