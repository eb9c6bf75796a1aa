"""Layers of a backbone, from its input to its output, for learning rates that decrease towards the input."""

from typing import Any

from torch import nn


def layer_numbers(backbone: Any) -> dict[str, int]:
    """Return the number of the layer of every parameter by name, from 0 at the input.

    timm's models define their layers: the stem and the blocks of a ResNet or a ViT. The layers of another model are its
    parts with weights in the order of its definition; norm layers belong to the part before them.

    Args:
        backbone: model of timm, torchvision or this library, or another module.
    """
    if hasattr(backbone, "group_matcher"):
        from timm.models import group_parameters

        grouped: dict[str, int] = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
        return grouped
    numbers, number = dict[str, int](), -1
    for prefix, part in weighted_parts(backbone):
        named = list(part.named_parameters(prefix))
        number += any(p.ndim > 1 for _, p in named)
        numbers |= dict.fromkeys((name for name, _ in named), max(number, 0))
    return {name: numbers.get(name, 0) for name, _ in backbone.named_parameters()}


def weighted_parts(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Return the children that have parameters; if one child has all of them, the children of that child."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children() if list(child.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    if len(children) == 1 and not own and (inner := weighted_parts(children[0][1], f"{children[0][0]}.")):
        return inner
    return children
