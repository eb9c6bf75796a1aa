"""LeJEPA: views agree, and the rows of every view are normally distributed, as tested along random directions."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.functional import invariance
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.slicing import check_options, random_directions, sigreg


def lejepa(z: Float[Tensor, "v n d"], directions: Float[Tensor, "d k"], lamb: float = 0.02,
           global_views: int | None = None, samples: Literal["view", "all"] = "view",
           scale: Literal["count", "one"] = "count", weights: Literal["convex", "sum"] = "convex"
           ) -> Losses:  # fmt: skip
    """Return "loss" = lamb SIGReg + (1 - lamb) invariance (Balestriero and LeCun 2025), and its two terms.

    directions: see `inbatch.nn.slicing.random_directions`. samples, scale: see `inbatch.nn.slicing.sigreg`.
    global_views: see `invariance`. weights: with "sum", the invariance has weight 1, as in stable-pretraining.
    """
    away, test = invariance(z, global_views), sigreg(z, directions, samples, scale)
    return {"loss": lamb * test + (1 if weights == "sum" else 1 - lamb) * away, "invariance": away, "sigreg": test}


class LeJEPA(Method):
    """LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics, arXiv 2511.08544.

    lamb: weight of SIGReg. slices: number of directions, others in each step. samples: "view" tests each view's rows,
    "all" those of all views at once. scale: "one" omits the number of rows from the statistic. weights: "sum" gives the
    invariance weight 1, "convex" 1 - lamb. global_views: the first views, whose mean all views approach (None: all).
    hidden_dim, out_dim, layers: widths and number of linear layers of the projection.
    """

    views = (2, None)
    step: Tensor
    _minimal = {"source": "rbalestr-lab/lejepa, MINIMAL.md: Imagenette, ViT-S/8 at 128 pixels, 800 epochs",
        "encoder.name": "vit_small_patch8_224", "encoder.drop_path_rate": 0.1, "image_size": 128,
        "views.name": "simclr", "views.num_views": 4, "joint_norm": True, "optimizer.name": "adamw",
        "optimizer.lr": 2e-3, "optimizer.weight_decay": 0.05, "batch_size": 256, "epochs": 800,
        "schedule.warmup_epochs": 1, "schedule.end": 0.5, "schedule.scaling": "none"}  # fmt: skip
    _imagenet = {"source": "rbalestr-lab/lejepa, README: ResNet, 2 large and 6 small crops", "views.name": "dino",
        "views.cut": 0.3, "views.small_size": 98, "views.num_small_crops": 6, "optimizer.name": "adamw",
        "optimizer.lr": 5e-4, "optimizer.weight_decay": 5e-4, "schedule.scaling": "none", "schedule.end": 0.001,
        "method.slices": 1024, "method.global_views": 2}  # fmt: skip
    _vit = _imagenet | {"source": "the same README, ViT; small crops of 96 pixels, a multiple of the patches",
        "encoder.name": "vit_tiny_patch16_224", "encoder.dynamic_img_size": True, "views.small_size": 96,
        "optimizer.weight_decay": 0.05}  # fmt: skip
    _cifar = {"source": "inbatch: 4 views, as in MINIMAL.md, ResNet's weight decay of the README",
        "views.name": "simclr_cifar", "views.num_views": 4, "optimizer.name": "adamw", "optimizer.lr": 2e-3,
        "optimizer.weight_decay": 5e-4, "batch_size": 256, "epochs": 800, "schedule.warmup_epochs": 1,
        "schedule.end": 0.5, "schedule.scaling": "none"}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.hidden_dim": 256}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "minimal": _minimal, "vit": _vit, "digits": _digits}
    own_rows = True

    def __init__(self, lamb: float = 0.02, slices: int = 256, global_views: int | None = None,
                 samples: Literal["view", "all"] = "view", scale: Literal["count", "one"] = "count",
                 weights: Literal["convex", "sum"] = "convex", hidden_dim: int = 2048, out_dim: int = 16,
                 layers: int = 3) -> None:  # fmt: skip
        super().__init__()
        self.lamb, self.slices, self.global_views = lamb, slices, global_views
        self.samples, self.scale, self.weights = samples, scale, weights
        self.widths = [*hidden_widths(layers, hidden_dim), out_dim]
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        check_options(self.lamb, self.slices, self.global_views, views)

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *self.widths))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        directions = random_directions(z.shape[2], self.slices, self.step, batch.seed, z.device)
        return lejepa(z, directions, self.lamb, self.global_views, self.samples, self.scale, self.weights)

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.step += 1
