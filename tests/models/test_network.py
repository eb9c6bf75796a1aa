"""Grouping of views in the network: in one pass if samples do not interact in the encoder, with its memory layout."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from inbatch.api import prepare
from inbatch.models.network import Network, mixes
from inbatch.nn.heads import Head, mlp


class Encoder(nn.Module):
    """Record the number of images of every call."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.layers(x)


def network(norm: nn.Module) -> Network:
    torch.manual_seed(0)
    return Network(Encoder(norm), {"projection": Head(mlp(8, 8, 4))}, ("projection",)).double()


def views(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize(
    "norm, sizes, calls",
    [
        (nn.GroupNorm(2, 8), (8, 8), [10]),
        (nn.GroupNorm(2, 8), (8, 8, 6, 6, 6), [10, 15]),
        (nn.GroupNorm(2, 8), (8, 6, 8), [5, 5, 5]),
        (nn.BatchNorm2d(8), (8, 8), [5, 5]),
        (nn.BatchNorm2d(8, track_running_stats=False), (8, 8), [5, 5]),
    ],
)
def test_views_of_one_size_run_together_if_samples_do_not_interact(
    norm: nn.Module, sizes: Sequence[int], calls: list[int]
) -> None:
    """The heads still normalise every view separately; all results equal those of single views."""
    one = network(norm)
    apart = copy.deepcopy(one)
    rows = one(views(*sizes))["projection"]
    assert one.encoder.calls == calls
    literal = torch.stack([apart.outputs(view)["projection"] for view in views(*sizes)])
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for output in (rows, literal):
        (output * weight).sum().backward()
    torch.testing.assert_close(rows, literal, rtol=0, atol=1e-12)
    for p, q in zip(one.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    for (name, mine), other in zip(one.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["ba2m", "batchformer"])
def test_attention_over_samples_mixes(name: str) -> None:
    built = prepare("digits-canvas", attend=name, batch_size=64)
    own = nn.Identity()
    own.mixes = True
    assert mixes(nn.Sequential(own))
    assert mixes(built.encoder) and not mixes(nn.LayerNorm(4)) and mixes(nn.Sequential(nn.BatchNorm1d(4)))


@pytest.mark.slow
@pytest.mark.parametrize("plugs", [{}, {"fuse": "conv"}, {"fuse": "set"}, {"attend": "ba2m"}, {"attend": "cbam"}])
def test_channels_stay_last_through_the_backbone(plugs: dict[str, str]) -> None:
    """For every module before or parallel to a convolution: a copy into another layout costs more than most layers."""
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    built = prepare(images, encoder="resnet10", batch_size=8, **plugs)
    seen: list[str] = []

    def look(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert output.is_contiguous(memory_format=torch.channels_last), f"{name} {tuple(output.shape)}"
            seen.append(name)

        built.encoder.get_submodule(name).register_forward_hook(hook)

    for name, module in built.encoder.named_modules():
        if isinstance(module, nn.Conv2d) and min(module.in_channels, module.out_channels) > 2 and ".se" not in name:
            look(name)
    built.step(next(iter(built.loader.epoch(0))), 0)
    assert len(seen) >= 20
    assert all(
        p.grad.is_contiguous(memory_format=torch.channels_last)
        for p in built.encoder.parameters()
        if p.ndim == 4 and p.grad is not None
    )
