"""Relation: a student's similarities to the rows of a frozen teacher, in batch and queue, are those of the teacher."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean, whole
from inbatch.nn.functional import logsumexp_rows, normalize
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.memory_bank import MemoryBank


def relation(s: Float[Tensor, "m d"], t: Float[Tensor, "n d"], queue: Float[Tensor, "k d"], temperature: float = 0.04,
             teacher_temperature: float = 0.04, candidates: Literal["batch", "own"] = "batch",
             mixture: Mixture | None = None, center: Float[Tensor, "d"] | None = None
             ) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the cross-entropy of the student's similarities with the teacher's (SEED, Fang et al. 2021).

    With the teacher's rows r_j of batch and queue, and p_i = softmax_j(t_i . r_j / T'), the mean over i of
    l_i = -sum_j p_ij log softmax_j(s_i . r_j / T) = log sum_j exp(s_i . r_j / T) - s_i . c_i / T. Rows are normalised
    inside, only s carries gradient. c_i = sum_j p_ij r_j is T' times the gradient of the teacher's log-sum-exp, so that
    no matrix is held. candidates: "own" leaves out the other rows of the batch, as in the authors' code.
    mixture: s are rows of mixed images; the loss is that of their two samples i, by share.
    center: subtracted from the teacher's normalised rows, which are then normalised again.
    """
    if (mixture is None and s.shape != t.shape) or not batch_count(len(s), s):
        raise ValueError(f"every row needs a row of the teacher, got {tuple(s.shape)} and {tuple(t.shape)}")
    s, t = normalize(s), normalize(t.detach())
    bank = queue.to(s.dtype)
    if center is not None:
        t, bank = normalize(t - center), normalize(bank - center)
    keys = t if candidates == "batch" else None

    def log_sum(x: Tensor, own: Tensor, temperature: float) -> Tensor:
        sums = logsumexp_rows(x, keys, temperature, bank)
        return sums if candidates == "batch" else torch.logaddexp((x * own).sum(-1) / temperature, sums)

    with torch.enable_grad(), torch.autocast(t.device.type, enabled=False):  # of the products in the gradient, too
        leaf = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_sum(leaf, t, teacher_temperature).sum(), leaf)
    own, slope = (t, slope) if mixture is None else (t[mixture.positive], slope[mixture.positive])
    losses = log_sum(s, own, temperature) - (s * slope).sum(-1) * (teacher_temperature / temperature)
    return loss_mean(losses if mixture is None else mixture.shared(losses))


class Relation(Method):
    """SEED, arXiv 2101.04731, with the whole batch as candidates; for CompRess, arXiv 2010.14713, see the page.

    temperature, teacher_temperature: T and T'; if equal, the loss is least for the teacher's own similarities.
    queue_size: the teacher's rows from earlier batches. hidden_dim: width of the projection's hidden layer, by default
    that of the features. candidates: "batch" with all rows of the batch, "own" with the sample's own, as the authors.
    center: subtract the mean of the teacher's rows; pooled outputs of ReLU are all similar without it.
    """

    target, views, teacher, momentum, mixed_keys = ("features",), (1, None), True, 1.0, "same"
    _ours = {"source": "inbatch", "optimizer.name": "adamw", "optimizer.lr": 2e-3, "optimizer.weight_decay": 1e-4,
        "batch_size": 256, "epochs": 100, "schedule.warmup_epochs": 5, "schedule.scaling": "none"}  # fmt: skip
    _seed = {"source": "jacobswan1/SEED, its script and seed/builder.py", "views.name": "mocov2", "optimizer.lr": 0.03,
        "optimizer.name": "sgd", "optimizer.weight_decay": 1e-4, "batch_size": 256, "epochs": 200,
        "schedule.warmup_epochs": 0, "method.temperature": 0.2, "method.teacher_temperature": 1e-4,
        "method.queue_size": 65536, "method.candidates": "own", "method.center": False}  # fmt: skip
    presets = {"imagenet": _ours | {"views.name": "mocov2"}, "cifar": _ours, "seed": _seed}
    own_rows = True

    def __init__(self, temperature: float = 0.04, teacher_temperature: float = 0.04, queue_size: int = 4096,
                 hidden_dim: int | None = None, candidates: Literal["batch", "own"] = "batch",
                 center: bool = True) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, teacher_temperature)
        self.temperature, self.teacher_temperature, self.candidates = temperature, teacher_temperature, candidates
        self.hidden_dim, self.queue_size, self.center = hidden_dim, queue_size, center

    def prepare(self, **sizes: int) -> None:
        self.queue = MemoryBank(self.queue_size, self.teacher_width)

    def heads(self, width: int) -> dict[str, Head]:
        hidden = hidden_widths(2, self.hidden_dim, width)
        return {"projection": Head(mlp(width, *hidden, self.teacher_width, norm=False))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        how = self.queue.rows, self.temperature, self.teacher_temperature, self.candidates, None
        pairs = zip(online["projection"], target["features"], strict=True)
        return {"loss": torch.stack([relation(s, t, *how, self._center(t)) for s, t in pairs]).mean()}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        temperature, t = mixture.temperature or self.temperature, keys["features"][0]
        how = self.queue.rows, temperature, self.teacher_temperature, self.candidates, mixture
        return relation(query["projection"], t, *how, self._center(t))

    def _center(self, t: Tensor) -> Tensor | None:
        return self.queue.mean_with(normalize(t.detach())) if self.center else None

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.queue.push(normalize(whole(target["features"][0])))
