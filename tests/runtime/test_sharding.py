"""Sharded encoders: results are those of DistributedDataParallel."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
from rank_pool import on_ranks
from small_methods import train
from torch import nn

from inbatch.errors import ConfigError
from inbatch.models import create_encoder
from inbatch.models.network import Network
from inbatch.models.recompute import blocks, recompute_activations
from inbatch.runtime import sharding
from inbatch.training import grad_cache
from inbatch.training.build_checks import check_recompute
from inbatch.training.recipe import make


def vit() -> nn.Module:
    """A ViT of two blocks, without dropout, for the images of `small_methods`."""
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=6, patch_size=3, embed_dim=12, depth=2, num_heads=3
    )


def compared(variant: str, groups: int, options: Mapping[str, Any]) -> float:
    """Return the largest difference of the state after two steps with and without shards."""
    plain, divided = (train(variant, 16, groups, 2, shard=shard, **options) for shard in (False, True))
    assert plain.keys() == divided.keys()
    return max(float(np.abs(np.subtract(plain[key], divided[key])).max(initial=0.0)) for key in plain)


def all_compared(cases: list[tuple[str, int, dict[str, Any]]]) -> dict[str, float]:
    """Return the differences of some cases, and those of the units of a ViT from its blocks and its bytes."""
    torch.manual_seed(0)
    differences = {
        f"{variant} {groups} {options}": compared(variant, groups, options) for variant, groups, options in cases
    }
    encoder = vit()
    sharding.shard(encoder, blocks(encoder), torch.device("cpu"))
    sizes, numbers = sharding.unit_sizes(encoder), sum(p.numel() for p in encoder.parameters())
    return differences | {"units": abs(len(sizes) - 3), "bytes": abs(sum(sizes) - 4 * numbers)}


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mocov3", 2, {"make": vit, "plugs": ("curate",)}), ("byol", 1, {"optimizer": "lars", "plugs": ("strict",)}),
]  # fmt: skip
"""Variant, context groups and options. AdamW is not for the ViT: it amplifies the rounding of gradients that are 0."""
MORE: list[tuple[str, int, dict[str, Any]]] = [
    ("simclr", 1, {"make": vit}), ("lejepa", 2, {"make": vit}), ("swav", 1, {}), ("sigmoid", 1, {}),
    ("byol", 2, {"optimizer": "lars"}), ("dino", 1, {"frozen": 1, "optimizer": "adamw"}),
    ("byol", 1, {"synced": True}), ("byol", 2, {"plugs": ("shuffle",)}),
    ("pcl", 1, {"plugs": ("group",)}),
]  # fmt: skip


def test_shards_give_the_results_of_ddp() -> None:
    for differences in on_ranks(2, all_compared, CASES):
        assert max(differences.values()) < 1e-10, differences


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_of_other_methods_and_numbers_of_ranks(world: int) -> None:
    for differences in on_ranks(world, all_compared, CASES + MORE):
        assert max(differences.values()) < 1e-10, differences


def test_lists_of_blocks() -> None:
    assert [type(block).__name__ for block in blocks(vit())] == ["Block", "Block"]
    small = timm.create_model("resnet18", num_classes=0, layers=[1, 1, 1, 1])  # stages of one block are not units
    assert [type(block).__name__ for block in blocks(small)] == ["Conv2d", "BatchNorm2d"] + ["BasicBlock"] * 4
    resnet = timm.create_model("resnet18", num_classes=0)
    assert [type(block).__name__ for block in blocks(resnet)] == ["BasicBlock"] * 8
    assert [type(block).__name__ for block in blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))] == [
        "Linear",
        "Linear",
    ]


def test_altered_images_are_refused_for_norm_layers_that_are_computed_again() -> None:
    settings = {"data": "digits-canvas", "preset": "digits", "mix.name": "imix", "checkpoint_activations": True}
    check_recompute(make(settings), vit())
    with pytest.raises(ConfigError, match="checkpoint_activations and mix exclude"):
        check_recompute(make(settings), nn.BatchNorm2d(2))


def after_a_step(network: Network) -> list[torch.Tensor]:
    """Return the gradients and the buffers of an encoder after a training step's passes, with dropout."""
    images = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
    forward = grad_cache.forward_groups(network, network, [lambda: images], [0], [7], True)
    grad_cache.backward_groups(forward, network, network, {"features": forward.rows["features"].clone()})
    return [p.grad for p in network.parameters() if p.grad is not None] + list(network.buffers())


@pytest.mark.parametrize("name", ["resnet10", "fast", "torchvision/resnet18"])
def test_activations_that_are_computed_again_change_no_bit(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"width": 8} if name == "fast" else {"stem": "imagenet"}
    plain = Network(create_encoder(name, size=16, **options), {}, ())
    plain.reads, plain.heads = ("features",), nn.ModuleDict()
    again = copy.deepcopy(plain)
    recompute_activations(again.encoder)
    again.recomputes = True
    kept: dict[int, int] = {}

    def count(x: torch.Tensor) -> torch.Tensor:
        kept[-1] = kept.get(-1, 0) + x.numel()
        return x

    sizes = []
    for network in (copy.deepcopy(plain), copy.deepcopy(again)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            network([torch.zeros(2, 3, 16, 16)])
        sizes.append(kept.get(-1, 0))
    assert sizes[1] < 0.6 * sizes[0]
    for one, two in zip(after_a_step(plain), after_a_step(again), strict=True):
        assert torch.equal(one, two)
