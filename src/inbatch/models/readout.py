"""Readout: features pooled by quarters of the image and decorrelated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

WIDEST = 2048
"""Maximum number of features that are decorrelated: the matrix has its square."""


class Readout(nn.Module):
    """Pool a feature map over a grid of the image and whiten it: (x - mean) C^(-1/2).

    C is the covariance of the features of clean images, without labels. Heads and losses do not use it: they use
    the mean over the whole image. After whitening, directions of small variance count as much as large ones, which
    improves nearest neighbours (docs/fast.md). Until it is fitted, the pooled features are returned unchanged.

    Args:
        width: channels of the feature map.
        grid: side of the grid; by default 2 if that gives at most `WIDEST` features, else 1.
        eps: share of the largest variance that is added to all, so that directions of pure noise are not amplified.
    """

    mean: Tensor
    matrix: Tensor
    images: Tensor

    def __init__(self, width: int, grid: int | None = None, eps: float = 1e-4) -> None:
        super().__init__()
        self.grid, self.eps = grid or (2 if 4 * width <= WIDEST else 1), eps
        self.width = width * self.grid**2
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("matrix", torch.eye(self.width))
        self.register_buffer("images", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map (N, C, H, W); features that are already pooled (N, C) are repeated for each part of the grid."""
        pooled = adaptive_avg_pool2d(x, self.grid).flatten(1) if x.ndim == 4 else x.repeat(1, self.grid**2)
        return self.whitened(pooled) if int(self.images) else pooled

    def whitened(self, rows: Tensor) -> Tensor:
        """Return pooled features (N, F), decorrelated."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.to(self.mean) - self.mean) @ self.matrix

    def unwhitened(self, rows: Tensor) -> Tensor:
        """Return the pooled features (N, F) for the output of `whitened`; the rows themselves if it is not fitted.

        Clusters and the spread of features are computed on these: whitened ones are spread equally in all directions.
        """
        if not int(self.images):
            return rows
        centred = torch.linalg.solve(self.matrix.double(), rows.to(self.mean.device).double(), left=False)
        return (centred + self.mean).to(rows)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return pooled features without whitening within the context."""
        images = self.images.clone()
        self.forget()
        try:
            yield
        finally:
            self.images.copy_(images)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Fit mean and covariance to pooled features (N, F) of clean images; fewer than 4 F of them increase eps."""
        rows = rows.to(self.mean.device, torch.float64)
        variance, axes = torch.linalg.eigh(torch.cov(rows.T) if len(rows) > 1 else torch.eye(self.width).double())
        eps = self.eps * max(1.0, 4 * self.width / len(rows))
        scale = (variance.clamp(min=0) + eps * variance.amax().clamp(min=1e-12)).rsqrt()
        self.mean.copy_(rows.mean(0))
        self.matrix.copy_(axes * scale @ axes.T)
        self.images.fill_(len(rows))

    def forget(self) -> None:
        """Return pooled features without whitening again."""
        self.images.zero_()
