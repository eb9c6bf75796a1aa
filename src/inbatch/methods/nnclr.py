"""NNCLR: the nearest neighbour of a view, among past samples, identifies the sample's other view in the batch."""

from itertools import permutations
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean, whole
from inbatch.nn.functional import nearest, normalize
from inbatch.nn.heads import Head, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.memory_bank import MemoryBank
from inbatch.nn.negatives import Negatives, log_across, log_in_batch

Contrast = Literal["one_way", "nt_xent"]


def neighbours(z: Float[Tensor, "n d"], support: Float[Tensor, "k d"], filled: Int[Tensor, ""]) -> Float[Tensor, "n d"]:
    """Return NN(z, Q): the nearest of the first `filled` unit rows of the support set; z's unit rows if it is empty."""
    z = normalize(z.detach())
    empty = torch.arange(len(support), device=z.device) >= filled
    place = nearest(z, support.to(z.dtype), leave_out=empty)[:, 0]
    return torch.where(filled > 0, support[place].to(z.dtype), z)


def nnclr(
    near: Float[Tensor, "n d"], p: Float[Tensor, "n d"], temperature: float = 0.1, contrast: Contrast = "one_way",
    negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Contrast of one view's neighbours with another view's predictions (Dwibedi et al. 2021, Eq. 3, Algorithm 1).

    l_i = -log( exp(near_i . p_i / T) / sum_k exp(near_i . p_k / T) ), averaged; rows are normalised inside, neighbours
    carry no gradient. contrast: "nt_xent" (lightly) is NT-Xent of the pair: both ways, with negatives of the same side.
    negatives: which samples are negatives, and how they count; None: all other samples alike.
    """
    if near.shape != p.shape or batch_count(len(p), p) < 2:
        raise ValueError(f"NNCLR needs a neighbour for each of 2 rows, got {tuple(near.shape)} and {tuple(p.shape)}")
    near, p = normalize(near.detach()), normalize(p)
    positive = loss_mean((near * p).sum(-1)) / temperature
    if contrast == "one_way":
        return loss_mean(log_across(near, p, temperature, negatives)) - positive
    return loss_mean(log_in_batch(torch.stack([near, p]), temperature, negatives)) - positive


class NNCLR(Method):
    """With a Little Help from My Friends, arXiv 2104.14548; the mean over the ordered pairs of different views.

    temperature: T. contrast: nt_xent is that of lightly. queue_size: samples in the support set, by view 0's
    projection.
    hidden_dim, pred_hidden_dim: widths of the hidden layers of projection and prediction. out_dim: width of the rows.
    """

    online = ("projection", "prediction")
    views, negatives = (2, None), ("drop-similar", "debias", "hard")
    _imagenet = {"source": "arXiv 2104.14548, section 4.1 (from memory; its authors have released no code)",
        "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-6,
        "batch_size": 4096, "epochs": 1000, "schedule.warmup_epochs": 10}  # fmt: skip
    _cifar = {"source": "second-hand: lightly's CIFAR-10 benchmark", "batch_size": 512, "schedule.warmup_epochs": 0,
        "views.name": "simclr_cifar", "optimizer.name": "sgd", "optimizer.lr": 0.12, "optimizer.weight_decay": 5e-4,
        "epochs": 200, "method.temperature": 0.5, "method.queue_size": 8192, "method.contrast": "nt_xent"}  # fmt: skip
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": {
        "source": "inbatch, embedded data", "method.temperature": 0.2, "method.queue_size": 2048,
        "method.hidden_dim": 256, "method.pred_hidden_dim": 256, "method.out_dim": 64}}  # fmt: skip
    own_rows = True

    def __init__(self, temperature: float = 0.1, queue_size: int = 98304, hidden_dim: int = 2048,
                 pred_hidden_dim: int = 4096, out_dim: int = 256, contrast: Contrast = "one_way") -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.hidden_dim, self.pred_hidden_dim = temperature, hidden_dim, pred_hidden_dim
        self.out_dim, self.contrast, self.queue = out_dim, contrast, MemoryBank(queue_size, out_dim)

    def heads(self, width: int) -> dict[str, Head]:
        projection = width, self.hidden_dim, self.hidden_dim, self.out_dim
        prediction = self.out_dim, self.pred_hidden_dim, self.out_dim
        return {"projection": Head(mlp(*projection, last="norm")), "prediction": Head(mlp(*prediction), "projection")}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        near = [neighbours(z, self.queue.rows, self.queue.filled) for z in online["projection"]]
        pairs = permutations(zip(near, online["prediction"], strict=True), 2)
        options = self.temperature, self.contrast, self.negatives_of(batch)
        return {"loss": torch.stack([nnclr(a[0], b[1], *options) for a, b in pairs]).mean()}

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.queue.push(normalize(whole(online["projection"][0])))
