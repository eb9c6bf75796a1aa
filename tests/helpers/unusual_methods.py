"""Methods that break no rule, but compute in unusual ways."""

import torch
from torch import Tensor, nn
from wrong_methods import Right

from inbatch.batch import Batch, Losses, Rows
from inbatch.nn.functional import normalize


class RoundsToFloat32(Right):
    """Computes in float32, as is usual with mixed precision."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-6) for z in online["projection"].float())
        return {"loss": nn.functional.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))}


class AssignsUnderNoGrad(Right):
    """Computes targets of all rows under no_grad, from a list of the rows."""

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        first, second = normalize(online["projection"])
        with torch.no_grad():
            targets = torch.cat([second, first]).div(0.05).softmax(-1)
        return {"loss": -(targets * torch.cat([first, second]).div(0.1).log_softmax(-1)).sum(-1).mean()}


class Length(torch.autograd.Function):
    """Weighted squared length of a row."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x.square() * torch.arange(x.shape[-1])).sum(-1)

    @staticmethod
    def backward(ctx: torch.autograd.Function, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * torch.arange(x.shape[-1]) * g[..., None]


class OwnBackward(Right):
    """Has an autograd function."""

    length: type[torch.autograd.Function] = Length

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        return {"loss": self.length.apply(normalize(online["projection"])).mean()}


class Taught(Right):
    """Compares with the rows of a frozen teacher, which has no momentum."""

    target, teacher = ("features",), True

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        own, other = (normalize(z[0]) for z in (online["projection"], target["features"]))
        return {"loss": (own @ own.T - other @ other.T).square().mean()}


UNUSUAL = (RoundsToFloat32, AssignsUnderNoGrad, OwnBackward)
