"""Linear probe: a linear classifier on features that were computed once.

The papers' presets keep their optimiser, learning rate, batch and length; what they cannot keep is the random
crop of every training image, because the features come from clean images.
"""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError
from inbatch.evaluate.embeddings import Embeddings, class_count, hits


@dataclass(frozen=True)
class Lbfgs:
    """Multinomial logistic regression on standardised features, full batch.

    Minimises the mean cross-entropy + |W|^2 / (2 C N): the objective of scikit-learn's LogisticRegression(C).
    """

    c: float = 1.0
    iterations: int = 200
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Sgd:
    """Minibatch SGD on the features as they are. The rate falls per epoch: cosine to 0, or by gamma at milestones.

    lr is multiplied by batch / 256 where `scaled`; a batch is never larger than the set. lars: layer-wise rates as in
    apex's LARC without clipping, far too small for sets that are not of ImageNet's size.
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
        """The factor of the learning rate in an epoch."""
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


def linear(
    train: Embeddings,
    test: Embeddings,
    probe: str | Lbfgs | Sgd = "lbfgs",
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """top1 and top5 in [0, 1] on the test features of a classifier trained on the training features, with the protocol.

    probe: a name in PROBES, or settings of one's own. Images without a label are left out. ConfigError for other names.
    """
    name = probe if isinstance(probe, str) else "custom"
    if isinstance(probe, str):
        if probe not in PROBES:
            raise ConfigError(f"there is no linear probe called {probe!r}: choose one of {', '.join(PROBES)}.")
        probe = PROBES[probe]
    train, test = train.labelled(), test.labelled()
    classes = class_count(train, test)
    x, y, query = train.vectors.to(device), train.labels.to(device), test.vectors.to(device)
    if isinstance(probe, Lbfgs):
        mean, std = x.mean(0), x.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        weight, bias, extra = _lbfgs((x - mean) / std, y, classes, probe)
        query, normalisation = (query - mean) / std, "standardised by the training features"
    else:
        weight, bias, extra = _sgd(x, y, classes, probe, seed)
        normalisation = "none"
    protocol = {"probe": name, **asdict(probe), **extra, "seed": seed, "classes": classes}
    return {**hits(F.linear(query, weight, bias), test.labels), **protocol, "normalisation": normalisation}


def _lbfgs(
    x: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, probe: Lbfgs
) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c"], dict[str, object]]:
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=probe.iterations,
        tolerance_grad=probe.tolerance,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + weight.square().sum() / (2 * probe.c * len(x))
        loss.backward()
        return loss

    optimiser.step(closure)
    gradient = max(p.grad.abs().max().item() for p in (weight, bias) if p.grad is not None)
    used = optimiser.state[weight]["n_iter"]
    return weight.detach(), bias.detach(), {"iterations_used": used, "largest_gradient": gradient}


def _sgd(
    x: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, probe: Sgd, seed: int
) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c"], dict[str, object]]:
    draw = torch.Generator().manual_seed(seed)
    weight = (0.01 * torch.randn(classes, x.shape[1], generator=draw)).to(x).requires_grad_()
    bias = x.new_zeros(classes, requires_grad=True)
    batch = min(probe.batch, len(x))
    lr = probe.lr * batch / 256 if probe.scaled else probe.lr
    optimiser = _optimiser([weight, bias], lr, probe)
    for epoch in range(probe.epochs):
        for group in optimiser.param_groups:
            group["lr"] = lr * probe.rate(epoch)
        for at in torch.randperm(len(x), generator=draw).to(x.device).split(batch):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(x[at], weight, bias), y[at]).backward()
            optimiser.step()
    return weight.detach(), bias.detach(), {"batch": batch, "lr_used": lr}


def _optimiser(parameters: list[Tensor], lr: float, probe: Sgd) -> torch.optim.Optimizer:
    if not probe.lars:
        return torch.optim.SGD(parameters, lr, probe.momentum, 0, probe.weight_decay, probe.nesterov)
    from timm.optim import Lars

    return Lars(parameters, lr, probe.momentum, 0, probe.weight_decay, trust_coeff=0.001, always_adapt=True)
