"""Methods that break one rule each."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Rows
from inbatch.losses import nt_xent
from inbatch.methods import SimCLR
from inbatch.methods.base import Method
from inbatch.nn.functional import info_nce, normalize
from inbatch.nn.heads import Head, mlp
from inbatch.nn.memory_bank import MemoryBank
from inbatch.runtime import distributed


class Right(SimCLR):
    """Breaks none."""

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__(temperature, out_dim=8)


class QueueInLoss(Right):
    """Pushes to its queue in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = MemoryBank(40, 8)

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = online["projection"]
        self.queue.push(normalize(second.detach()))
        return {"loss": info_nce(first, second, self.queue.rows, 0.2)}


class TakesItsPart(Right):
    """Centres the rows by the mean of this rank's part of them."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        return {"loss": nt_xent(z - distributed.local_shard(z.detach(), 1).mean((0, 1)), 0.2)}


class RunningCentre(nn.Module):
    """Subtracts a running mean of the rows that pass."""

    centre: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
        return x - self.centre


class LocalStatistic(Right):
    """Keeps a statistic of the rows of one process in a head."""

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(nn.Sequential(mlp(width, 8), RunningCentre(8)))}


class CountsInAttribute(Right):
    """Anneals its temperature by a number that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"], 0.2 + 0.1 * self.steps)}

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.steps += 1


class KeepsInClass(Right):
    """Keeps its centre in a list of the class."""

    past: list[Tensor] = []

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        return {"loss": nt_xent(z - self.past[-1] if self.past else z, 0.2)}

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.past.append(online["projection"].mean((0, 1)))


class Learns(Right):
    """Holds a trainable temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"] * self.log_temperature.exp(), 0.2)}


class LearnsUnseen(Right):
    """Holds trainable weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [torch.ones(8, requires_grad=True)]


class Draws(Right):
    """Adds noise from the global generator."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        return {"loss": nt_xent(z + 0.1 * torch.randn_like(z), 0.2)}


class ReadsRank(Right):
    """Weights its loss by the rank."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {"loss": nt_xent(online["projection"], 0.2 + 0.1 * rank)}


class Adds(Right):
    """Adds a statistic over ranks that have all rows already."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        centre = online["projection"].detach().mean((0, 1))
        if dist.is_initialized():
            dist.all_reduce(centre)
        return {"loss": nt_xent(online["projection"] - centre, 0.2)}


class OverwritesRows(Right):
    """Normalises its rows in place."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        z /= z.norm(dim=-1, keepdim=True)
        return {"loss": nt_xent(z, 0.2)}


class OverwritesTarget(Right):
    """Normalises the rows of the target network in place."""

    target, momentum = ("projection",), 0.9

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        t = target["projection"]
        t /= t.norm(dim=-1, keepdim=True)
        return {"loss": nt_xent(torch.cat([online["projection"], t]), 0.2)}


class LosesGradient(Right):
    """Takes the length of the rows out of the graph by accident."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        z = online["projection"]
        return {"loss": nt_xent(z, 0.2) * float(z.square().mean().item())}


class ReadsLabels(Right):
    """Reads labels without declaring it."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"], 0.2) + batch.label.double().mean()}


class DependsOnOrder(Right):
    """Takes the next sample in the batch as a negative."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = normalize(online["projection"])
        return {"loss": ((first * second.roll(1, 0)).sum(-1) - (first * second).sum(-1)).exp().mean()}


class Divides(Right):
    """Divides by the length of a row."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = (z / z.norm(dim=-1, keepdim=True) for z in online["projection"])
        return {"loss": -(first * second).sum(-1).mean()}


class RemembersEarly(QueueInLoss):
    """Fills its queue before the optimiser."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = online["projection"]
        return {"loss": info_nce(first, second, self.queue.rows, 0.2)}

    def on_gradients(self, heads: nn.ModuleDict, batch: Batch, progress: float) -> None:
        self.queue.push(torch.ones(4, 8))


class NeedsObject(Right):
    """Takes an object as an option."""

    def __init__(self, kernel: object = torch.nn.functional.cosine_similarity) -> None:
        super().__init__()
        self.kernel = kernel


class ReturnsTensor(Right):
    """Returns no dict."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return nt_xent(online["projection"])  # type: ignore[return-value]


class DrawsWithoutSeed(Right):
    """Draws from a generator of its own that has no seed."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"], 0.2 + float(np.random.default_rng().random()))}


class PerturbsWeights(Right):
    """Adds noise from the global generator to the weights of its heads."""

    def on_weights(self, heads: nn.ModuleDict) -> None:
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter += 0.01 * torch.randn_like(parameter)


class RegistersLate(Right):
    """Registers its buffer after the first step."""

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.register_buffer("centre", online["projection"].mean((0, 1)))


class StopsGradient(Right):
    """Detaches all rows."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"].detach(), 0.2)}


class MisnamesState(Right):
    """Returns the next value of a buffer that it does not have."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return super().loss(online, target, batch) | {"state.center": online["projection"].detach().mean((0, 1))}


class StatePerPlace(Right):
    """Writes a number of each sample at its place in the batch, not at its index in the data set."""

    def prepare(self, *, images: int, **sizes: int) -> None:
        self.register_buffer("lengths", torch.zeros(images))

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        lengths = self.lengths.clone()
        lengths[: len(batch)] = online["projection"][0].detach().norm(dim=-1)
        return super().loss(online, target, batch) | {"state.lengths": lengths}


class StateWithGraph(StatePerPlace):
    """Returns the next value of a buffer with its graph."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        lengths = self.lengths.index_put((batch.index,), online["projection"][0].norm(dim=-1))
        return Right.loss(self, online, target, batch) | {"state.lengths": lengths}


class HasNoConstructor(Method):
    """Inherits a constructor that takes anything."""

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, 8))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": nt_xent(online["projection"], 0.2)}


class FailsInHook(Right):
    """Raises an error in every step."""

    def on_weights(self, heads: nn.ModuleDict) -> None:
        raise RuntimeError("broken")
