"""A first layer that is not trained: it whitens small patches of the training images, without labels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu, unfold

_CHUNK = 16
"""Number of images with patches in memory at once."""


class WhitenedPatches(nn.Module):
    """A frozen convolution with the strongest principal components of image patches, then ReLU (Coates et al. 2011).

    A filter is a component divided by the standard deviation along it, so that strong and weak ones count equally. Each
    is included with both signs, because the ReLU keeps one of them. The filters are not parameters: neither the
    optimiser nor the average of a target network changes them. They are random until `fit` is called with images.

    Args:
        channels: channels of the images.
        components: principal components; at most kernel * kernel * channels exist.
        kernel: side of the convolution kernel in pixels.
        stride: stride of the convolution in pixels.
        eps: added to the variance along a component (images are normalised), so that noise is not amplified.
    """

    weight: Tensor

    def __init__(
        self, channels: int, components: int = 12, kernel: int = 3, stride: int = 1, eps: float = 1e-2
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.eps = kernel, stride, eps
        self.width = 2 * min(components, channels * kernel**2)
        self.register_buffer("weight", torch.empty(self.width, channels, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n width h w"]:
        return relu(conv2d(x, self.weight, stride=self.stride, padding=self.kernel // 2))

    @torch.no_grad()
    def fit(self, images: UInt8[Tensor, "n c h w"], std: Sequence[float]) -> None:
        """Compute the filters from all patches of some images.

        Args:
            images: training images.
            std: divisor per channel of the images before the layer, with pixels in [0, 1].
        """
        total: Tensor | float = 0.0
        squares: Tensor | float = 0.0
        count = 0
        for chunk in images.split(_CHUNK):
            patches = unfold(chunk.double(), self.kernel, stride=self.stride).transpose(1, 2).flatten(0, 1)
            # Sums of integers below 2^53 are exact in any order: any number of threads gives the same filters.
            total, squares, count = total + patches.sum(0), squares + patches.T @ patches, count + len(patches)
        mean = torch.as_tensor(total) / count
        scale = 255 * torch.tensor(std, dtype=torch.float64).repeat_interleave(self.kernel**2)
        covariance = (torch.as_tensor(squares) / count - mean.outer(mean)) / scale.outer(scale)
        variance, axes = torch.linalg.eigh(covariance)  # ascending
        filters = (axes / (variance.clamp(min=0) + self.eps).sqrt()).T.flip(0)[: self.width // 2]
        signs = filters.gather(1, filters.abs().argmax(1, keepdim=True)).sign()  # eigh leaves them undetermined
        filters = (filters * signs).unflatten(1, self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))
