"""Convolutions with few output pixels, with the weight gradient computed as one matrix product.

oneDNN's bf16 kernel for that gradient takes up to 8 times as long as a matrix product if the output of an image has
16 pixels or fewer: the last stage of a ResNet on small images. Values and the other gradients are those of torch.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIXELS = 16
"""Maximum number of output pixels: with 64 the product took 1.2 times as long as oneDNN's kernel (256 channels)."""
_SAMPLES = 256
"""Number of samples with patches in memory at a time."""


class Conv2d(nn.Conv2d):
    """torch's Conv2d with another computation of the weight gradient, in bfloat16 and with few output pixels."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._applies(input, weight):
            return super()._conv_forward(input, weight, bias)
        x, w = (
            input.to(torch.bfloat16),
            weight.to(torch.bfloat16),
        )  # the casts of autocast are not accessible
        out = _ByProduct.apply(x, w, self.stride, self.padding)
        return out if bias is None else out + bias.to(torch.bfloat16)[:, None, None]

    def _applies(self, x: Tensor, weight: Tensor) -> bool:
        half = x.dtype == torch.bfloat16 and weight.dtype == torch.bfloat16
        half |= torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if not (half and plain and x.ndim == 4 and weight.requires_grad and torch.is_grad_enabled()):
            return False
        if isinstance(self.padding, str) or x.device.type != "cpu":
            return False
        sides = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, strict=True)
        height, width = ((side + 2 * pad - kernel) // stride + 1 for side, kernel, stride, pad in sides)
        return height * width <= PIXELS


def by_product(module: nn.Module) -> None:
    """Replace the class of every plain convolution of a module; parameters and their names are unchanged."""
    for part in module.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = Conv2d


class _ByProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.how
        back = None
        if ctx.needs_input_grad[0]:
            options = (None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False))
            back = torch.ops.aten.convolution_backward(gradient, x, weight, *options)[0]
        parts = zip(x.split(_SAMPLES), gradient.split(_SAMPLES), strict=True)
        products = [_rows(g).T @ _patches(images, weight.shape[2:], stride, padding) for images, g in parts]
        whole = products[0] if len(products) == 1 else torch.stack(products).float().sum(0).to(weight.dtype)
        kernel, channels = weight.shape[2:], weight.shape[1]
        return back, whole.view(len(weight), *kernel, channels).permute(0, 3, 1, 2), None, None


def _rows(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "nhw c"]:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _patches(x: Float[Tensor, "n c h w"], kernel: Any, stride: Any, padding: Any) -> Float[Tensor, "p khkwc"]:
    """Return the input patch of every output pixel, channels last."""
    (above, beside), last = padding, x.permute(0, 2, 3, 1)
    last = F.pad(last, (0, 0, beside, beside, above, above)) if above or beside else last
    seen = last.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (n, h, w, c, kh, kw)
    return seen.permute(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * x.shape[1])
