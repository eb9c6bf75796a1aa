"""Training of a linear probe: the default, and settings of the papers by name."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Lbfgs:
    """Multinomial logistic regression on standardised features, full batch.

    Minimises the mean cross-entropy + |W|^2 / (2 C N): the objective of scikit-learn's LogisticRegression(C). Of two
    classes, each has weights, while scikit-learn has those of one: it is the objective of LogisticRegression(2 C).

    Attributes:
        c: C.
        iterations: maximum number of iterations.
        tolerance: largest gradient at which it ends, measured in the whitened features of the search.
    """

    c: float = 1.0
    iterations: int = 200
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Sgd:
    """Minibatch SGD on the unnormalised features. The rate falls per epoch: cosine to 0, or by gamma at milestones.

    If `scaled`, lr is multiplied by batch / 256; a batch is never larger than the set. lars: layer-wise rates as in
    apex's LARC without clipping, far too small for sets that are smaller than ImageNet.
    """

    lr: float
    batch: int = 256
    epochs: int = 100
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    scaled: bool = False
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    lars: bool = False  # has no Nesterov momentum

    def rate(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch."""
        if self.milestones:
            return self.gamma ** sum(epoch >= m for m in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


PROBES: dict[str, Lbfgs | Sgd] = {
    "lbfgs": Lbfgs(),
    "moco": Sgd(lr=30.0, milestones=(60, 80)),
    "simclr": Sgd(lr=0.1, scaled=True, batch=4096, epochs=90, weight_decay=1e-6, nesterov=True),
    "supcon": Sgd(lr=5.0, batch=512, milestones=(60, 75, 90), gamma=0.2),
    "swav": Sgd(lr=0.3, weight_decay=1e-6),
    "barlow": Sgd(lr=0.3, weight_decay=1e-6),
    "vicreg": Sgd(lr=0.02, weight_decay=1e-6),
    "simsiam": Sgd(lr=0.1, scaled=True, batch=4096, epochs=90, lars=True),
    "mocov3": Sgd(lr=0.1, scaled=True, batch=1024, epochs=90),
}
