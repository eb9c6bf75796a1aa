"""Linear probe: a linear classifier on features that are computed once.

The presets of the papers keep their optimiser, learning rate, batch and length, but not the random crop of every
training image, because the features are those of clean images.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from inbatch.errors import ConfigError
from inbatch.evaluation.accuracy import hits
from inbatch.evaluation.embeddings import Embeddings, matched
from inbatch.evaluation.probe_presets import PROBES, Lbfgs, Sgd
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime.isolation import usual_numerics, usual_state

_SMALL = 2**26  # multiplications of a step that ends before a second thread has started its part


@dataclass(frozen=True)
class FittedProbe:
    """A fitted linear classifier: scores are W x + b of the vectors, standardised if there are a mean and a std.

    weight: (C, D). bias: (C,). mean, std: (D,). protocol: how it was fitted, in JSON types.
    """

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, "c"]
    mean: Float[Tensor, "d"] | None
    std: Float[Tensor, "d"] | None
    protocol: dict[str, object]

    @torch.no_grad()
    def scores(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Return the scores of every class, on the classifier's device."""
        query = vectors.to(self.weight.device)
        if self.mean is not None and self.std is not None:
            query = (query - self.mean) / self.std
        with fast_products():
            return F.linear(query, self.weight, self.bias)


