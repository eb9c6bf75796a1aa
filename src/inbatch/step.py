"""One training step, in order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inbatch import ranks, seam
from inbatch.batch import Batch, Losses, Rows
from inbatch.draws import fold
from inbatch.errors import TrainingError
from inbatch.methods.base import Method
from inbatch.tower import Tower, follow, running_statistics


@dataclass
class Step:
    """Everything that one step needs; calling it makes one.

    views: batch -> V views, (B, C, H, W) each, on the device.
    call: the tower, or what wraps it to average gradients over ranks.
    groups: context groups per rank; synced: they reach over all ranks (synchronised norm).
    schedule: sets the optimiser's rates for a step.
    total: steps of the whole run.
    """

    method: Method
    tower: Tower
    call: nn.Module
    target: Tower | None
    views: Callable[[Batch], tuple[Tensor, ...]]
    optimizer: Optimizer
    schedule: Callable[[Optimizer, int], None]
    groups: int
    total: int
    seed: int = 0
    synced: bool = False

    def __call__(self, batch: Batch, step: int) -> Losses:
        """Learn from this rank's part of a global batch; the losses are those of the whole batch."""
        progress = step / self.total
        self.schedule(self.optimizer, step)
        images = self.views(batch)

        online = self._sweep(self.tower, [images[v] for v in self.method.online_views(len(images))], step, grad=True)
        rows = {name: ranks.gather(x, dim=1).requires_grad_() for name, x in online.rows.items()}
        taught: Rows = {}
        if self.target is not None:
            sweep = self._sweep(
                self.target, [images[v] for v in self.method.target_views(len(images))], step, grad=False
            )
            taught = {name: ranks.gather(x, dim=1) for name, x in sweep.rows.items()}
        whole = Batch(ranks.gather(batch.index), ranks.gather(batch.label), batch.seed, batch.epoch)

        losses = self.method.loss(rows, taught, whole)
        losses["loss"].backward()

        self.optimizer.zero_grad(set_to_none=True)
        # The wrapper averages over ranks, the gradient of the whole batch is the sum: hence the factor.
        back = {name: ranks.own(_gradient(x), dim=1) * ranks.world() for name, x in rows.items()}
        seam.push(online, self.tower, self.call, back)
        ranks.average_([s for tower in (self.tower, self.target) if tower for s in running_statistics(tower)])
        self.method.on_gradients(self.tower.heads, whole, progress)
        norm = nn.utils.get_total_norm([p.grad for p in self.tower.parameters() if p.grad is not None])
        if not torch.isfinite(losses["loss"].detach() + norm):
            raise TrainingError(
                f"step {step}: the loss is {losses['loss'].item():.4g} and the gradient's norm {norm.item():.4g}; "
                "no weight was changed by this step. Lower optimizer.lr, lengthen schedule.warmup, or try "
                "precision float32"
            )
        self.optimizer.step()
        self.method.on_weights(self.tower.heads)

        if self.target is not None:
            follow(self.target, self.tower, self.method.momentum(progress))
        with torch.no_grad():
            self.method.after_step({name: x.detach() for name, x in rows.items()}, taught, whole, progress)
        return {name: x.detach() for name, x in losses.items()} | {"grad_norm": norm}

    def _sweep(self, tower: Tower, images: list[Tensor], step: int, grad: bool) -> seam.Sweep:
        """Rows of this rank's groups; the random numbers of a group are the same on whichever rank it runs."""
        groups = seam.cut(images, self.groups)
        first = 0 if self.synced else ranks.rank() * self.groups
        part = ranks.rank() if self.synced else 0
        keys = [fold(self.seed, step, int(grad), first + g, part) for g in range(self.groups)]
        return seam.sweep(tower, self.call, groups, keys, grad)


def _gradient(x: Tensor) -> Tensor:
    """What the loss left at a row; zero where it did not look."""
    return torch.zeros_like(x) if x.grad is None else x.grad
