"""Heads: the small networks between the encoder's features and the rows that the loss reads."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Head:
    """A named head's network, what feeds it, and which towers have it.

    source: "features", or the name of an earlier head.
    online_only: left out of the momentum tower (a predictor).
    """

    network: nn.Module
    source: str = "features"
    online_only: bool = False


Last = Literal["linear", "norm", "norm_scale", "norm_plain"]


def mlp(*widths: int, norm: bool = True, last: Last = "linear") -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them.

    norm: batch normalisation after every hidden layer.
    last: what closes the network: a linear layer with bias, or one without and batch normalisation with learned
        scale and shift ("norm"), scale alone ("norm_scale") or neither ("norm_plain").
    """
    if len(widths) < 2:
        raise ValueError(f"mlp needs at least an input and an output width, got {widths}")
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        hidden = i < len(widths) - 2
        normed = norm if hidden else last != "linear"
        layers.append(nn.Linear(fan_in, fan_out, bias=not normed))
        if normed:
            norm_layer = nn.BatchNorm1d(fan_out, affine=hidden or last != "norm_plain")
            if not hidden and last == "norm_scale":
                norm_layer.bias.requires_grad_(False)
            layers.append(norm_layer)
        if hidden:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
