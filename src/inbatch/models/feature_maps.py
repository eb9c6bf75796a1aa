"""Feature maps and patch tokens of a backbone, for dense tasks such as detection and segmentation."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.errors import ConfigError

_BLOCKS = 4
"""Number of maps of a backbone whose maps all have the same stride, such as a ViT."""


def stages(backbone: nn.Module, x: Float[Tensor, "n c s s"]) -> list[Tensor]:
    """Return the feature maps of a backbone, (N, C, h, w), the finest first.

    The last map of each stride; from a ViT, where all have one stride, those of four evenly spaced blocks, after the
    final norm. The last map is the one that the pooling reads. Gradients are computed in the mode of the caller.

    Args:
        backbone: model of timm, torchvision or this library, or another one with such maps.
        x: normalised images.

    Raises:
        ConfigError: if the backbone has no feature maps.
    """
    if hasattr(backbone, "forward_intermediates"):
        maps = _of_timm(backbone, x)
    elif hasattr(backbone, "conv_proj") and hasattr(backbone, "encoder"):  # torchvision's ViT
        maps = _of_encoder(backbone, x)
    else:
        maps = _of_children(backbone, x)
    if not maps:
        raise ConfigError(
            f"{type(backbone).__name__} gives no feature maps: choose a ResNet, a ViT, or another encoder"
        )
    return maps


class TokenEncoder:
    """An encoder whose features of an image are those of `Encoder.tokens`, in one row; for `embed_stream`.

    Attributes:
        encoder: the encoder.
        grid: height and width of the feature map.
        width: numbers per token.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.prepare, self.evaluating = encoder, encoder.prepare, encoder.evaluating
        self.channels, self.levels = encoder.channels, encoder.levels
        black = torch.zeros(1, encoder.channels, encoder.size, encoder.size, dtype=torch.uint8)
        last = encoder.features(black)[-1]
        self.grid, self.width = (last.shape[2], last.shape[3]), last.shape[1]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.encoder.device
        return device

    def __call__(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n td"]:
        return stages(self.encoder.backbone, x)[-1].flatten(2).mT.flatten(1)


def _of_timm(backbone: Any, x: Tensor) -> list[Tensor]:
    reductions = [info["reduction"] for info in backbone.feature_info]
    if len(set(reductions)) > 1 or len(reductions) == 1:
        return _coarser(backbone.forward_intermediates(x, norm=True, intermediates_only=True))
    depth = len(reductions)
    blocks = sorted({(i + 1) * depth // _BLOCKS - 1 for i in range(_BLOCKS)} - {-1})
    maps: list[Tensor] = backbone.forward_intermediates(x, indices=blocks, norm=True, intermediates_only=True)
    return maps


def _of_encoder(backbone: Any, x: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    with backbone.encoder.register_forward_hook(lambda _, __, output: outputs.append(output)):
        backbone(x)
    side = x.shape[-1] // backbone.patch_size
    return [outputs[0][:, 1:].mT.unflatten(2, (side, side))]


def _of_children(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the maps that the parts of a model give, and their parts."""
    maps: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            maps.append(output)

    parts = [child for part in backbone.children() for child in (part, *part.children())]
    pools = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    hooks = [part.register_forward_hook(keep) for part in dict.fromkeys(parts) if not isinstance(part, pools)]
    try:
        rows = backbone(x)
    finally:
        for hook in hooks:
            hook.remove()
    if any(m.shape[1] == m.shape[2] != m.shape[3] == rows.shape[1] for m in maps):  # torchvision's Swin: (h, w, C)
        maps = [m.permute(0, 3, 1, 2) for m in maps if m.shape[1] == m.shape[2]]  # the last one comes also as (C, h, w)
    return _coarser(maps)


def _coarser(maps: list[Tensor]) -> list[Tensor]:
    """Return the last map of each size, as long as the maps become smaller."""
    kept: list[Tensor] = []
    for one in maps:
        if kept and one.shape[2] == kept[-1].shape[2]:
            kept[-1] = one
        elif not kept or one.shape[2] < kept[-1].shape[2]:
            kept.append(one)
    return kept
