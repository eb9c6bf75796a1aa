"""MoCo v1 and v2: a view finds its other view, seen by a slow copy, among the keys of past batches."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.functional import logsumexp_rows, normalize
from inbatch.heads import Head, mlp
from inbatch.memory import Queue
from inbatch.methods.base import Method


def info_nce(
    q: Float[Tensor, "n d"], k: Float[Tensor, "n d"], queue: Float[Tensor, "m d"], temperature: float = 0.07
) -> Float[Tensor, ""]:
    """InfoNCE of queries against their own key and a queue of unit rows (He et al. 2020, Eq. 1).

    l_i = -log( exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T)) ), averaged; queries and
    keys are normalised inside, keys carry no gradient.
    """
    if q.shape != k.shape or not len(q):
        raise ValueError(f"InfoNCE needs a key for every query, got queries {tuple(q.shape)}, keys {tuple(k.shape)}")
    q, k = normalize(q), normalize(k.detach())
    positive = (q * k).sum(-1) / temperature
    return (torch.logaddexp(positive, logsumexp_rows(q, queue.to(q.dtype), temperature)) - positive).mean()


class MoCo(Method):
    """Momentum Contrast, arXiv 1911.05722 (v1) and 2003.04297 (v2).

    temperature: T of Eq. 1.
    queue: keys remembered.
    m: momentum of the target tower.
    layers: linear layers in the projection: 1 in v1, 2 in v2.
    hidden: width between them; None is the features'.
    out: width of the rows that are compared.
    symmetric: both views are queries and keys; the two losses are added, as in the authors' CIFAR-10 demo.
    """

    target = ("projection",)
    _v1 = {
        "source": "moco, main_moco.py: lr 0.03 for 256 images, steps at 120 and 160 of 200 epochs",
        "views.name": "mocov1", "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4,
        "batch": 256, "epochs": 200, "schedule.name": "step", "schedule.warmup": 0,
    }  # fmt: skip
    _v2 = _v1 | {
        "source": "moco, main_moco.py --mlp --moco-t 0.2 --aug-plus --cos",
        "views.name": "mocov2", "schedule.name": "cosine", "method.temperature": 0.2, "method.layers": 2,
    }  # fmt: skip
    _cifar = {
        "source": "moco, colab/moco_cifar10_demo.ipynb: lr 0.06 for 512 images (SplitBatchNorm of 8: context=64)",
        "views.name": "moco_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 5e-4,
        "batch": 512, "epochs": 200, "schedule.warmup": 0,
        "method.temperature": 0.1, "method.queue": 4096, "method.m": 0.99,
    }  # fmt: skip
    _digits = {
        "source": "ours, for the embedded data",
        "method.temperature": 0.2, "method.queue": 1024, "method.m": 0.99,
    }  # fmt: skip
    presets = {"imagenet": _v2, "v1": _v1, "v2": _v2, "cifar": _cifar, "digits": _digits}

    def __init__(
        self, temperature: float = 0.07, queue: int = 65536, m: float = 0.999, layers: int = 1,
        hidden: int | None = None, out: int = 128, symmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature, self.m, self.symmetric = temperature, m, symmetric
        self.layers, self.hidden, self.out = layers, hidden, out
        self.queue = Queue(queue, out)

    def heads(self, width: int) -> dict[str, Head]:
        hidden = [self.hidden or width] * (self.layers - 1)
        return {"projection": Head(mlp(width, *hidden, self.out, norm=False))}

    def online_views(self, views: int) -> Sequence[int]:
        return (0, 1) if self.symmetric else (0,)

    def target_views(self, views: int) -> Sequence[int]:
        return (1, 0) if self.symmetric else (1,)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        pairs = zip(online["projection"], target["projection"], strict=True)
        losses = [info_nce(q, k, self.queue.rows, self.temperature) for q, k in pairs]
        return {"loss": torch.stack(losses).sum()}

    def momentum(self, progress: float) -> float:
        return self.m

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.queue.push(normalize(target["projection"].flatten(0, 1)))
