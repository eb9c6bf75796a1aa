"""Weights that samples give each other by attention over the batch: measurements and an image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from inbatch.apps.reports.picture_sheet import Row, pixels, sheet, tile
from inbatch.context.attention import BA2M, BatchFormer
from inbatch.context.grouped import as_group
from inbatch.models.attention_slots import blocks
from inbatch.training.build import RunComponents

NEIGHBOURS, BLOCKS = 5, 3
"""Number of other samples shown per attending sample, and number of last blocks drawn."""


def attended(built: RunComponents, group: Sequence[Tensor], count: int) -> tuple[dict[str, Any], Image.Image | None]:
    """Measure the weights that the samples of a context group give each other in every attention block.

    Returns:
        Mean, smallest and largest weight of each block, and an image; no blocks and None if no block mixes samples.
    """
    network, encoder = built.network, built.encoder
    online_views = list(built.method.online_views(len(group)))
    number = next((v for v in online_views if v not in network.fused), online_views[0])
    seen: dict[str, Tensor] = {}

    def hook(slot: str) -> Callable[..., None]:
        def record(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(block, BA2M | BatchFormer)
            seen[slot] = block.weights(inputs[0]).float().cpu()

        return record

    pairs = list(zip(encoder.slots, blocks(encoder), strict=True))
    handles = [b.register_forward_pre_hook(hook(slot)) for slot, b in pairs if isinstance(b, BA2M | BatchFormer)]
    images = group[number]
    try:
        with network.evaluating(), as_group(network):
            if number in network.fused and network.fuse is not None:
                with network.autocast(images):
                    images = network.fuse(images)
            network.features(images)
    finally:
        for handle in handles:
            handle.remove()
    measured = [
        {"block": slot, "mean": float(w.mean()), "least": float(w.min()), "largest": float(w.max())}
        for slot, w in seen.items()
    ]
    described = {"name": encoder.attend["name"] if encoder.attend else "", "view": number, "group": len(images)}
    described["blocks"] = measured
    if not seen:
        return described, None
    pictures = [tile(image) for image in pixels(built, group[number])]
    if isinstance(pairs[0][1], BatchFormer):
        return described, _neighbours(pictures, next(iter(seen.values())).mean(1), count)
    return described, _weighed(pictures, {slot: w.flatten(1).mean(1) for slot, w in seen.items()}, count)


def _weighed(pictures: Sequence[Image.Image], weights: dict[str, Tensor], count: int) -> Image.Image:
    """Draw images of the group in the order of their BA2M weights, one row for each of the last blocks."""
    lines = []
    for slot, weight in list(weights.items())[-BLOCKS:]:
        order = weight.argsort(descending=True)
        places = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()
        chosen = order[places].tolist()
        lines.append(
            Row([(pictures[i], f"{weight[i]:.3f}") for i in chosen], f"block {slot.removeprefix('backbone.')}")
        )
    title = (
        f"Weights of the samples of a group of {len(pictures)} in the last blocks (mean 1), from the largest to the",
        "smallest, at even steps.",
    )
    return sheet(title, lines)


def _neighbours(pictures: Sequence[Image.Image], weights: Float[Tensor, "g n"], count: int) -> Image.Image:
    """Draw images with the other samples that they attend to most in BatchFormer."""
    others = weights.clone().fill_diagonal_(-1)
    near = others.topk(min(NEIGHBOURS, len(pictures) - 1)).indices.tolist()
    lines = [
        Row([(pictures[i], f"itself {weights[i, i]:.2%}"), *((pictures[j], f"{weights[i, j]:.2%}") for j in near[i])])
        for i in range(min(count, len(pictures)))
    ]
    title = (
        f"Samples that each image (left) attends to most in a group of {len(pictures)}; mean over heads.",
        f"Uniform weights would be {1 / len(pictures):.2%}.",
    )
    return sheet(title, lines)
