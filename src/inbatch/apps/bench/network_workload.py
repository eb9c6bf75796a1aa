"""Step of a ResNet-18 by setting, for `inbatch doctor`; only torch is imported, for a short start."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Residual block of two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(channels, width, 3, stride), _convolution(width, width, 3)
        self.shortcut = nn.Identity() if channels == width else _convolution(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def _convolution(channels: int, width: int, side: int, stride: int = 1) -> nn.Sequential:
    """Create a convolution without bias, followed by batch norm."""
    convolution = nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


def resnet18() -> nn.Module:
    """Create ResNet-18 with the stem for 32 pixels, as `create_encoder("resnet18", size=32)` does."""
    widths = ((64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2))
    blocks = [Block(*width) for width in (*widths, (512, 512, 1))]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(_convolution(3, 64, 3), nn.ReLU(), *blocks, pool)


def encoder_step(job: dict[str, Any]) -> tuple[Callable[[], int], dict[str, Any]]:
    """Run a step of an encoder without its optimiser in a benchmark worker; units are views."""
    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    encoder = resnet18().to(memory_format=layout)  # type: ignore[call-overload]
    images = [torch.randn(job["batch"], 3, 32, 32).contiguous(memory_format=layout) for _ in range(2)]

    def step() -> int:
        encoder.zero_grad(set_to_none=True)
        for view in images:
            with torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
                embedding = encoder(view)
            embedding.float().square().mean().backward()
        return 2 * job["batch"]

    return step, {}
