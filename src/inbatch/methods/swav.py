"""SwAV: a view predicts the prototypes of its sample's other view; a batch uses all prototypes equally."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Mixture, Rows
from inbatch.errors import check_range
from inbatch.methods.base import Method, MixedKeys
from inbatch.nn.batch_sums import loss_mean, own_share, whole
from inbatch.nn.functional import cross_prediction, normalize, product, scale_by_temperature, sinkhorn
from inbatch.nn.heads import Head, Prototypes, mlp
from inbatch.nn.logsumexp import check_temperature
from inbatch.nn.memory_bank import MemoryBank


def swapped_prediction(scores: Float[Tensor, "v n k"], codes: Float[Tensor, "a n k"],
                       temperature: float = 0.1) -> Float[Tensor, ""]:  # fmt: skip
    """Cross-entropy of the first A views' codes with the soft-max of every other view (Caron et al. 2020, Eq. 2).

    scores: cosines of rows with prototypes; codes: `sinkhorn` of them. Averages the directions, which Eq. 1 adds.
    """
    return cross_prediction(codes.detach(), scale_by_temperature(scores, temperature))


class SwAV(Method):
    """Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, arXiv 2006.09882.

    temperature: of the prediction. epsilon: of the codes, small is sharp. iterations: of Sinkhorn's scaling.
    hidden_dim, out_dim: widths of the projection. num_prototypes: their number.
    freeze_prototypes_epochs: epochs before they learn. queue_start_epoch: epoch from which the queue is filled.
    queue_size: past samples assigned with the batch once it is full (0: none).
    """

    online, views, keys_learn = ("projection", "prototypes"), (2, None), False
    mixed_keys: MixedKeys | None = "other"
    mixed_if = "method.queue_size=0 and views.name=simclr (two views)"
    vectors: Tensor
    _imagenet = {"source": "swav, scripts/swav_800ep_pretrain.sh: lr 4.8 for 4096 images", "views.name": "swav",
        "optimizer.name": "lars", "optimizer.lr": 0.3, "optimizer.weight_decay": 1e-6, "batch_size": 4096,
        "epochs": 800, "schedule.warmup_epochs": 10, "schedule.end": 0.001}  # fmt: skip
    _cifar = {"source": "lightly, cifar10_benchmark.py: Adam 1e-3 for 128; small crops: inbatch",
        "views.name": "swav_cifar", "optimizer.name": "adam", "optimizer.lr": 2e-3, "optimizer.weight_decay": 1e-6,
        "batch_size": 128, "epochs": 200, "schedule.warmup_epochs": 0, "method.num_prototypes": 512,
        "method.hidden_dim": 512, "method.freeze_prototypes_epochs": 0}  # fmt: skip
    _digits = {"source": "inbatch, embedded data", "method.num_prototypes": 256, "method.out_dim": 32,
        "method.hidden_dim": 256, "method.temperature": 0.2, "method.epsilon": 0.01}  # fmt: skip
    presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
    own_rows = True

    def __init__(self, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3,
                 num_prototypes: int = 3000, freeze_prototypes_epochs: int = 1, queue_size: int = 0,
                 queue_start_epoch: int = 15, hidden_dim: int = 2048, out_dim: int = 128) -> None:  # fmt: skip
        super().__init__()
        check_temperature(temperature, epsilon)
        check_range(1, iterations=iterations)
        self.temperature, self.epsilon, self.iterations, self.hidden_dim = temperature, epsilon, iterations, hidden_dim
        self.freeze_prototypes_epochs, self.queue_start_epoch = freeze_prototypes_epochs, queue_start_epoch
        queue = {"queue_start_epoch": "the queue is filled"} if queue_size else {}
        self.later = {"freeze_prototypes_epochs": "the prototypes learn"} | queue
        self.register_buffer("vectors", torch.zeros(num_prototypes, out_dim))  # of the head, which a loss cannot reach
        self.queue = MemoryBank(queue_size, 2 * out_dim) if queue_size else None  # one row holds both views of a sample

    def prepare(self, *, views: int, **sizes: int) -> None:
        if self.queue is not None or views > 2:  # plain rows of both views, or small crops without codes
            self.mixed_keys = None

    def heads(self, width: int) -> dict[str, Head]:
        count, out = self.vectors.shape
        modules = nn.ModuleDict({"projection": mlp(width, self.hidden_dim, out), "prototypes": Prototypes(out, count)})
        self.on_weights(modules)
        return {"projection": Head(modules["projection"]), "prototypes": Head(modules["prototypes"], "projection")}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        scores = online["prototypes"]
        codes = sinkhorn(scores[:2], self.epsilon, self.iterations)
        if self.queue is not None and batch.epoch >= self.queue_start_epoch:
            past = torch.stack([product(rows, self.vectors.T) for rows in own_share(self.queue.rows).chunk(2, dim=1)])
            after = sinkhorn(torch.cat([past, scores[:2]], 1), self.epsilon, self.iterations)[:, past.shape[1] :]
            codes = torch.where(self.queue.filled == self.queue.size, after, codes)
        return {"loss": swapped_prediction(scores, codes, self.temperature)}

    def mixed_loss(self, query: Rows, keys: Rows, mixture: Mixture, batch: Batch) -> Tensor:
        codes = sinkhorn(keys["prototypes"], self.epsilon, self.iterations).mean(0)
        log = scale_by_temperature(query["prototypes"], mixture.temperature or self.temperature).log_softmax(-1)
        return -loss_mean((mixture.blend(codes) * log).sum(-1))

    def on_gradients(self, heads: nn.ModuleDict, batch: Batch, progress: float) -> None:
        if batch.epoch < self.freeze_prototypes_epochs:
            heads["prototypes"].zero_grad()

    def on_weights(self, heads: nn.ModuleDict) -> None:
        prototypes = heads["prototypes"]
        assert isinstance(prototypes, Prototypes)
        self.vectors.copy_(prototypes.restore())

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        if self.queue is not None and batch.epoch >= self.queue_start_epoch:
            self.queue.push(whole(torch.cat([*normalize(online["projection"][:2])], 1)))
