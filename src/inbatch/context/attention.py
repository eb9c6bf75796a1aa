"""Attention over the samples of a context group: on feature maps (BA2M) and on pooled features (BatchFormer).

The first argument of a block's constructor depends on its place: `channels` of a map, or `width` of features.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.context.grouped import Grouped
from inbatch.errors import ConfigError


class BA2M(Grouped):
    """Batch-aware attention (Cheng et al. 2021, arXiv 2103.15099; reimplemented, as there is no public code).

    (G, C, H, W) -> (G, C, H, W). Three branches give every sample an attention representation of the shape of its map,
    independent of the other samples; a softmax over the group, times G, turns it into weights with mean 1 over the
    samples. A learned gain on the logits starts at 0: initially every weight is 1. In evaluation, the map is returned
    unchanged. ConfigError for invalid settings.

    reduction: the branches use this fraction of the channels, 1 / reduction, and at least 8.
    positions: side of the largest map on which all positions attend to each other; larger maps are average-pooled.
    fuse: the three branches are added ("sum"), or the largest is used ("max").
    weight: one per sample ("sample": the representation averaged over channels and positions), per sample and channel
        ("channel": averaged over positions), or per sample, channel and position ("full").
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        positions: int = 16,
        fuse: Literal["sum", "max"] = "sum",
        weight: Literal["sample", "channel", "full"] = "sample",
    ) -> None:
        super().__init__()
        if min(reduction, positions) < 1:
            raise ConfigError(f"ba2m needs reduction and positions of 1 or more, not {reduction} and {positions}.")
        if fuse not in ("sum", "max") or weight not in ("sample", "channel", "full"):
            raise ConfigError(
                f'ba2m: fuse is "sum" or "max", weight is "sample", "channel" or "full", not {fuse!r} and {weight!r}.'
            )
        self.positions, self.fuse, self.weight = positions, fuse, weight
        inner = max(channels // reduction, 8)
        # A bias of the last layers would cancel in the softmax over samples, and a bias of the keys in the softmax over
        # positions: neither would ever have a gradient.
        self.channel = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.ReLU(inplace=True), nn.Conv2d(inner, channels, 1, bias=False)
        )
        self.local = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
        )
        self.qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "g c h w"]) -> Float[Tensor, "g c h w"]:
        return x * self.weights(x).to(x.dtype) if self.mixes_samples else x

    def representation(self, x: Float[Tensor, "g c h w"]) -> Float[Tensor, "g c h w"]:
        """Return the sample-wise attention representation; each sample's is independent of the others."""
        branches = self.channel(x.mean((2, 3), keepdim=True)).expand_as(x), self.local(x), self._global(x)
        if self.fuse == "sum":
            return branches[0] + branches[1] + branches[2]
        return torch.maximum(torch.maximum(branches[0], branches[1]), branches[2])

    def weights(self, x: Float[Tensor, "g c h w"]) -> Float[Tensor, "g c1 h1 w1"]:
        """Return the weights of the samples, in float32 or wider: (G, 1, 1, 1), (G, C, 1, 1) or (G, C, H, W).

        They are the weights of training in every mode; no state is changed.
        """
        sar = self.representation(x)
        sar = sar.to(torch.promote_types(sar.dtype, torch.float32))
        over = {"sample": (1, 2, 3), "channel": (2, 3), "full": ()}[self.weight]
        logits = self.gather(self.gain * (sar.mean(over, keepdim=True) if over else sar))
        return self.own(len(logits) * logits.softmax(0))

    def _global(self, x: Tensor) -> Tensor:
        """Let all positions of a map attend to each other."""
        height, width = x.shape[2:]
        side = -(-max(height, width) // self.positions)
        small = F.avg_pool2d(x, side, ceil_mode=True) if side > 1 else x
        q, k, v = self.qkv(small).flatten(2).chunk(3, 1)
        attention = (q.mT @ k / q.shape[1] ** 0.5).softmax(2)
        output = self.expand((v @ attention.mT).unflatten(2, small.shape[2:]))
        return F.interpolate(output, scale_factor=side)[..., :height, :width] if side > 1 else output


class BatchFormer(Grouped):
    """Self-attention over the samples (Hou, Yu and Tao 2022, arXiv 2203.01522), here as a pre-norm layer.

    (G, width) -> (G, width): attention over the group, then a small network, each added to its input; both start at 0,
    so that features are initially unchanged. In evaluation, features are always unchanged. ConfigError for settings
    that do not fit.

    heads: number of attention heads; width must be a multiple.
    hidden_dim: width of the hidden layer of the network; None: that of the features.
    keep: share of the samples, drawn at random in each call, that keep plain features in training. It replaces the
        paper's second copy of the batch, which passes the shared classifier without the layer; without plain features
        in training, the layers after it would never see the features of evaluation.
    """

    def __init__(self, width: int, heads: int = 4, hidden_dim: int | None = None, keep: float = 0.5) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"batchformer: {heads} heads do not divide features of width {width}; choose a divisor.")
        if not 0 <= keep < 1:
            raise ConfigError(f"batchformer: keep is a share from 0 to below 1, not {keep}.")
        if hidden_dim is not None and hidden_dim < 1:
            raise ConfigError(f"batchformer: hidden_dim is a width of 1 or more, not {hidden_dim}.")
        self.heads, self.keep = heads, keep
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden_dim or width), nn.GELU(), nn.Linear(hidden_dim or width, width)
        )
        for last in (self.out, self.mlp[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "g f"]) -> Float[Tensor, "g f"]:
        if not self.mixes_samples:
            return x
        attention, values = self._attention(x)
        y = x + self.out((attention.transpose(0, 1) @ values).transpose(0, 1).flatten(1))
        y = y + self.mlp(y)
        if not self.training:
            return y
        return torch.where(torch.rand(len(x), 1, device=x.device) < self.keep, x, y)

    def weights(self, x: Float[Tensor, "g f"]) -> Float[Tensor, "g heads n"]:
        """Return the attention of every sample to the N samples of the whole group, in every mode; rows sum to 1."""
        return self._attention(x)[0]

    def _attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (G, heads, N) and the values (heads, N, width / heads) of the whole group."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, 1)
        k, v = self.gather(torch.cat([k, v], 1)).chunk(2, 1)
        q, k, v = (part.unflatten(1, (self.heads, -1)).transpose(0, 1) for part in (q, k, v))
        return (q @ k.mT / q.shape[2] ** 0.5).softmax(2).transpose(0, 1), v
