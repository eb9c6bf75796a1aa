"""Parts of runs as a user writes them: a method, an encoder, views, data and callbacks outside of the package."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import inbatch
from inbatch.batch import Batch, Losses, Rows
from inbatch.losses import nt_xent
from inbatch.methods.base import Method
from inbatch.nn.heads import Head, mlp
from inbatch.training.callbacks import Moment


class OwnMethod(Method):
    """SimCLR with a memory of the mean row, so that there is state to resume.

    t: temperature.
    """

    def __init__(self, t: float = 0.2, act: Callable[..., Any] = nn.ReLU) -> None:
        super().__init__()
        self.t = t
        self.register_buffer("mean", torch.zeros(16))

    def heads(self, width: int) -> dict[str, Head]:
        return {"projection": Head(mlp(width, width, 16))}

    def loss(self, online: Rows, target: Rows, batch: Batch) -> Losses:
        rows = online["projection"]
        return {"loss": nt_xent(rows, self.t) + 0.01 * (rows.mean((0, 1)) - self.mean).square().sum()}

    def after_step(self, online: Rows, target: Rows, batch: Batch, progress: float) -> None:
        self.mean.lerp_(online["projection"].mean((0, 1)), 0.5)


class OwnNet(nn.Module):
    """A convolution and its maximum."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).amax((2, 3))


class OwnViews:
    """A random crop of `size` pixels, and noise of NumPy's generator."""

    def __init__(self, size: int = 12, noise: float = 0.05) -> None:
        self.size, self.noise = size, noise

    def __call__(self, image: Tensor) -> Tensor:
        side = max(4, int(min(image.shape[1:]) * (0.5 + 0.5 * float(torch.rand(())))))
        view = nn.functional.interpolate(image[None, :, :side, :side] / 255, (self.size, self.size))[0]
        return (view + self.noise * np.float32(np.random.rand())).clamp(0, 1)


class Momentum(torch.optim.SGD):
    """An optimizer without weight decay."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, lr=lr, momentum=beta)


class Pictures(Dataset):
    """Labelled Pillow images of two sizes."""

    classes = ("even", "odd")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(i).integers(0, 255, (14 + i % 2, 16, 3), np.uint8)
        return Image.fromarray(pixels), i % 2


class Count(inbatch.Callback):
    """Counts calls, logs a number and has state."""

    def __init__(self) -> None:
        self.steps, self.evaluations = 0, 0

    def on_step(self, moment: Moment) -> None:
        self.steps += 1
        torch.rand(3)
        moment.log("count", self.steps)

    def on_evaluation(self, moment: Moment) -> None:
        self.evaluations += 1
        assert "knn" in moment.values or "rankme" in moment.values

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Meddle(inbatch.Callback):
    """Changes weights without declaring it, in a way that leaves the version of the tensor as it is."""

    def on_step(self, moment: Moment) -> None:
        next(moment.encoder.parameters()).data.mul_(1.5)


class Meddles(Meddle):
    """Declares that it changes weights."""

    changes_weights = True


class Evaluates(inbatch.Callback):
    """Leaves the encoder in evaluation mode."""

    def on_epoch(self, moment: Moment) -> None:
        moment.encoder.eval()


class Fails(inbatch.Callback):
    """Fails at the second step."""

    def on_step(self, moment: Moment) -> None:
        if moment.step == 2:
            raise KeyError("gone")


class Ends(inbatch.Callback):
    """Requests a stop at a step."""

    def on_step(self, moment: Moment) -> None:
        if moment.step == 3:
            moment.stop("it is enough")
