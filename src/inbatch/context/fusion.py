"""Batch fusion: the images of a context group are mixed before the encoder, by layers trained with the loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.context.grouped import Grouped
from inbatch.errors import ConfigError

Tokens = Float[Tensor, "g p d"]
"""The patches of a group's images: G samples, P positions, d = p * p * C values."""


def patches(images: Float[Tensor, "g c h w"], p: int) -> Tokens:
    """Cut images into squares of p pixels, one row each (BA-SSL, Eq. 2; pixel rows, then columns, then channels)."""
    g, c, h, w = images.shape
    return images.reshape(g, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(g, -1, p * p * c)


def restore(tokens: Tokens, p: int, shape: Sequence[int]) -> Float[Tensor, "g c h w"]:
    """Return the images of this shape from their `patches` (Eq. 4)."""
    g, c, h, w = shape
    return tokens.reshape(g, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(g, c, h, w)


class Fusion(Grouped):
    """Mix the images of a group: each output image contains a part of the others; the identity in evaluation.

    I'' = relu(I + restore(T')), T' = F(T) + T per layer (Eq. 3 to 5). A subclass provides the layers F. Without layers
    the images are unchanged (the baseline of Table 4).
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        patch: int,
        relu: bool,
        where: Literal["after", "before"],
        views: tuple[int, ...] | None,
        target: Literal["copy", "shared", "none"],
        remember: Literal["plain", "all"],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.patch, self.relu, self.where = patch, relu, where
        self.views, self.target, self.remember = views, target, remember
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Fuse normalised images of a group, or this process's part of them; the number of images is unchanged."""
        if not self.mixes_samples or not self.layers:
            return images
        x = self.gather(images * self.std + self.mean if self.where == "before" else images)
        tokens = patches(x, self.patch)
        for layer in self.layers:
            tokens = layer(tokens).to(x.dtype) + tokens
        fused = x + restore(tokens, self.patch, x.shape)
        fused = self.own(fused.relu() if self.relu else fused)
        return (fused - self.mean) / self.std if self.where == "before" else fused


class ConvFusion(Fusion):
    """Batch fusion of BA-SSL (arXiv 2311.09974): the samples of a group are the channels of convolutions.

    The weights depend on the number G and the order of the samples: another group size does not fit.

    patch: side of the patches in pixels; by default 16, 8 below 128 pixels and 4 below 48, or the next smaller one
        that divides the side.
    bottleneck: the first 1x1 convolution reduces a group of G samples to G / bottleneck channels.
    layers: embedding layers, 0 to 3.
    relu: apply it to the fused image, as in Eq. 5; Algorithm 1 has none.
    where: "after" or "before" the images are normalised by mean and standard deviation.
    views: which views are fused, counted from 0; by default the second (as in the paper), or the last view of the
        online network if there is no second.
    target: the target network fuses with a slow "copy", with the "shared" current weights (Algorithm 1), or "none".
    remember: the norm statistics for evaluation are those of "plain" views only, if there are any, or of "all".
    """

    def __init__(
        self, group: int, size: int, mean: Sequence[float], std: Sequence[float], patch: int | None = None,
        bottleneck: int = 4, layers: int = 1, relu: bool = False, where: Literal["after", "before"] = "after",
        views: tuple[int, ...] | None = None, target: Literal["copy", "shared", "none"] = "copy",
        remember: Literal["plain", "all"] = "plain",
    ) -> None:  # fmt: skip
        if bottleneck < 1 or group < bottleneck:
            raise ConfigError(
                f"fuse.bottleneck = {bottleneck} leaves a context of {group} no channel: choose 1 to {group}"
            )
        blocks = [_Convolutions(group, group // bottleneck) for _ in range(_layers(layers))]
        super().__init__(
            blocks, patch=patch_for(size, patch), relu=relu, where=where, views=views, target=target, remember=remember,
            mean=mean, std=std,
        )  # fmt: skip


class SetFusion(Fusion):
    """Order-independent batch fusion of this library: attention across the samples of a group at each patch position.

    All samples share the weights: any group size fits, and permuted images give permuted results.

    patch, layers, relu, where, views, target, remember: as in conv.
    width: of queries, keys and values.
    heads: number of attention heads.
    """

    def __init__(
        self, group: int, size: int, mean: Sequence[float], std: Sequence[float], patch: int | None = None,
        width: int = 64, heads: int = 4, layers: int = 1, relu: bool = False,
        where: Literal["after", "before"] = "after", views: tuple[int, ...] | None = None,
        target: Literal["copy", "shared", "none"] = "copy", remember: Literal["plain", "all"] = "plain",
    ) -> None:  # fmt: skip
        if heads < 1 or width < heads or width % heads:
            raise ConfigError(f"fuse.heads = {heads} does not divide fuse.width = {width}: choose a divisor")
        p = patch_for(size, patch)
        blocks = [_Attention(p * p * len(mean), width, heads) for _ in range(_layers(layers))]
        super().__init__(
            blocks, patch=p, relu=relu, where=where, views=views, target=target, remember=remember, mean=mean, std=std
        )


class _Convolutions(nn.Module):
    """F of Eq. 3 over a plane of P x d: 1x1 down, 1x1 up, 3x3, each with InstanceNorm, Mish between."""

    def __init__(self, group: int, narrow: int) -> None:
        super().__init__()
        widths = ((group, narrow, 1), (narrow, group, 1), (group, group, 3))
        steps: list[nn.Module] = []
        for into, out, kernel in widths:
            # The norm would remove a bias.
            steps += [nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False), _InstanceNorm(), nn.Mish()]
        self.steps = nn.Sequential(*steps[:-1])

    def forward(self, tokens: Tokens) -> Tokens:
        return self.steps(tokens[None])[0]


class _InstanceNorm(nn.Module):
    """InstanceNorm over the positions, flattened.

    With two dimensions of positions, torch 2.11 to 2.15 return wrong gradients for a batch of one in channels-last on a
    CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.instance_norm(x.flatten(2)).unflatten(2, x.shape[2:])


class _Attention(nn.Module):
    """Attention of every patch to the patches of the whole group at its position, then InstanceNorm, as in conv."""

    def __init__(self, values: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(values)
        self.into = nn.Linear(values, 3 * width)
        self.out = nn.Linear(width, values)

    def forward(self, tokens: Tokens) -> Tokens:
        parts = self.into(self.norm(tokens)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3) for x in parts)
        met = attention(q, k, v)  # (P, heads, G, width / heads)
        return nn.functional.instance_norm(self.out(met.permute(2, 0, 1, 3).flatten(2))[:, None])[:, 0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute scaled dot-product attention by MKL, also while other float32 products are computed by oneDNN.

    A run on an AMD processor sets oneDNN, which is faster for large products and four times slower for these.
    """
    onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    if onednn and q.device.type == "cpu" and q.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return _ByMkl.apply(q, k, v)
    return nn.functional.scaled_dot_product_attention(q, k, v)


@contextmanager
def _mkl() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _ByMkl(torch.autograd.Function):
    """Attention that is computed by MKL in both passes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        with _mkl(), torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in inputs]
            ctx.output = nn.functional.scaled_dot_product_attention(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        with _mkl():
            return torch.autograd.grad(ctx.output, ctx.inputs, gradients[0])


FUSIONS: dict[str, type[Fusion]] = {"conv": ConvFusion, "set": SetFusion}
"""Name -> batch fusion. The run provides the first four arguments; the others are options."""


def patch_for(size: int, patch: int | None) -> int:
    """Return the side of the patches for images of this side; ConfigError if the images cannot be divided into them."""
    if patch is None:
        most = 16 if size >= 128 else 8 if size >= 48 else 4
        return max(p for p in range(1, most + 1) if size % p == 0)
    if patch < 1 or size % patch:
        fitting = ", ".join(str(p) for p in range(1, size) if size % p == 0)
        raise ConfigError(f"fuse.patch = {patch} does not divide views of {size} pixels: choose one of {fitting}")
    return patch


def _layers(count: int) -> int:
    if not 0 <= count <= 3:
        raise ConfigError(f"fuse.layers = {count}: batch fusion has 0 to 3 embedding layers")
    return count
