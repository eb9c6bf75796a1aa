"""PCL v1 and v2: MoCo, and each view also identifies its sample's prototypes at several granularities."""

from jaxtyping import Bool, Float
from torch import Tensor

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.methods.base import Method
from inbatch.nn.batch_sums import batch_count, loss_mean, whole
from inbatch.nn.clustering import Clusterings, Spread
from inbatch.nn.functional import info_nce, logsumexp_rows, normalize, wide
from inbatch.nn.heads import Head, hidden_widths, mlp
from inbatch.nn.memory_bank import MemoryBank
from inbatch.nn.mixed_contrast import mixed_contrast
from inbatch.nn.prototype_contrast import prototype_loss


def proto_nce(q: Float[Tensor, "n d"], columns: Float[Tensor, "c d"], density: Float[Tensor, "c"],
              counts: Bool[Tensor, "c"] | None = None) -> Float[Tensor, ""]:  # fmt: skip
    """Compute the prototype term of ProtoNCE for one clustering (Li et al. 2021, Eq. 11), all rows normalised inside.

    -log( exp(q_n . c_n / phi_n) / sum_j exp(q_n . c_j / phi_j) ), averaged; c_n is sample n's prototype, every other
    column a negative, also if equal. counts: False leaves a column out.
    """
    if not batch_count(len(q), q) or len(q) > len(columns):
        raise ValueError(f"ProtoNCE needs a prototype for every query, got {len(columns)} for {len(q)}")
    q, keys = normalize(q), normalize(columns).to(wide(q)) / density.to(wide(q))[:, None]
    own, others = keys.tensor_split([len(q)])
    if counts is not None:
        own, others = own[counts[: len(q)]], others[counts[len(q) :]]
    negative = logsumexp_rows(q, own, 1.0, others)
    return loss_mean(negative - (q * keys[: len(q)]).sum(-1))


class PCL(Method):
    """Prototypical Contrastive Learning of Unsupervised Representations, arXiv 2005.04966.

    temperature: T, and the mean of the prototypes'. queue_size: keys in the bank. momentum: of the target network.
    warmup_epochs: epochs of InfoNCE alone. num_clusters: in each clustering. negatives: most other prototypes.
    alpha: of phi (Eq 12). restarts, iterations: of k-means. layers: of the projection, 2 in v2. out_dim: width of rows.
    """

    target, negatives, mixed_keys, own_rows = ("projection",), ("drop-similar",), "other", True
    _v1 = {"source": "PCL, main_pcl.py", "views.name": "mocov1", "schedule.name": "step", "schedule.warmup_epochs": 0,
        "epochs": 200, "optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4}  # fmt: skip
    _v2 = _v1 | {"source": "PCL, main_pcl.py --mlp --aug-plus --cos", "views.name": "mocov2", "method.layers": 2,
        "schedule.name": "cosine"}  # fmt: skip
    _cifar = _v2 | {"source": "second-hand: salesforce/PCL issue 7, MoCo's demo", "views.name": "moco_cifar",
        "method.momentum": 0.99, "method.queue_size": 512, "method.num_clusters": (1000, 2000, 4000)}  # fmt: skip
    presets = {"imagenet": _v2, "v1": _v1, "v2": _v2, "cifar": _cifar, "digits": {"source": "inbatch, embedded data",
        "method.momentum": 0.99, "method.queue_size": 1024, "method.warmup_epochs": 5,
        "method.num_clusters": (25, 50, 100)}}  # fmt: skip

    def __init__(self, temperature: float = 0.2, queue_size: int = 16384, momentum: float = 0.999,
                 warmup_epochs: int = 20, num_clusters: tuple[int, ...] = (25000, 50000, 100000),
                 negatives: int = 16384, alpha: float = 10.0, restarts: int = 5, iterations: int = 20, layers: int = 1,
                 out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        self.temperature, self.momentum, self.warmup_epochs = temperature, momentum, warmup_epochs
        self.layers, self.out_dim, self.later = layers, out_dim, {"warmup_epochs": "its prototypes are used"}
        self.clusterings = Clusterings(num_clusters, out_dim, negatives, temperature, alpha, restarts, iterations)
        self.queue = MemoryBank(queue_size, out_dim)

    def prepare(self, *, images: int, classes: int, batch: int, views: int) -> None:
        self.clusterings.allocate(images)

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, *hidden_widths(self.layers, width), self.out_dim, norm=False))}

    def online_views(self, views: int) -> tuple[int]:
        return (0,)

    def target_views(self, views: int) -> tuple[int]:
        return (1,)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        q, chosen = online["projection"][0], self.negatives_of(batch)
        instance = info_nce(q, target["projection"][0], self.queue.rows, self.temperature, negatives=chosen)
        prototypes = prototype_loss(self.clusterings, proto_nce, q, batch)
        return {"loss": instance + prototypes, "instance": instance, "prototypes": prototypes}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        q, (k,), chosen = query["projection"], keys["projection"].detach(), self.negatives_of(batch)
        instance = mixed_contrast(q, k, mixture, self.temperature, self.queue.rows, negatives=chosen)
        return instance + prototype_loss(self.clusterings, proto_nce, q, batch, mixture)

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.queue.push(normalize(whole(target["projection"][0])), None if batch.bank is None else batch.bank.tags)

    def negative_bank(self) -> MemoryBank:
        return self.queue

    def surveys(self, epoch: int) -> bool:
        return epoch >= self.warmup_epochs

    def survey_clusterings(self) -> list[tuple[int, int, int]]:
        return self.clusterings.work

    def survey(self, rows: Rows, label: Tensor, epoch: int, spread: Spread) -> dict[str, float]:
        return self.clusterings.survey(rows["projection"], label, epoch, spread)
