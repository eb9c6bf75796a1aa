"""One training step."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inbatch.batch import Batch, Losses, Rows, loss_fault, split_state
from inbatch.context.curation import Curator
from inbatch.context.mixing import Mixer
from inbatch.context.negatives import DropSimilar
from inbatch.errors import ConfigError, TrainingError
from inbatch.methods.base import Method
from inbatch.models.network import Network, ema_update, running_statistics
from inbatch.nn import logsumexp
from inbatch.nn.functional import variance_hinge
from inbatch.rng import fold, permutation
from inbatch.runtime import distributed, ring
from inbatch.runtime.sharding import is_shard, is_sharded, total_norm
from inbatch.training import grad_cache
from inbatch.training.mixing import MIXING, StepMixing, mixed_views
from inbatch.training.row_order import (
    Orders,
    compared_rows,
    orders_of,
    returned_gradient,
    samples_of_all_ranks,
    without_pixels,
)


class NonFiniteError(TrainingError):
    """The loss or its gradient is not finite; holds what `replay.capture` saves of the step."""

    def __init__(self, step: int, batch: Batch, losses: dict[str, Tensor], norm: Tensor):
        self.step, self.batch, self.norm = step, batch, norm
        self.losses = {name: x.detach() for name, x in losses.items()}
        super().__init__(
            f"step {step}: the loss is {losses['loss'].item():.4g} and the gradient's norm {norm.item():.4g}; "
            "no weight was changed by this step. Lower optimizer.lr, lengthen schedule.warmup_epochs, or try "
            "precision float32"
        )


@dataclass
class Step:
    """One training step; calling it performs the step.

    Attributes:
        method: The method.
        network: The online network.
        call: The network, or its wrapper that averages gradients over ranks.
        target: The target network; None if the method has none.
        views: Map samples to their V views, (B, C, H, W) each, on the device; repeated calls return the same views.
        count: Number of views, V.
        optimizer: The optimiser.
        schedule: Set the optimiser's rates for a step.
        groups: Context groups per rank.
        progress: Return the completed share of the run at a step.
        seed: Seed of dropout and of the permutations.
        synced: Context groups extend over all ranks (synchronised norm).
        curator: Redraw some of the views before the step.
        shuffle: The target network's context groups are other permutations of the batch, redrawn for every step and
            view; without a target network, those of every view except the first.
        mixer: Mixes the images of a context group, of the online network only.
        products: Precision of the products in the loss's log-sum-exps (`nn.logsumexp`).
        variance: Weight of VICReg's variance term over all rows that the loss reads, added to the loss of any method.
        scale: Return the scale of the image side at a share of the run, for progressive resizing.
        frozen: Number of steps at the start in which the encoder does not learn.
        similar: Find the samples that are near duplicates, which are not negatives.
        commit: Called before anything except buffers of the networks and the curator changes; the step then completes.
    """

    method: Method
    network: Network
    call: nn.Module
    target: Network | None
    views: Callable[[Batch], Sequence[Tensor]]
    count: int
    optimizer: Optimizer
    schedule: Callable[[Optimizer, int], None]
    groups: int
    progress: Callable[[int], float]
    seed: int = 0
    synced: bool = False
    curator: Curator | None = None
    shuffle: bool = False
    mixer: Mixer | None = None
    products: logsumexp.MatmulPrecision = "float32"
    variance: float = 0.0
    scale: Callable[[float], float] = lambda progress: 1.0
    frozen: int = 0
    similar: DropSimilar | None = None
    commit: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Perform a step on this rank's part of a global batch; the returned losses are those of the whole batch."""
        progress = self.progress(step)
        self.resize(step)
        for network in (self.network, self.target):
            if network is not None:
                network.freeze_encoder(step < self.frozen)
        # The wrapper would wait for the gradients of a frozen encoder.
        call = self.network if step < self.frozen else self.call
        figures: dict[str, float] = {}
        if self.curator is not None:
            batch, figures = self.curator(batch, distributed.gather, distributed.rank() * len(batch))
        if self.similar is not None:
            batch, dropped = self.similar(batch, distributed.gather, distributed.rank() * len(batch))
            figures |= dropped

        own = self.own_rows()
        mixing = self._mixing(batch, step, own)
        target_views = list(self.method.target_views(self.count))
        held = self.views(batch) if self.groups == 1 else None  # with several, one group's views are held
        online, orders = self._forward(self.network, call, batch, held, self.online_views(), step, mixing)
        rows = {name: x.requires_grad_() for name, x in compared_rows(online, orders, own).items()}
        target_rows: Rows = {}
        if self.target is not None:
            forward = self._forward(self.target, call, batch, held, target_views, step, grad=False)
            target_rows = compared_rows(*forward, own)
        samples = without_pixels(batch, own)

        peers = ring.OwnRows(equal=True) if own else None
        shares: dict[str, Any] = {"rank": distributed.rank(), "world": distributed.world(), "add": distributed.add_}
        with logsumexp.using(products=self.products, peers=peers, **({} if own else shares)):
            losses, state = self._losses(rows, target_rows, samples, mixing)
            losses["loss"].backward()

        self.optimizer.zero_grad(set_to_none=True)
        back = {name: returned_gradient(_gradient(x), orders_of(name, orders), own) for name, x in rows.items()}
        grad_cache.backward_groups(online, self.network, call, back)
        if step < self.frozen or is_sharded(self.network):  # shards are averaged in the backward pass
            distributed.average_([g for g in _gradients(self.network) if not is_shard(g)])
        distributed.average_(
            [s for network in (self.network, self.target) if network for s in running_statistics(network)]
        )
        self.method.on_gradients(self.network.heads, samples, progress)
        norm = total_norm(_gradients(self.network))
        if not torch.isfinite(losses["loss"].detach() + norm):
            raise NonFiniteError(step, batch, losses, norm)
        self.commit()
        self.schedule(self.optimizer, step)
        self.optimizer.step()
        self.method.on_weights(self.network.heads)

        if self.target is not None and not self.method.teacher:
            ema_update(self.target, self.network, self.method.target_momentum(progress))
        with torch.no_grad(), logsumexp.using(peers=peers):
            self.method.store(state)
            self.method.after_step({name: x.detach() for name, x in rows.items()}, target_rows, samples, progress)
        return {name: x.detach() for name, x in losses.items()} | {"grad_norm": norm} | figures

    def resize(self, step: int) -> None:
        """Set the size of the networks' images to that of a step, also for passes outside of steps."""
        for network in (self.network, self.target):
            if network is not None:
                network.scale = self.scale(self.progress(step))

    def _losses(
        self, rows: Rows, target_rows: Rows, samples: Batch, mixing: StepMixing | None
    ) -> tuple[Losses, dict[str, Tensor]]:
        """Return the losses of the batch, and the next values of the method's buffers."""
        terms = (self.method if mixing is None else mixing).loss(rows, target_rows, samples)
        if fault := loss_fault(terms, dict(self.method.named_buffers())):
            raise ConfigError(f"{type(self.method).__name__}: {fault} (inbatch check-method tests all of a method)")
        losses, state = split_state(terms)
        if self.variance:
            narrow = torch.stack([variance_hinge(x) for x in rows.values()]).mean()
            losses |= {"loss": losses["loss"] + self.variance * narrow, "narrowness": narrow}
        return losses, state

    def _forward(
        self, network: Network, call: nn.Module, batch: Batch, held: Sequence[Tensor] | None, views: list[int],
        step: int, mixing: StepMixing | None = None, grad: bool = True,
    ) -> tuple[grad_cache.GroupForward, Orders]:  # fmt: skip
        """Return the rows of this rank's groups; a group's random numbers do not depend on the rank that runs it."""
        moved = [self.shuffle and (v > 0 if self.target is None else not grad) for v in views]
        n, device = len(batch) * distributed.world(), batch.index.device
        orders = [
            permutation(fold(self.seed, step), v, n).to(device) if move else None
            for v, move in zip(views, moved, strict=True)
        ]
        first = 0 if self.synced else distributed.rank() * self.groups
        part = distributed.rank() if self.synced else 0
        keys = [fold(self.seed, step, int(grad), first + g, part) for g in range(self.groups)]
        images = self._mixed(self._groups(batch, held, views, orders), views, mixing)
        # Mixed images are of the batch's own groups.
        plain = [order for v, order in zip(views, orders, strict=True) if v >= 0]
        return grad_cache.forward_groups(network, call, images, views, keys, grad), plain

    def online_views(self) -> list[int]:
        """Return the numbers of the online network's views, ~v for the mixture of view v."""
        return mixed_views(self.mixer, self.method, list(self.method.online_views(self.count)))

    def own_rows(self) -> bool:
        """Return whether a rank computes the loss from its own rows; images mixed over all ranks need those of all."""
        return distributed.world() > 1 and self.method.own_rows and not (self.mixer is not None and self.synced)

    def _mixing(self, batch: Batch, step: int, own: bool) -> StepMixing | None:
        """Return the mixtures of a step."""
        if self.mixer is None:
            return None
        key = fold(self.seed, step, MIXING)
        return StepMixing(self.mixer, self.method, self.count, key, self.groups, len(batch), self.synced, own)

    @staticmethod
    def _mixed(groups: list[grad_cache.Group], views: list[int], mixing: StepMixing | None) -> list[grad_cache.Group]:
        """Return the groups with mixed images where a view's number is below 0."""
        if mixing is None:
            return groups

        def mix(g: int) -> list[Tensor]:
            return [x if v >= 0 else mixing.images(~v, g, x) for v, x in zip(views, groups[g](), strict=True)]

        return [functools.partial(mix, g) for g in range(len(groups))]

    def _groups(
        self, batch: Batch, held: Sequence[Tensor] | None, views: list[int], orders: Orders
    ) -> list[grad_cache.Group]:
        """Return a function for each group that returns its images."""
        moved = any(order is not None for order in orders)
        everyone = samples_of_all_ranks(batch) if moved else None
        if moved and everyone is None:
            # Streamed samples of a group are on other ranks: the rank with a sample draws its views, and every rank
            # holds all.
            images = held if held is not None else self.views(batch)
            dealt = [
                images[_of(v)] if order is None else distributed.gather(images[v])[distributed.local_shard(order)]
                for v, order in zip(views, orders, strict=True)
            ]
            return [functools.partial(tuple, group) for group in grad_cache.cut(dealt, self.groups)]

        def draw(places: slice) -> list[Tensor]:
            plain: Sequence[Tensor] = held or ()
            if held is None and any(order is None for order in orders):
                plain = self.views(batch.take(places))
            images = []
            for v, order in zip(views, orders, strict=True):
                if order is None or everyone is None:
                    images.append(plain[_of(v)])
                else:
                    images.append(self.views(everyone.take(distributed.local_shard(order)[places]))[v])
            return images

        size = len(batch) // self.groups
        return [functools.partial(draw, slice(g * size, (g + 1) * size)) for g in range(self.groups)]


def _of(number: int) -> int:
    """Return the view of a number: ~v is the mixture of view v."""
    return number if number >= 0 else ~number


def _gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def _gradient(x: Tensor) -> Tensor:
    """Return the gradient of a row; zero if the loss did not use it."""
    return torch.zeros_like(x) if x.grad is None else x.grad
