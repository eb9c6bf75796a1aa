"""Contrastive Clustering: contrast of samples (rows) and of clusters (columns) of the same batch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean, replicated, whole
from inbatch.nn.functional import mean_other_views, normalize, wide
from inbatch.nn.heads import Head, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.negatives import Negatives, log_in_batch


def contrast(x: Float[Tensor, "v n d"], temperature: float, negatives: Negatives | None = None) -> Float[Tensor, ""]:
    """Return -log( exp(u_i . u'_i / T) / sum_{k != i} exp(u_i . u_k / T) ), averaged over all V N normalised vectors.

    Li et al. 2021: Eq. 2 and 3 for samples, Eq. 5 for clusters. Also averaged over the V - 1 positives of each.
    negatives: which vectors are negatives, and how they count; None: all others alike.
    """
    if x.shape[0] < 2 or batch_count(x.shape[1], x) < 2:
        raise ValueError(f"Contrastive Clustering needs 2 views of 2 samples or clusters, got {len(x)} of {x.shape[1]}")
    u = normalize(x)
    positive = (u * mean_other_views(u)).sum(-1) / temperature
    return loss_mean(log_in_batch(u, temperature, negatives) - positive)


def cluster_contrast(p: Float[Tensor, "v n k"], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the contrast of the columns of soft assignments, and the lack of entropy of the cluster sizes (Eq. 6).

    The second is log K + sum_k m_k log m_k, with m the clusters' shares of a view, added over two views (twice the
    mean over V): 0 if all are equal, 2 log K if one cluster has everything.
    """
    p = whole(wide(p), 1)  # few columns, which are compared along all samples
    share = p.sum(1) / p.sum((1, 2))[:, None]
    uneven = math.log(p.shape[2]) + torch.xlogy(share, share.clamp(min=torch.finfo(p.dtype).tiny)).sum(1)
    with replicated():
        return contrast(p.transpose(1, 2), temperature), 2 * uneven.mean()


class CC(Method):
    """Contrastive Clustering, arXiv 2009.09687.

    num_clusters: number of clusters; None is the number of classes of the data.
    temperature, cluster_temperature: T among samples, among clusters.
    out_dim: width of the projection.
    entropy_weight: weight of the lack of entropy of the cluster sizes (Eq. 6); more spreads samples over all clusters.
    """

    online = ("projection", "clusters")
    views, negatives = (2, None), ("drop-similar", "debias", "hard")
    assigns = "clusters"
    _adam = {
        "optimizer.name": "adam", "optimizer.lr": 3e-4, "optimizer.weight_decay": 0.0, "schedule.name": "constant",
        "schedule.warmup_epochs": 0, "schedule.scaling": "none", "batch_size": 256, "epochs": 1000,
        "views.name": "cc"}  # fmt: skip
    _cifar = _adam | {"source": "cifar224 for images at their size; the size and ResNet-18 are inbatch's"}
    _224 = _adam | {"source": "Contrastive-Clustering, config.yaml and train.py for CIFAR-10: images enlarged to 224",
        "image_size": 224, "encoder.name": "resnet34"}  # fmt: skip
    _imagenet = _224 | {"source": "the same for ImageNet-10", "views.strength": 1.0, "views.blur": 0.5}
    presets = {"imagenet": _imagenet, "cifar": _cifar, "cifar224": _224}
    own_rows = True

    def __init__(self, num_clusters: int | None = None, temperature: float = 0.5, cluster_temperature: float = 1.0,
                 out_dim: int = 128, entropy_weight: float = 1.0) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= entropy_weight < math.inf:
            raise ValueError(f"entropy_weight {entropy_weight} must be finite and at least 0")
        check_temperature(temperature, cluster_temperature)
        self.num_clusters, self.out_dim = num_clusters, out_dim
        self.temperature, self.cluster_temperature = temperature, cluster_temperature
        self.entropy_weight = entropy_weight

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        self.num_clusters = self.num_clusters or classes

    def heads(self, width: int) -> dict[str, Head]:
        if not self.num_clusters or self.num_clusters < 2:
            raise ValueError("without labels, the number of clusters is unknown: set method.num_clusters to 2 or more")
        ends = {"projection": self.out_dim, "clusters": self.num_clusters}
        return {name: Head(mlp(width, width, end, norm=False)) for name, end in ends.items()}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        instance = contrast(online["projection"], self.temperature, self.negatives_of(batch))
        cluster, entropy = cluster_contrast(wide(online["clusters"]).softmax(-1), self.cluster_temperature)
        loss = instance + cluster + self.entropy_weight * entropy
        return {"loss": loss, "instance": instance, "cluster": cluster, "entropy": entropy}
