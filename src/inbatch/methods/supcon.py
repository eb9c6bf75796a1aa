"""SupCon: each view identifies all views of its class among all rows of the batch."""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method, MixedKeys
from inbatch.nn.batch_sums import batch_count, loss_mean, own_rows, positions
from inbatch.nn.functional import normalize, product, scale_by_temperature, sum_by_class
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.logsumexp import check_temperature, logsumexp
from inbatch.nn.mixed_contrast import mixed_supcon
from inbatch.nn.negatives import Negatives
from inbatch.nn.pair_weights import SameGroup


def supcon(
    z: Float[Tensor, "v n d"], label: Int[Tensor, "n"] | None = None, temperature: float = 0.07,
    base_temperature: float = 0.07, contrast_mode: Literal["all", "one"] = "all",
    mask: Shaped[Tensor, "n n"] | None = None, negatives: Negatives | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the supervised contrastive loss (Khosla et al. 2020, Eq. 2: the sum over positives outside the log).

    l_i = -(T / T_base) mean over positives p of log( exp(u_i . u_p / T) / sum_{a != i} exp(u_i . u_a / T) ),
    averaged over the anchors; 0 for an anchor without positive. Rows are normalised inside.
    label: positives share it (-1: unlabelled, a class of its own); without labels they are views of the same sample.
    mask: in place of labels, mask[i, j] != 0 if j is a positive of i. contrast_mode: rows of all views,
    or of view 0 ("one"). negatives: samples in one group of its `same` count only if they are positives.
    """
    u, (v, n, _) = normalize(z), z.shape
    if v * batch_count(n, z) < 2 or (label is not None and mask is not None):
        raise ValueError(f"SupCon needs at least 2 rows, and labels or a mask, not both: rows are {tuple(z.shape)}")
    if v < 2 and label is None and mask is None:
        raise ValueError("SupCon of one view has no positives without labels or a mask: pass one of them")
    weights = None
    if mask is None:  # rows of a class are summed, without a matrix of pairs
        alone = -1 - positions(n, z.device)
        ids = alone if label is None else label.where(label >= 0, alone)
        total, members = sum_by_class(u.sum(0), ids)
        itself, members = u.new_ones(n), v * members
        if negatives is not None and negatives.same is not None:
            repeats = (v if contrast_mode == "all" else 1, v)
            same, kinds = ([x.repeat(times) for times in repeats] for x in (negatives.same, ids))
            weights = SameGroup(same[0], same[1], 0.0, kinds[0], kinds[1])
    else:
        if own_rows():
            raise ValueError("a mask holds the pairs of the whole batch: pass gathered rows, or labels in its place")
        near = (mask != 0).to(u.dtype)
        total, itself, members = product(near, u.sum(0)), near.diagonal(), v * near.sum(1)
    count, every = members - itself, u.flatten(0, 1)
    a, rows = (u, every) if contrast_mode == "all" else (u[:1], u[0])
    positive = (a * (total - itself[:, None] * a)).sum(-1) / temperature
    total = logsumexp(rows, every, temperature, exclude_self=True, weights=weights).view_as(positive)
    total = total.masked_fill(total == -torch.inf, 0)  # of an anchor without any candidate, whose count is 0, too
    mean = (positive - count * total) / count.clamp(min=1)
    return -scale_by_temperature(loss_mean(mean), base_temperature / temperature)


class SupCon(Method):
    """Supervised Contrastive Learning, arXiv 2004.11362; learns from labels, if any.

    temperature: T. base_temperature: the loss is multiplied by T / T_base. contrast_mode: "one": rows of view 0 only.
    hidden_dim, out_dim: widths of the projection's hidden layer (None: that of the features) and of the projection.
    """

    views, labels, negatives, own_rows, mixed_if = (1, None), True, ("drop-similar",), True, "method.contrast_mode=all"
    mixed_keys: MixedKeys | None = "other"
    presets = {
        "imagenet": {
            "source": "arXiv 2004.11362, section 4: LARS and T 0.1; rate, decay and batch are SimCLR's",
            "views.name": "simclr", "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-4,
            "batch_size": 4096, "epochs": 350, "schedule.warmup_epochs": 10, "method.temperature": 0.1},
        "cifar": {
            "source": "SupContrast, README: lr 0.5 for 1024 images, cosine, T 0.1, 10 epochs of warm-up from 0.01",
            "views.name": "supcon", "optimizer.name": "sgd", "optimizer.lr": 0.125, "optimizer.weight_decay": 1e-4,
            "batch_size": 1024, "epochs": 1000, "schedule.warmup_epochs": 10, "method.temperature": 0.1},
        "digits": {"source": "inbatch, embedded data", "method.temperature": 0.1}}  # fmt: skip

    def __init__(self, temperature: float = 0.07, base_temperature: float = 0.07, hidden_dim: int | None = None,
                 out_dim: int = 128, contrast_mode: Literal["all", "one"] = "all") -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, base_temperature)
        self.temperature, self.base_temperature, self.contrast_mode = temperature, base_temperature, contrast_mode
        self.hidden_dim, self.out_dim = hidden_dim, out_dim
        self.mixed_keys = "other" if contrast_mode == "all" else None

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(2, self.hidden_dim, width), self.out_dim, norm=False))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        options = self.temperature, self.base_temperature, self.contrast_mode
        return {"loss": supcon(online["projection"], batch.label, *options, None, self.negatives_of(batch))}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        how = mixture, mixture.temperature or self.temperature, self.base_temperature, self.negatives_of(batch)
        return mixed_supcon(query["projection"], keys["projection"], batch.label, *how)
