"""MoCo v1 and v2: each view identifies its other view, by the target network, among the keys of past batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import whole
from inbatch.nn.functional import info_nce, normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.memory_bank import MemoryBank
from inbatch.nn.mixed_contrast import mixed_contrast


class MoCo(Method):
    """Momentum Contrast, arXiv 1911.05722 (v1) and 2003.04297 (v2).

    temperature: T of `info_nce`. queue_size: keys in the memory bank. momentum: of the target network.
    layers, hidden_dim: linear layers of the projection (1 in v1, 2 in v2), width between them (None: that of features).
    out_dim: width of rows.
    symmetric: both views are queries and keys; the two losses are added, as in the authors' CIFAR-10 demo.
    smooth, neighbours: share of the target given to a query's nearest keys of the queue, and their number (Light-MoCo).
    """

    target, negatives, mixed_keys = ("projection",), ("drop-similar", "debias", "hard"), "other"
    _v1 = {
        "source": "moco, main_moco.py: lr 0.03 for 256 images, steps at 120 and 160 of 200 epochs",
        "views.name": "mocov1", "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4,
        "batch_size": 256, "epochs": 200, "schedule.name": "step", "schedule.warmup_epochs": 0}  # fmt: skip
    _v2 = _v1 | {
        "source": "moco, main_moco.py --mlp --moco-t 0.2 --aug-plus --cos", "views.name": "mocov2",
        "schedule.name": "cosine", "method.temperature": 0.2, "method.layers": 2}  # fmt: skip
    _cifar = {
        "source": "moco, colab/moco_cifar10_demo.ipynb: lr 0.06 for 512 images (SplitBatchNorm of 8: context=64)",
        "views.name": "moco_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 5e-4,
        "batch_size": 512, "epochs": 200, "schedule.warmup_epochs": 0,
        "method.temperature": 0.1, "method.queue_size": 4096, "method.momentum": 0.99}  # fmt: skip
    _ours = {"source": "inbatch, embedded data", "method.temperature": 0.2, "method.queue_size": 1024,
        "method.momentum": 0.99}  # fmt: skip
    _light = _v2 | {
        "source": "light-moco, moco/builder.py: hidden layer, both directions; share and keys are inbatch's",
        "method.hidden_dim": 2048, "method.symmetric": True, "method.smooth": 0.2}  # fmt: skip
    presets = {"imagenet": _v2, "v1": _v1, "v2": _v2, "light": _light, "cifar": _cifar, "digits": _ours}
    own_rows = True

    def __init__(self, temperature: float = 0.07, queue_size: int = 65536, momentum: float = 0.999, layers: int = 1,
                 hidden_dim: int | None = None, out_dim: int = 128, symmetric: bool = False, smooth: float = 0.0,
                 neighbours: int = 10) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        if not (0 <= smooth < 1 and (smooth == 0 or 1 <= neighbours <= queue_size)):
            raise ValueError(
                f"smooth {smooth:g} must be below 1 and neighbours {neighbours} from 1 to the queue's {queue_size}"
            )
        self.temperature, self.momentum, self.symmetric = temperature, momentum, symmetric
        self.layers, self.hidden_dim, self.out_dim = layers, hidden_dim, out_dim
        self.smooth, self.neighbours = smooth, neighbours
        self.queue = MemoryBank(queue_size, out_dim)

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(self.layers, self.hidden_dim, width)
        return {"projection": Head(mlp(width, *hidden, self.out_dim, norm=False))}

    def online_views(self, views: int) -> Sequence[int]:
        return (0, 1) if self.symmetric else (0,)

    def target_views(self, views: int) -> Sequence[int]:
        return (1, 0) if self.symmetric else (1,)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        how = self.queue.rows, self.temperature, self.smooth, self.neighbours, self.negatives_of(batch)
        pairs = zip(online["projection"], target["projection"], strict=True)
        return {"loss": torch.stack([info_nce(q, k, *how) for q, k in pairs]).sum()}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, every = query["projection"], keys["projection"].detach()
        how = self.temperature, self.queue.rows, self.smooth, self.neighbours, self.negatives_of(batch)
        losses = [mixed_contrast(q, k, mixture, *how) for k in every]
        return torch.stack(losses).mean() * (2 if self.symmetric else 1)

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        keys = target["projection"]
        tags = None if batch.bank is None else torch.cat([batch.bank.tags] * len(keys))
        self.queue.push(normalize(whole(keys, 1).flatten(0, 1)), tags)

    def negative_bank(self) -> MemoryBank:
        return self.queue
