"""A small experiment with a method: networks and batches of noise in float64, and steps of training."""

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.batch import Batch, Rows, split_state
from inbatch.methods.base import Method
from inbatch.models.network import Network, ema_update, make_target_network, norms
from inbatch.nn.heads import Head
from inbatch.rng import fold
from inbatch.runtime import distributed
from inbatch.training.grad_cache import cut
from inbatch.training.step import Step

WIDTH, SIDE, CLASSES, SEED = 12, 6, 3, 3
State = dict[str, Tensor]


@dataclass
class Parts:
    """A method with its networks and optimiser, at the start of training."""

    method: Method
    network: Network
    target: Network | None
    optimizer: torch.optim.Optimizer

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that have state, by name."""
        modules: dict[str, nn.Module] = {"method": self.method, "network": self.network}
        return modules if self.target is None else modules | {"target": self.target}

    def state(self) -> State:
        """Return a copy of the state of all modules."""
        named = self.modules().items()
        return {f"{part}.{key}": x.clone() for part, module in named for key, x in module.state_dict().items()}

    def saved(self) -> bytes:
        """Return what a checkpoint holds."""
        states: dict[str, Any] = {name: module.state_dict() for name, module in self.modules().items()}
        torch.save(states | {"optimizer": self.optimizer.state_dict()}, file := io.BytesIO())
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Continue from what a checkpoint holds."""
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, module in (self.modules() | {"optimizer": self.optimizer}).items():
            module.load_state_dict(states[name])


@dataclass(frozen=True)
class Trial:
    """How a method is made and trained.

    Attributes:
        make: class of the method.
        options: options of its constructor.
        batch: samples of the whole batch.
        count: views of a sample; 0 chooses the smallest number of at least 2 that the method allows.
    """

    make: Callable[..., Method]
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    count: int = 0

    @property
    def images(self) -> int:
        """Number of images of the data set."""
        return 4 * self.batch

    def views(self, method: Method) -> int:
        """Return the number of views of a sample."""
        least, most = method.views
        return self.count or (max(2, least) if most != 1 else 1)

    def method(self) -> tuple[Method, dict[str, Head]]:
        """Return the method and its heads at the start of training, the same on every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method = self.make(**self.options)
            method.teacher_width = WIDTH if method.teacher else 0
            method.prepare(images=self.images, classes=CLASSES, batch=self.batch, views=self.views(method))
            heads = method.heads(WIDTH)
            if method.surveys(0):
                self._survey(method, heads)
        return method.double(), heads

    def _survey(self, method: Method, heads: dict[str, Head]) -> None:
        network = Network(nn.Identity(), heads, method.target or method.online).eval()
        with torch.no_grad():
            rows = {name: x[0] for name, x in network([torch.randn(self.images, WIDTH)]).items()}
        method.survey(rows, torch.arange(self.images) % 4 - 1, 0, lambda task, n: [task(i) for i in range(n)])

    def parts(self) -> Parts:
        """Return method, networks and optimiser, the same on every call."""
        method, heads = self.method()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = Network(_encoder(), heads, method.online)
            target = make_target_network(network, heads, method.target) if method.target else None
            for parameter in target.parameters() if target is not None else ():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        network, target = network.double(), target and target.double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        return Parts(method, network, target, optimizer)

    def batches(self, first: int, steps: int, views: int) -> Iterator[tuple[int, Batch, tuple[Tensor, ...]]]:
        """Yield number, samples and views of whole batches, each a function of its number."""
        for step in range(first, first + steps):
            g = torch.Generator().manual_seed(fold(2, step))
            label = torch.randint(-1, CLASSES, (self.batch,), generator=g)
            shape = self.batch, 3, SIDE, SIDE
            images = tuple(torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(views))
            index = (torch.arange(self.batch) + step * self.batch) % self.images
            yield step, Batch(index, label), images

    def rows(self) -> tuple[Method, Rows, Rows, Batch]:
        """Return a method, and the rows that its networks compute from the first batch."""
        parts = self.parts()
        views = self.views(parts.method)
        _, batch, images = next(self.batches(0, 1, views))
        with torch.no_grad():
            online = parts.network.eval()([images[v] for v in parts.method.online_views(views)])
            seen = [images[v] for v in parts.method.target_views(views)]
            target = parts.target.eval()(seen) if parts.target is not None else {}
        return parts.method, online, target, batch

    def train(self, parts: Parts, groups: int = 1, first: int = 0, steps: int = 2) -> State:
        """Perform steps on this rank's part of the batches; return the state and the losses."""
        views = self.views(parts.method)
        current: list[tuple[Tensor, ...]] = [()]
        step = Step(
            method=parts.method, network=parts.network, call=distributed.wrap(parts.network), target=parts.target,
            views=lambda batch: tuple(view[batch.index % self.batch] for view in current[0]), count=views,
            optimizer=parts.optimizer, schedule=lambda optimizer, step: None, groups=groups,
            progress=lambda step: step / 10, seed=SEED,
        )  # fmt: skip
        losses = []
        for number, batch, images in self.batches(first, steps, views):
            current[0] = images
            own = Batch(distributed.local_shard(batch.index), distributed.local_shard(batch.label))
            losses.append(torch.as_tensor(step(own, number)["loss"]).double())
        return parts.state() | {"loss": torch.stack(losses)}

    def literal(self, groups: int, steps: int = 2) -> State:
        """Perform the same steps by plain autograd: one graph over all groups, and one backward pass."""
        parts = self.parts()
        method, network, target = parts.method, parts.network, parts.target
        views, losses = self.views(method), []
        for number, batch, images in self.batches(0, steps, views):
            online = _in_groups(network, images, method.online_views(views), groups, number, 1)
            target_rows: Rows = {}
            if target is not None:
                with torch.no_grad():
                    target_rows = _in_groups(target, images, method.target_views(views), groups, number, 0)
            terms, state = split_state(method.loss(online, target_rows, batch))
            loss = terms["loss"]
            parts.optimizer.zero_grad()
            loss.backward()
            method.on_gradients(network.heads, batch, number / 10)
            parts.optimizer.step()
            method.on_weights(network.heads)
            if target is not None and not method.teacher:
                ema_update(target, network, method.target_momentum(number / 10))
            with torch.no_grad():
                method.store(state)
                method.after_step({k: x.detach() for k, x in online.items()}, target_rows, batch, number / 10)
            losses.append(loss.detach().double())
        return parts.state() | {"loss": torch.stack(losses)}


