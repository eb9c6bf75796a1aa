"""BYOL: a view predicts the target network's projection of its sample's other view; there are no negatives."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.functional import mean_other_views, normalize
from inbatch.nn.heads import Head, mlp
from inbatch.nn.schedules import cosine


def byol(
    p: Float[Tensor, "v n d"], t: Float[Tensor, "v n d"], scale: Literal["distance", "cosine"] = "distance"
) -> Float[Tensor, ""]:
    """Compute the regression of V views' predictions on the targets of the other views (Grill et al. 2020, Eq. 2).

    l = |p_1 - t_2|^2 + |p_2 - t_1|^2 of unit rows (symmetric), averaged over the samples: 0 to 8. With V > 2 it is
    twice the mean over ordered pairs of views. Rows are normalised inside, targets carry no gradient.
    scale: "cosine" is the mean of -cos(p_i, t_j), as in lightly: a quarter of l, minus 1.
    """
    if p.shape != t.shape or len(p) < 2 or not batch_count(p.shape[1], p):
        raise ValueError(f"BYOL needs 2 views with a target for every row, got {tuple(p.shape)} and {tuple(t.shape)}")
    cos = loss_mean((normalize(p) * mean_other_views(normalize(t.detach()))).sum(-1))
    return 4 - 4 * cos if scale == "distance" else -cos


class BYOL(Method):
    """Bootstrap Your Own Latent, arXiv 2006.07733.

    momentum: initial momentum of the target network; it rises to 1 along half a cosine.
    hidden_dim, out_dim: width of the hidden layer of projection and prediction, and of their rows.
    predictor: without it the projection itself is compared, and the projection collapses unless `norm` is on.
    norm: batch normalisation (no scale, no shift) after the last layer of the projection, as in MoCo v3: it removes
        what the rows of all samples have in common.
    scale: "cosine" is the convention of lightly, a quarter of the gradient.
    """

    online = ("prediction",)
    target = ("projection",)
    views, mixed_keys = (2, None), "other"
    presets = {
        "imagenet": {
            "source": "deepmind-research, byol/configs/byol.py, for 100 epochs (300: lr 0.3; 1000: lr 0.2, m 0.996)",
            "views.name": "byol", "optimizer.name": "lars", "optimizer.lr": 0.45, "optimizer.weight_decay": 1e-6,
            "batch_size": 4096, "epochs": 100, "schedule.warmup_epochs": 10, "method.momentum": 0.99,
        },
        "cifar": {
            "source": "second-hand: lightly's CIFAR-10 benchmark, lr 0.06 for 128 images, k-NN 86.8 % after 200 epochs",
            "views.name": "simclr_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4,
            "batch_size": 512, "epochs": 200, "schedule.warmup_epochs": 0, "method.momentum": 0.99,
            "method.hidden_dim": 1024,
            "method.scale": "cosine",
        },
        "digits": {
            "source": "inbatch, embedded data; docs/methods/byol.md explains norm",
            "method.momentum": 0.9, "method.hidden_dim": 256, "method.out_dim": 64, "method.norm": True},
    }  # fmt: skip
    own_rows = True

    def __init__(self, momentum: float = 0.996, hidden_dim: int = 4096, out_dim: int = 256, predictor: bool = True,
                 norm: bool = False, scale: Literal["distance", "cosine"] = "distance") -> None:  # fmt: skip
        super().__init__()
        self.momentum, self.hidden_dim, self.out_dim, self.predictor = momentum, hidden_dim, out_dim, predictor
        self.norm, self.scale = norm, scale

    def heads(self, width: int) -> dict[str, Head]:
        prediction = mlp(self.out_dim, self.hidden_dim, self.out_dim) if self.predictor else nn.Identity()
        return {
            "projection": Head(mlp(width, self.hidden_dim, self.out_dim, last="norm_plain" if self.norm else "linear")),
            "prediction": Head(prediction, source="projection", online_only=True),
        }

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": byol(online["prediction"], target["projection"], self.scale)}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        t = mixture.blend(normalize(keys["projection"].detach()).mean(0))
        cos = loss_mean((normalize(query["prediction"]) * t).sum(-1))
        return 4 - 4 * cos if self.scale == "distance" else -cos

    def target_momentum(self, progress: float) -> float:
        return cosine(progress, self.momentum, 1.0)
