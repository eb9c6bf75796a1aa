"""DINO: a view predicts the soft cluster of its sample's large views, by a centred and sharpened target network."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method, MixedKeys
from inbatch.nn.batch_sums import batch_mean, loss_mean
from inbatch.nn.functional import cross_prediction, koleo, scale_by_temperature, wide
from inbatch.nn.heads import Head, Prototypes, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.schedules import cosine, linear, progress


def dino(student: Float[Tensor, "v n k"], teacher: Float[Tensor, "a n k"], center: Float[Tensor, "k"],
         temperature: float = 0.1, teacher_temperature: float = 0.07) -> Float[Tensor, ""]:  # fmt: skip
    """Mean cross-entropy of softmax((t_i - center) / T_t), no grad, and softmax(s_j / T), i != j (paper, Eq. 3)."""
    p = scale_by_temperature(wide(teacher.detach()) - center, teacher_temperature).softmax(-1)
    return cross_prediction(p, scale_by_temperature(student, temperature))


class DINO(Method):
    """Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294.

    temperature: the student's. teacher_temperature, warmup_temperature: the teacher's final and initial one.
    warmup_epochs: from initial to final. momentum: the teacher's momentum, rising to 1. center_momentum: of the centre.
    num_prototypes: outputs. freeze_prototypes_epochs: epochs before outputs learn. hidden_dim, bottleneck_dim: widths.
    layers, norm: of the head. koleo_weight: of KoLeo of the features, added over the two large views.
    """

    online: tuple[str, ...] = ("prototypes",)
    target, views, later = ("prototypes",), (2, None), {"freeze_prototypes_epochs": "the last layer learns"}
    mixed_keys: MixedKeys | None = "other"
    mixed_if = "method.koleo_weight=0"
    center: Tensor
    _imagenet = {
        "source": "dino, README, ResNet-50: SGD 0.03 for 256 images, 8 GPUs of 64", "views.name": "dino",
        "views.cut": 0.14, "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4,
        "batch_size": 512, "epochs": 100, "schedule.warmup_epochs": 10, "method.teacher_temperature": 0.04}  # fmt: skip
    _cifar = {
        "source": "lightly, cifar10_benchmark.py: SGD 0.06 for 128 images, its m stays", "views.name": "byol_cifar",
        "views.min_scale": 0.4, "optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4,
        "batch_size": 128, "epochs": 200, "schedule.warmup_epochs": 0, "method.teacher_temperature": 0.04,
        "method.momentum": 0.99, "method.num_prototypes": 2048, "method.layers": 2, "method.norm": True,
        "method.freeze_prototypes_epochs": 0}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "views.num_views": 4, "method.temperature": 0.2,
        "method.teacher_temperature": 0.01, "method.warmup_epochs": 0, "method.num_prototypes": 256,
        "method.hidden_dim": 256, "method.bottleneck_dim": 32, "method.norm": True}  # fmt: skip
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.1, teacher_temperature: float = 0.07, warmup_temperature: float = 0.04,
                 warmup_epochs: int = 30, momentum: float = 0.996, center_momentum: float = 0.9,
                 num_prototypes: int = 65536, freeze_prototypes_epochs: int = 1, hidden_dim: int = 2048,
                 bottleneck_dim: int = 256, layers: int = 3, norm: bool = False, koleo_weight: float = 0.0
                 ) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, teacher_temperature, warmup_temperature)
        self.temperature, self.momentum, self.center_momentum = temperature, momentum, center_momentum
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self.warmup_epochs, self.teacher_temperatures = warmup_epochs, (warmup_temperature, teacher_temperature)
        self.bottleneck_dim, self.hidden_dim, self.norm = bottleneck_dim, hidden_widths(layers, hidden_dim), norm
        self.koleo_weight = koleo_weight
        if koleo_weight:  # of plain images: mixed ones would have no such term
            self.online, self.mixed_keys = ("prototypes", "features"), None
        self.register_buffer("center", torch.zeros(num_prototypes))

    def heads(self, width: int) -> dict[str, Head]:
        network = mlp(width, *self.hidden_dim, self.bottleneck_dim, norm=self.norm, activation=nn.GELU)
        last = Prototypes(self.bottleneck_dim, len(self.center), through=True)
        return {"projection": Head(network), "prototypes": Head(last, "projection")}

    def target_views(self, views: int) -> Sequence[int]:
        return (0, 1)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        heat = linear(progress(batch.epoch, self.warmup_epochs, "both"), *self.teacher_temperatures)
        loss = dino(online["prototypes"], target["prototypes"], self.center, self.temperature, heat)
        more = {"dino": loss, "koleo": koleo(online["features"][:2])} if self.koleo_weight else {}
        return {"loss": loss + self.koleo_weight * 2 * more["koleo"] if more else loss, **more}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        heat = linear(progress(batch.epoch, self.warmup_epochs, "both"), *self.teacher_temperatures)
        p = scale_by_temperature(wide(keys["prototypes"].detach()) - self.center, heat).softmax(-1).mean(0)
        log = scale_by_temperature(query["prototypes"], mixture.temperature or self.temperature).log_softmax(-1)
        return -loss_mean((mixture.blend(p) * log).sum(-1))

    def target_momentum(self, progress: float) -> float:
        return cosine(progress, self.momentum, 1.0)

    def on_gradients(self, heads: nn.ModuleDict, batch: Batch, progress: float) -> None:
        if batch.epoch < self.freeze_prototypes_epochs:
            heads["prototypes"].zero_grad()

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.center.lerp_(batch_mean(target["prototypes"].flatten(0, 1), 0).to(self.center), 1 - self.center_momentum)
