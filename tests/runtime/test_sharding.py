"""Sharded encoders: results are those of DistributedDataParallel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import timm
import torch
from rank_pool import on_ranks
from small_methods import train
from torch import nn

CASES = ["simclr", "lejepa", "byol", "mocov3", "dino", "swav", "sigmoid"]


def vit() -> nn.Module:
    """A ViT of two blocks, without dropout, for the images of `small_methods`."""
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=6, patch_size=3, embed_dim=12, depth=2, num_heads=3
    )


def compared(variant: str, groups: int, options: Mapping[str, Any]) -> float:
    """Return the largest difference of the state after three steps with and without shards."""
    plain, divided = (train(variant, 16, groups, 3, shard=shard, **options) for shard in (False, True))
    assert plain.keys() == divided.keys()
    return max(float(np.abs(np.subtract(plain[key], divided[key])).max(initial=0.0)) for key in plain)


def all_compared(cases: list[tuple[str, int, dict[str, Any]]]) -> dict[str, float]:
    torch.manual_seed(0)
    return {f"{variant} {groups} {options}": compared(variant, groups, options) for variant, groups, options in cases}


def test_shards_give_the_results_of_ddp() -> None:
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("simclr", 1, {"make": vit, "optimizer": "lars"}), ("lejepa", 2, {"make": vit}),
        ("byol", 2, {"optimizer": "lars"}), ("dino", 1, {"frozen": 1, "optimizer": "adamw"}),
        ("mocov3", 2, {"make": vit, "optimizer": "adamw"}), ("swav", 1, {}), ("sigmoid", 1, {}),
    ]  # fmt: skip
    for differences in on_ranks(2, all_compared, cases):
        assert max(differences.values()) < 1e-10, differences