@usual_state()
def linear_probe(
    train: Embeddings,
    test: Embeddings,
    probe: str | Lbfgs | Sgd = "lbfgs",
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """Return the figures of `hits` on the test features of a classifier trained on the training features.

    The result includes the protocol. Images without a label are left out.

    Args:
        train: training features.
        test: test features.
        probe: a name in PROBES, or custom settings.
        seed: seed of SGD.
        device: device of the training.

    Raises:
        ConfigError: for an unknown name.
    """
    train, test, classes = matched(train, test)
    fitted = fit(train, classes, probe, seed=seed, device=device)
    return {**hits(fitted.scores(test.vectors), test.labels, train.classes), **fitted.protocol}


@usual_numerics()
@torch.no_grad()
def fit(
    train: Embeddings,
    classes: int,
    probe: str | Lbfgs | Sgd = "lbfgs",
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> FittedProbe:
    """Return the classifier of a probe; labels of `train` are known and below `classes`. Raises as `linear_probe`."""
    name = probe if isinstance(probe, str) else "custom"
    if isinstance(probe, str):
        if probe not in PROBES:
            raise ConfigError(f"there is no linear probe called {probe!r}: choose one of {', '.join(PROBES)}.")
        probe = PROBES[probe]
    x, y = train.vectors.to(device), train.labels.to(device)
    mean = std = None
    with fast_products():
        if isinstance(probe, Lbfgs):
            mean = x.mean(0)
            x = x - mean
            std = (sum(rows.square().sum(0) for rows in x.split(4096)) / len(x)).sqrt()  # type: ignore[union-attr]
            std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)  # less is rounding error of constant features
            weight, bias, extra = _lbfgs(x.div_(std), y, classes, probe)
            normalisation = "standardised by the training features"
        else:
            weight, bias, extra = _sgd(x, y, classes, probe, seed)
            normalisation = "none"
    protocol = {"probe": name, **asdict(probe), **extra, "seed": seed, "classes": classes}
    return FittedProbe(weight, bias, mean, std, {**protocol, "normalisation": normalisation})


Fitted = tuple[Float[Tensor, "c d"], Float[Tensor, "c"], dict[str, object]]


def _lbfgs(x: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, probe: Lbfgs) -> Fitted:
    """Fit on standardised x. The search is over V, W = V / L, with L L^T the curvature of the objective at W = 0.

    In V the features are white, which shortens the search; the minimum is the same. The gradient is in closed form.
    Logits are (C, N): a softmax over the few rows is many times faster than along them.
    """
    n, width = x.shape
    decay = 1 / (probe.c * n)
    sample = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))[: 4 * width].to(x.device)]
    curvature = sample.T @ sample / (len(sample) * classes)
    curvature.diagonal().add_(decay)
    more = 1e-6 * curvature.trace()
    for _ in range(8):  # collapsed features are nearly of rank 1
        curvature.diagonal().add_(more)
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            break
        more = 10 * more
    searched = x.new_zeros(classes, width + 1)  # the last column is the bias
    searched.grad = slope = torch.zeros_like(searched)
    gradient, minus = torch.zeros_like(searched), x.new_full((1, n), -1)
    optimiser = torch.optim.LBFGS(
        [searched],
        max_iter=probe.iterations,
        tolerance_grad=probe.tolerance,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def parameters() -> tuple[Tensor, Tensor]:
        weight = torch.linalg.solve_triangular(factor, searched[:, :-1], upper=False, left=False)
        return weight, searched[:, -1] * classes**0.5

    @torch.no_grad()
    def closure() -> Tensor:
        weight, bias = parameters()
        logits = torch.addmm(bias[:, None], weight, x.T)
        total = logits.logsumexp(0)
        loss = (total - logits.gather(0, y[None])[0]).mean() + decay / 2 * weight.square().sum()
        error = logits.sub_(total).exp_().scatter_add_(0, y[None], minus)
        gradient[:, :-1] = torch.addmm(decay * weight, error, x, alpha=1 / n)
        gradient[:, -1] = error.mean(1)
        slope[:, :-1] = torch.linalg.solve_triangular(factor.T, gradient[:, :-1], upper=True, left=False)
        slope[:, -1] = gradient[:, -1] * classes**0.5
        return loss

    optimiser.step(closure)
    closure()  # the last evaluation of the line search may be at another point
    used = optimiser.state[searched]["n_iter"]
    return *parameters(), {"iterations_used": used, "largest_gradient": gradient.abs().max().item()}


@torch.no_grad()
def _sgd(x: Float[Tensor, "n d"], y: Int[Tensor, "n"], classes: int, probe: Sgd, seed: int) -> Fitted:
    """Fit by many small steps: the gradient is in closed form (softmax minus one-hot), in preallocated memory."""
    draw = torch.Generator().manual_seed(seed)
    weight = x.new_zeros(classes, x.shape[1] + 1)  # the last column is the bias
    weight[:, :-1] = 0.01 * torch.randn(classes, x.shape[1], generator=draw)
    gradient, change = torch.zeros_like(weight), torch.zeros_like(weight)
    batch = min(probe.batch, len(x))
    lr = probe.lr * batch / 256 if probe.scaled else probe.lr
    rows, minus = x.new_ones(batch, x.shape[1] + 1), x.new_full((1, batch), -1)
    with _threads(1 if batch * weight.numel() < _SMALL else torch.get_num_threads()):
        for epoch in range(probe.epochs):
            for at in torch.randperm(len(x), generator=draw).to(x.device).split(batch):
                part = rows[: len(at)]
                torch.index_select(x, 0, at, out=part[:, :-1])
                error = (weight @ part.T).softmax(0).scatter_add_(0, y[at][None], minus)
                torch.mm(error, part, out=gradient).div_(len(at))
                _step(weight, gradient, change, lr * probe.rate(epoch), probe)
    return weight[:, :-1], weight[:, -1], {"batch": batch, "lr_used": lr}


def _step(weight: Tensor, gradient: Tensor, change: Tensor, lr: float, probe: Sgd) -> None:
    """Do the step of torch.optim.SGD, in place; with LARS, weights and bias (the last column) have separate rates."""
    if probe.lars:
        for w, g in ((weight[:, :-1], gradient[:, :-1]), (weight[:, -1], gradient[:, -1])):
            length, slope = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
            trust = 0.001 * length / (slope + probe.weight_decay * length + 1e-8)
            g.add_(w, alpha=probe.weight_decay).mul_(torch.where((length > 0) & (slope > 0), trust, 1.0))
    elif probe.weight_decay:
        gradient.add_(weight, alpha=probe.weight_decay)
    change.mul_(probe.momentum).add_(gradient)
    weight.add_(gradient.add_(change, alpha=probe.momentum) if probe.nesterov else change, alpha=-lr)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
