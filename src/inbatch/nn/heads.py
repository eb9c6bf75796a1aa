"""Heads: the small networks between the embedding and the rows that the loss reads."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from inbatch.errors import check_range
from inbatch.nn.functional import normalize, product


@dataclass(frozen=True)
class Head:
    """Network of a named head, its input, and the networks that have it.

    Attributes:
        network: the module.
        source: "features", or the name of an earlier head.
        online_only: whether the target network does not have it (a predictor).
    """

    network: nn.Module
    source: str = "features"
    online_only: bool = False


Last = Literal["linear", "plain", "norm", "norm_scale", "norm_plain"]


def mlp(*widths: int, norm: bool = True, last: Last = "linear", activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of the given widths with an activation between them.

    Args:
        *widths: widths from input to output.
        norm: batch normalisation after every hidden layer.
        last: the last layer: linear with bias ("linear"), linear without bias ("plain"), or linear without bias
            followed by batch normalisation with learned scale and shift ("norm"), scale alone ("norm_scale") or neither
            ("norm_plain").
        activation: class of the activation.
    """
    if len(widths) < 2:
        raise ValueError(f"mlp needs at least an input and an output width, got {widths}")
    if min(widths) < 1:
        raise ValueError(f"the widths of a head must be at least 1, not {min(widths)}")
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        hidden = i < len(widths) - 2
        normed = norm if hidden else last.startswith("norm")
        layers.append(nn.Linear(fan_in, fan_out, bias=not normed and (hidden or last == "linear")))
        if normed:
            norm_layer = nn.BatchNorm1d(fan_out, affine=hidden or last != "norm_plain")
            if not hidden and last == "norm_scale":
                norm_layer.bias.requires_grad_(False)
            layers.append(norm_layer)
        if hidden:
            layers.append(nn.ReLU(inplace=True) if activation is nn.ReLU else activation())
    return nn.Sequential(*layers)


def hidden_widths(layers: int, hidden_dim: int | None, width: int = 0) -> list[int]:
    """Return the widths of the hidden layers of a head with this number of linear layers.

    Args:
        layers: linear layers, at least 1.
        hidden_dim: width of each hidden layer; None is `width`.
        width: width of the features.
    """
    if layers < 1:
        raise ValueError(f"a head needs at least 1 linear layer, not {layers}")
    return [width if hidden_dim is None else hidden_dim] * (layers - 1)


class Prototypes(nn.Module):
    """Cosines of rows with learned unit vectors: (N, dim) -> (N, count), in float32 or wider.

    Args:
        dim: width of the rows.
        count: number of prototypes.
        through: whether the gradient passes through the normalisation of the vectors (a weight-normalised layer of gain
            1, as in DINO); otherwise the vectors are used directly, and `restore` normalises them after the
            optimiser step (as in SwAV).
    """

    def __init__(self, dim: int, count: int, through: bool = False) -> None:
        super().__init__()
        check_range(2, num_prototypes=count)  # a soft-max over one of them is constant
        self.through = through
        self.weight = nn.Parameter(normalize(torch.randn(count, dim)))

    def forward(self, x: Tensor) -> Tensor:
        weight = normalize(self.weight) if self.through else self.weight
        return product(normalize(x), weight.T)

    @torch.no_grad()
    def restore(self) -> Tensor:
        """Normalise the vectors in place and return them, (count, dim), without gradient.

        Unit vectors stay as they are, to the bit: a layer that has not learned equals the initial one.
        """
        rounding = 16 * torch.finfo(self.weight.dtype).eps
        changed = (self.weight.norm(dim=1, keepdim=True) - 1).abs() > rounding
        return self.weight.copy_(torch.where(changed, normalize(self.weight), self.weight)).detach()