def _encoder() -> nn.Module:
    """Return convolutions with batch norm, so that context groups matter."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 10, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(40, WIDTH),
    )  # fmt: skip


def _in_groups(
    network: Network, images: Sequence[Tensor], views: Sequence[int], groups: int, step: int, grad: int
) -> Rows:
    """Return the rows of all groups with their graph; running statistics end as the mean over groups."""
    layers, outputs = norms(network), []
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    after: list[list[State]] = []
    for number, group in enumerate(cut([images[v] for v in views], groups)):
        for layer, old in zip(layers, before, strict=True):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(layer, name, old[name].clone())  # not in place: the graph of the last group holds the old ones
        with torch.random.fork_rng():
            torch.manual_seed(fold(SEED, step, grad, number, 0))
            outputs.append(network(group, views))
        after.append([copy.deepcopy(layer.state_dict()) for layer in layers])
    for i, layer in enumerate(layers):
        for name in ("running_mean", "running_var"):
            setattr(layer, name, torch.stack([states[i][name] for states in after]).mean(0))
    return {name: torch.cat([output[name] for output in outputs], 1) for name in outputs[0]}


def difference(a: State, b: State) -> tuple[float, str]:
    """Return the largest difference of two states, relative to the size of the tensor if that exceeds 1, and its name.

    It is infinite for tensors of different names, shapes or infinities.
    """
    if a.keys() != b.keys():
        return float("inf"), sorted(a.keys() ^ b.keys())[0]
    worst, where = 0.0, ""
    for key, x in a.items():
        y = b[key]
        if x.shape != y.shape:
            return float("inf"), key
        if not torch.equal(x, y) and x.numel():
            x, y = x.double(), y.double()
            size = max(1.0, float(y.abs().masked_fill(y.isinf(), 0).max()))
            gap = float((x - y).abs().masked_fill(x == y, 0).nan_to_num(torch.inf).max()) / size  # inf - inf is nan
            if gap > worst:
                worst, where = gap, key
    return worst, where
