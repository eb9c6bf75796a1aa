"""MoCo v3: each view identifies its other view, by the target network, among the batch's samples."""

from itertools import permutations

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
from inbatch.nn.negatives import Negatives, log_across
from inbatch.nn.schedules import cosine


def ctr(q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], temperature: float = 1.0,
        negatives: Negatives | None = None) -> Float[Tensor, ""]:  # fmt: skip
    """Compute in-batch contrast of one view's queries with another view's keys (Chen, Xie and He 2021, Algorithm 1).

    l_i = -2T log( exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T) ), averaged; rows are normalised inside, keys carry no
    gradient. Two views: ctr(q_1, k_2) + ctr(q_2, k_1); more: twice the mean over ordered pairs of views.
    negatives: whose keys are negatives, and how they count; None: those of all other samples alike.
    """
    if q.shape != k.shape or not batch_count(len(q), q):
        raise ValueError(f"MoCo v3 needs a key for every query, got queries {tuple(q.shape)}, keys {tuple(k.shape)}")
    q, k = normalize(q), normalize(k.detach())
    positive = (q * k).sum(-1) / temperature
    return 2 * temperature * loss_mean(log_across(q, k, temperature, negatives) - positive)


class MoCoV3(Method):
    """An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057.

    temperature: T of `ctr`. momentum: initial momentum of the target network; it rises to 1 along half a cosine.
    layers: linear layers of the projection: 2 for a ResNet, 3 for a ViT.
    hidden_dim, out_dim: width of the hidden layers of projection and prediction, and of their rows.
    last_norm: batch normalisation after the last layer of the prediction, too, as for a ViT.
    """

    online = ("prediction",)
    target = ("projection",)
    views, negatives, mixed_keys = (2, None), ("drop-similar", "debias", "hard"), "other"
    presets = {
        "imagenet": {
            "source": "moco-v3, CONFIG.md, ResNet-50, for 100 epochs (300: lr 0.3; 1000: lr 0.3, wd 1.5e-6, m 0.996)",
            "views.name": "byol", "views.min_scale": 0.2, "optimizer.name": "lars", "optimizer.lr": 0.6,
            "optimizer.weight_decay": 1e-6, "batch_size": 4096, "epochs": 100, "schedule.warmup_epochs": 10},
        "vit": {
            "source": "moco-v3, CONFIG.md, ViT-Small and -Base: --stop-grad-conv1 --moco-m-cos --moco-t=.2",
            "views.name": "byol", "optimizer.name": "adamw", "optimizer.lr": 1.5e-4, "optimizer.weight_decay": 0.1,
            "batch_size": 4096, "epochs": 300, "schedule.warmup_epochs": 40,
            "method.temperature": 0.2, "method.layers": 3, "method.last_norm": True},
        "cifar": {
            "source": "second-hand: solo-learn, cifar/mocov3.yaml; SGD as in lightly instead of its LARS",
            "views.name": "byol_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4,
            "batch_size": 256, "epochs": 1000, "schedule.warmup_epochs": 10, "method.temperature": 0.2},
        "digits": {
            "source": "inbatch, embedded data",
            "method.temperature": 0.2, "method.hidden_dim": 256, "method.out_dim": 64}}  # fmt: skip
    own_rows = True

    def __init__(self, temperature: float = 1.0, momentum: float = 0.99, layers: int = 2, hidden_dim: int = 4096,
                 out_dim: int = 256, last_norm: bool = False) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.momentum, self.layers = temperature, momentum, layers
        self.hidden_dim, self.out_dim, self.last_norm = hidden_dim, out_dim, last_norm

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim)
        prediction = mlp(self.out_dim, self.hidden_dim, self.out_dim, last="norm_plain" if self.last_norm else "linear")
        return {
            "projection": Head(mlp(width, *hidden, self.out_dim, last="norm_plain")),
            "prediction": Head(prediction, source="projection", online_only=True),
        }

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        q, k = online["prediction"], target["projection"]
        options = self.temperature, self.negatives_of(batch)
        losses = [ctr(q[i], k[j], *options) for i, j in permutations(range(len(q)), 2)]
        return {"loss": 2 * torch.stack(losses).mean()}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, every, t = query["prediction"], keys["projection"].detach(), mixture.temperature or self.temperature
        chosen = self.negatives_of(batch)
        return 4 * t * torch.stack([mixed_contrast(q, k, mixture, t, negatives=chosen) for k in every]).mean()

    def target_momentum(self, progress: float) -> float:
        return cosine(progress, self.momentum, 1.0)
