"""An encoder made for few operations at 32 to 96 pixels: what a processor learns most with in an hour."""

from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Whitening(nn.Module):
    """Decorrelate features in evaluation: (x - mean) C^(-1/2), C the covariance of the features seen in training.

    In training the features pass unchanged, and mean and covariance follow them, as in batch normalisation; no label is
    used. Directions of small variance count as much as large ones then, which nearest neighbours gain from.

    Args:
        width: features F.
        eps: share of the largest variance that is added to all, so that directions of noise alone do not count.
        momentum: weight of a batch in the running statistics, once there have been 1 / momentum.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, width: int, eps: float = 1e-3, momentum: float = 0.02) -> None:
        super().__init__()
        self.eps, self.momentum, self.track_running_stats = eps, momentum, True
        # The names of batch normalisation: groups, ranks and resumes treat these statistics alike.
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.eye(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._matrix: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.track_running_stats:
                self._follow(x.detach())
            return x
        if not int(self.num_batches_tracked):
            return x
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(self.running_mean.dtype)
            return (wide - self.running_mean) @ self.matrix().to(x.device)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and covariance of these features (N, F), for an encoder that has seen none in training."""
        self._matrix = None
        features = features.to(self.running_mean)
        self.running_mean.copy_(features.mean(0))
        self.running_var.copy_(torch.cov(features.T))
        self.num_batches_tracked.fill_(1)

    def matrix(self) -> Tensor:
        """C^(-1/2) as of now, (F, F)."""
        if self._matrix is None:
            variance, axes = torch.linalg.eigh(self.running_var.double())
            scale = (variance.clamp(min=0) + self.eps * variance.amax()).rsqrt()
            self._matrix = (axes * scale @ axes.T).to(self.running_var.dtype)
        return self._matrix

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        self._matrix = None
        if len(x) < 2:
            return
        x = x.to(self.running_mean.dtype)
        self.num_batches_tracked += 1
        rate = max(self.momentum, 1 / int(self.num_batches_tracked))
        mean = x.mean(0)
        self.running_mean.lerp_(mean, rate)
        with torch.autocast(x.device.type, enabled=False):
            self.running_var.lerp_((x - mean).T @ (x - mean) / (len(x) - 1), rate)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._matrix = None
        super()._load_from_state_dict(*args)


def fast(channels: int, size: int, width: int = 32, blocks: int = 1, whiten: bool = True) -> nn.Sequential:
    """A ResNet-9 with strides instead of pooling (after Page 2019, "How to train your ResNet"): (N, C, H, W) -> (N, F).

    Four stages of `width` times 1, 2, 4 and 8 channels, each half as large as the one before; the last `blocks` of them
    have a residual block of two convolutions. The stem has stride 1 up to 40 pixels, 2 up to 96, and 4 above, so that
    the first stage works on about 32 pixels whatever the images are. whiten: decorrelate the features (`Whitening`).
    """
    stem = 1 if size <= 40 else 2 if size <= 96 else 4
    layers: list[nn.Module] = [_convolution(channels, width, stem, kernel=3 if stem < 4 else 7)]
    for stage in range(1, 4):
        before, after = width * 2 ** (stage - 1), width * 2**stage
        layers.append(_convolution(before, after, 2))
        if stage > 3 - blocks:
            layers.append(Residual(nn.Sequential(_convolution(after, after), _convolution(after, after))))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *([Whitening(8 * width)] if whiten else []))


def _convolution(fan_in: int, fan_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))
