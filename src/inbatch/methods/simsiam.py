"""SimSiam: a view predicts its sample's other view, which carries no gradient; there are no negatives."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean
from inbatch.nn.functional import mean_other_views, normalize, wide
from inbatch.nn.heads import Head, hidden_widths, mlp

Teach = Literal["each", "mean"]


def simsiam(
    p: Float[Tensor, "v n d"], z: Float[Tensor, "v n d"], stop_gradient: bool = True, targets: Teach = "each"
) -> Float[Tensor, ""]:
    """Return the mean of -cos(p_i, z_j) over the ordered pairs of different views (Chen and He 2021, Eq. 4): -1 to 1.

    Rows are normalised inside, projections z carry no gradient.
    stop_gradient: False gives z a gradient, too (the paper's Eq. 2).
    targets: "mean" compares p_i with the mean of the other views' z_j (FastSiam); the same with two views.
    """
    if p.shape != z.shape or len(p) < 2 or not batch_count(p.shape[1], p):
        raise ValueError(f"SimSiam needs 2 views, projected and predicted, got {tuple(z.shape)} and {tuple(p.shape)}")
    z = wide(z.detach() if stop_gradient else z)
    target_rows = mean_other_views(normalize(z)) if targets == "each" else normalize(mean_other_views(z))
    return -loss_mean((normalize(p) * target_rows).sum(-1))


class SimSiam(Method):
    """Exploring Simple Siamese Representation Learning, arXiv 2011.10566.

    layers, hidden_dim, out_dim: linear layers of the projection, width between them, and width of the projection.
    bottleneck_dim: width of the prediction's hidden layer.
    fix_pred_lr: constant learning rate of the prediction, as the authors' --fix-pred-lr.
    predictor, stop_gradient: the ablations of the paper (sections 4.2 and 4.1), in which it does not learn.
    targets: "mean" is FastSiam, designed for four views.
    """

    online = ("prediction", "projection")
    views, mixed_keys = (2, None), "other"
    presets = {
        "imagenet": {
            "source": "simsiam, main_simsiam.py --fix-pred-lr: lr 0.05 for 256 images",
            "views.name": "mocov2", "optimizer.name": "sgd", "optimizer.lr": 0.05, "optimizer.weight_decay": 1e-4,
            "batch_size": 512, "epochs": 100, "schedule.warmup_epochs": 0,
        },
        "cifar": {
            "source": "arXiv 2011.10566, appendix D: ResNet-18, lr 0.03 for 256 images, no blur; linear 91.8 %",
            "views.name": "moco_cifar", "views.min_scale": 0.2, "optimizer.name": "sgd", "optimizer.lr": 0.03,
            "optimizer.weight_decay": 5e-4, "batch_size": 512, "epochs": 800, "schedule.warmup_epochs": 0,
            "method.layers": 2,
        },
        "digits": {
            "source": "inbatch, embedded data",
            "method.layers": 2, "method.hidden_dim": 256, "method.out_dim": 256,
            "method.bottleneck_dim": 128}}  # fmt: skip
    own_rows = True

    def __init__(self, layers: int = 3, hidden_dim: int = 2048, out_dim: int = 2048, bottleneck_dim: int = 512,
                 fix_pred_lr: bool = True, predictor: bool = True, stop_gradient: bool = True, targets: Teach = "each"
                 ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.hidden_dim, self.out_dim, self.bottleneck_dim = layers, hidden_dim, out_dim, bottleneck_dim
        self.fix_pred_lr, self.predictor = fix_pred_lr, predictor
        self.stop_gradient, self.targets = stop_gradient, targets
        self.keys_learn = not stop_gradient

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim)
        prediction = mlp(self.out_dim, self.bottleneck_dim, self.out_dim) if self.predictor else nn.Identity()
        return {
            "projection": Head(mlp(width, *hidden, self.out_dim, last="norm_plain")),
            "prediction": Head(prediction, source="projection"),
        }

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": simsiam(online["prediction"], online["projection"], self.stop_gradient, self.targets)}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        z = wide(keys["projection"].detach() if self.stop_gradient else keys["projection"])
        z = normalize(z).mean(0) if self.targets == "each" else normalize(z.mean(0))
        return -loss_mean((normalize(query["prediction"]) * mixture.blend(z)).sum(-1))

    def constant_lr(self) -> Sequence[str]:
        return ("prediction",) if self.fix_pred_lr else ()
