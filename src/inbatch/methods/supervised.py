"""Supervised: cross-entropy, the baseline that learns from labels alone."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.errors import check_range
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_sum, loss_sum
from inbatch.nn.functional import wide
from inbatch.nn.heads import Head, mlp


def cross_entropy(
    logits: Float[Tensor, "v n k"], label: Int[Tensor, "n"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the labelled samples over all views; 0 if no sample has a label (-1)."""
    label = label.expand(len(logits), -1)
    total = torch_cross_entropy(
        wide(logits).flatten(0, 1), label.flatten(), ignore_index=-1, label_smoothing=label_smoothing, reduction="sum"
    )
    return loss_sum(total) / batch_sum((label >= 0).sum()).clamp(min=1)


class Supervised(Method):
    """Cross-entropy on a linear classifier.

    num_classes: number of classes; None is that of the data.
    label_smoothing: label smoothing.
    """

    online = ("classifier",)
    views = (1, None)
    labels = True
    mixed_keys = "none"
    assigns = "classifier"
    presets = {
        "imagenet": {
            "source": "Goyal et al. 2017, arXiv 1706.02677: lr 0.1 for 256 images, 5 epochs of warm-up",
            "views.name": "supervised", "optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.weight_decay": 1e-4,
            "batch_size": 256, "epochs": 90, "schedule.warmup_epochs": 5,
        },
        "cifar": {
            "source": "SupContrast, main_ce.py and README: lr 0.8 for 1024 images, cosine",
            "views.name": "supervised", "views.min_scale": 0.2, "optimizer.name": "sgd", "optimizer.lr": 0.2,
            "optimizer.weight_decay": 1e-4, "batch_size": 1024, "epochs": 500, "schedule.warmup_epochs": 10,
        },
    }  # fmt: skip
    own_rows = True

    def __init__(self, num_classes: int | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_range(0, 1, label_smoothing=label_smoothing)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        self.num_classes = self.num_classes or classes
        if self.num_classes < classes:
            raise ValueError(
                f"method.num_classes = {self.num_classes}, but the data have {classes}: set {classes} or "
                "more, or leave it out"
            )

    def heads(self, width: int) -> dict[str, Head]:
        if not self.num_classes:
            raise ValueError("the number of classes is unknown: set method.num_classes")
        return {"classifier": Head(mlp(width, self.num_classes))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        logits = online["classifier"]
        hits = batch_sum((logits.argmax(-1) == batch.label).float().sum()) / len(logits)
        accuracy = hits / batch_sum((batch.label >= 0).sum()).clamp(min=1)
        return {"loss": cross_entropy(logits, batch.label, self.label_smoothing), "accuracy": accuracy}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        logits, labels = wide(query["classifier"]), batch.label[mixture.positive]
        how: dict[str, Any] = {"ignore_index": -1, "label_smoothing": self.label_smoothing, "reduction": "none"}
        each = torch.stack([torch_cross_entropy(logits, label, **how) for label in labels])
        labelled = batch_sum((mixture.weight * (labels >= 0)).sum())
        return loss_sum((mixture.weight * each).sum()) / labelled.masked_fill(labelled == 0, 1)
