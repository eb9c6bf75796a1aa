"""LoRA: train low-rank matrices that are added to the frozen linear layers of an encoder (Hu et al. 2021).

arXiv 2106.09685. The library peft adds them. What is saved is a plain encoder, which contains the sums W + B A.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError, many
from inbatch.models.encoder import Encoder
from inbatch.models.network import norms


def add_lora(encoder: Encoder, rank: int) -> str:
    """Freeze an encoder, and add matrices A (random) and B (zero) to its linear layers; its features do not change.

    A layer gets them if the forward pass calls it: the weights of other linear layers are read by other code, such as
    torch's multi-head attention.

    Args:
        encoder: the encoder; its other weights no longer require a gradient.
        rank: rank of the matrices.

    Returns:
        A sentence with the layers and the number of parameters that learn.

    Raises:
        ConfigError: if the encoder has attention blocks or no such layer, or peft is missing.
    """
    if encoder.attend:
        raise ConfigError(
            f"encoder.lora freezes the encoder, the blocks of attend.name={encoder.attend['name']} could not learn: "
            "leave out one of the two settings"
        )
    names = _linear_layers(encoder)
    if not names:
        raise ConfigError(
            f"encoder.lora: {encoder.name} has no linear layers, to which LoRA could be added: choose a ViT, or leave "
            "out encoder.lora to train all weights"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f'encoder.lora needs peft ({error}): pip install "inbatch[lora]"') from error
    encoder.requires_grad_(False)
    # A pattern of whole names: peft compares the names of a list with the ends of names.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names)))
    inject_adapter_in_model(config, encoder.backbone)
    encoder.lora = rank
    kinds = ", ".join(dict.fromkeys(re.sub(r"^.*\.(?=.*[^\d.])", "", name) for name in names))
    learning = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    total = sum(p.numel() for p in encoder.parameters()) - learning
    return (
        f"LoRA of rank {rank} in {many(len(names), 'linear layer')} ({kinds}): {learning:,} parameters learn, and "
        f"the {total:,} of {encoder.name} are frozen"
    )


def _linear_layers(encoder: Encoder) -> list[str]:
    """Return the names of the linear layers of the backbone that its forward pass calls."""
    called: dict[str, None] = {}

    def hook(name: str) -> Any:
        return lambda *_: called.setdefault(name)

    layers = {name: m for name, m in encoder.backbone.named_modules() if name and type(m) is nn.Linear}
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        # With gradients: torch's transformer layers otherwise take a fast path, which calls no layer.
        with encoder.evaluating(), torch.enable_grad():
            encoder(torch.zeros(1, encoder.channels, encoder.size, encoder.size, device=encoder.device))
    finally:
        for handle in hooks:
            handle.remove()
    return [name for name in layers if name in called]


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain encoder, with W + B A, from those of an encoder with LoRA; needs no peft."""
    plain = {}
    for key, value in weights.items():
        layer, inside, last = key.rpartition(".base_layer.")
        if inside:
            if last == "weight":
                a, b = (weights[f"{layer}.lora_{matrix}.default.weight"].double() for matrix in "AB")
                value = (value.double() + b @ a).to(value.dtype)
            plain[f"{layer}.{last}"] = value
        elif not re.search(r"\.lora_[AB]\.default\.weight$", key):
            plain[key] = value
    return plain


def merge_(encoder: Encoder) -> None:
    """Replace the linear layers with LoRA by plain ones with the weights W + B A; nothing is frozen afterwards."""
    if encoder.lora is None:
        return
    backbone: Any = encoder.backbone
    weights = merged(backbone.state_dict())
    for name, module in list(backbone.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            backbone.set_submodule(name, module.base_layer)
    backbone.load_state_dict(weights)
    del backbone.peft_config
    encoder.lora = None
    encoder.requires_grad_(True)
    for norm in norms(encoder):
        norm.track_running_stats = True


def plain_backbone(encoder: Encoder) -> nn.Module:
    """Return the backbone, without LoRA: its own, or a copy with the merged weights."""
    if encoder.lora is None:
        return encoder.backbone
    encoder = copy.deepcopy(encoder)
    merge_(encoder)
    return encoder.backbone
