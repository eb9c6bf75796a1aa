"""Check that a backbone trains on images of a side, and uses all of their pixels."""

import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError
from inbatch.models.encoder import Encoder
from inbatch.models.library_errors import explained

_PATCH = 4
"""Smallest stride of a first convolution without padding that counts as a patch embedding. In networks with stride 2
(Inception), the last pixel of an even side is outside of the first convolution by design."""


def check_side(encoder: Encoder, side: int, setting: str = "size") -> None:
    """Raise ConfigError if an encoder cannot train on images of this side, or ignores a part of them.

    The encoder, in training mode, computes two black images. This changes neither its buffers nor the random state.

    Args:
        encoder: the encoder.
        side: side of the images in pixels.
        setting: what the user can set to another side, for the message.
    """
    _check_patches(encoder, side, setting)
    fix = "" if side == encoder.size else (
        f"Set {setting} to {encoder.size}, choose views of one size, or an encoder that takes several sizes: a ResNet, "
        "or a ViT or Swin of timm"
    )  # fmt: skip
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    images = torch.zeros(2, encoder.channels, side, side, device=encoder.device)
    what = f"train on images of {encoder.channels}x{side}x{side}"
    gpus = [encoder.device] if encoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.no_grad(), explained(encoder.name, what, fix, encoder.backbone):
        rows = torch.func.functional_call(encoder, buffers, (images,))
    shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if shape != (2, encoder.width):
        raise ConfigError(
            f"{encoder.name} gives {shape} in training instead of a row of {encoder.width} features for each of 2 "
            "images: switch off its auxiliary outputs, or choose another encoder"
        )


def _check_patches(encoder: Encoder, side: int, setting: str) -> None:
    """Raise ConfigError if the first layer divides images into patches and the side is not a multiple of a patch."""
    first = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels != encoder.channels or isinstance(first.padding, str):
        return
    (kernel, _), (stride, _), (padding, _) = first.kernel_size, first.stride, first.padding
    rest = (side - kernel) % stride
    if padding or stride < _PATCH or side < kernel or not rest or _reads_border(encoder, side, rest):
        return
    raise ConfigError(
        f"{encoder.name} divides images into patches of {kernel} pixels: of {side} pixels a side it would ignore the "
        f"last {rest}, {1 - (1 - rest / side) ** 2:.0%} of the image. Set {setting} to {side - rest} or "
        f"{side - rest + stride}, or choose another patch size"
    )


def _reads_border(encoder: Encoder, side: int, rest: int) -> bool:
    """Return whether the last `rest` rows and columns of an image reach the features: a model may pad its patches."""
    image = torch.zeros(1, encoder.channels, side, side, device=encoder.device)
    image[..., side - rest :, :] = image[..., side - rest :] = torch.nan
    try:
        with encoder.evaluating():
            return bool(encoder(image).isnan().any())
    except Exception:  # the library refuses such a side
        return False
