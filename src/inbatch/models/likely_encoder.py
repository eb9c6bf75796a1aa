"""The encoder whose weights a file holds, by the names and shapes of its tensors."""

import re
from pathlib import Path

import torch

from inbatch.errors import InbatchError
from inbatch.models.backbones import build
from inbatch.models.exact_weights import QUICK_GELU, activation, has_biases
from inbatch.models.hub_weights import folder_weights, hub_config, is_hub, read_config, read_hub
from inbatch.models.published_weights import counted, match
from inbatch.models.weight_files import Contents, is_sharded, read_contents
from inbatch.models.weight_names import Tensors, namings

_BLOCK = re.compile(r"(?:^|\.)(?:layer)?(\d)\.(\d+)\.conv\d\.weight$")
"""Name of a convolution in a block of a ResNet, also within an `nn.Sequential`."""

_BLOCKS: dict[tuple[int, ...], str] = {
    (2, 2, 2, 2): "resnet18", (1, 1, 1, 1): "resnet10", (3, 4, 6, 3): "resnet34", (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}  # fmt: skip
"""Numbers of blocks in the stages of a ResNet -> its name; with bottlenecks, resnet34 is resnet50."""
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""Width of a vision transformer -> part of its name."""


def likely_encoder(contents: Contents) -> str | None:
    """Return the ResNet or vision transformer that the weights of a file fill completely; None if it is none of timm's.

    The stem may differ.
    """
    name = next(filter(None, (_guess(tensors) for tensors in namings(contents.tensors))), None)
    if name is None:
        return None
    if activation(contents) == "quick_gelu":
        name = name.replace("_clip_", f"_clip_{QUICK_GELU}_")
    if name.endswith("_dinov3") and has_biases(contents):
        name += "_qkvb"
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            backbone, _ = build(name, 518 if "dinov2" in name else 224, 3, {})
    except InbatchError:  # timm has no such transformer
        return None
    best, own = match(backbone, contents, 3), counted(backbone.state_dict())
    return name if not best.deeper and sum(key in best.tensors for key in own) >= len(own) - 1 else None


def _guess(tensors: Tensors) -> str | None:
    """Return the name of an encoder by the numbers of its blocks and its width."""
    patches = next((v for k, v in tensors.items() if k.endswith("patch_embed.proj.weight") and v.ndim == 4), None)
    if patches is not None and patches.shape[0] in _WIDTHS:
        start, words = f"vit_{_WIDTHS[patches.shape[0]]}_patch{patches.shape[-1]}", " ".join(tensors)
        if "storage_tokens" in words or ("reg_token" in words and ".gamma_1" in words):
            return f"{start}_dinov3"
        if "norm_pre.weight" in words:
            return f"{start}_clip_224"
        registers = "reg4_" if "register_tokens" in words or "reg_token" in words else ""
        return f"{start}_{registers}dinov2" if ".ls1.gamma" in words else f"{start}_224"
    blocks = {(int(m[1]), int(m[2])) for m in map(_BLOCK.search, tensors) if m}
    stages = sorted({stage for stage, _ in blocks})
    counts = tuple(1 + max(block for one, block in blocks if one == stage) for stage in stages)
    name = _BLOCKS.get(counts)
    if name is None or not any(_BLOCK.search(key) and key.endswith(".conv3.weight") for key in tensors):
        return name
    if name == "resnet34":
        wide = any(key.endswith(f"{stages[0]}.0.conv2.weight") and v.shape[0] == 128 for key, v in tensors.items())
        return "wide_resnet50_2" if wide else "resnet50"
    return name if name in ("resnet101", "resnet152") else None


def encoder_of_weights(init: str | Path) -> str | None:
    """Return the encoder of weights of another program; None if it is not one of the usual ones.

    Args:
        init: A name of `hub_weights`, a folder in its layout, whose config.json may state the architecture, or a file.
    """
    import timm

    try:
        config = hub_config(str(init)) if is_hub(init) else read_config(Path(init) / "config.json")
        name = config.get("architecture")
        if isinstance(name, str) and timm.is_model(name):
            return name
        if is_hub(init):
            return likely_encoder(read_hub(str(init))[0])
        path = Path(init)
        if path.is_file() or is_sharded(path):
            return likely_encoder(read_contents(path))
        weights = folder_weights(path)
        return None if weights is None else likely_encoder(weights[0])
    except InbatchError:
        return None  # reported when the weights are loaded
