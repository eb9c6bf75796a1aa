"""Published weights that fit an encoder by name and shape, and with which it would compute something else."""

import re
from collections.abc import Mapping

from torch import nn

from inbatch.errors import ConfigError
from inbatch.models.weight_files import Contents

QUICK_GELU = "quickgelu"
_MARK = re.compile(r"(^|\.)(class_embedding|pre_layrnorm\.weight)$")
_OF_OPENAI = ("context_length", "input_resolution", "vocab_size")
"""Entries of the state dicts that OpenAI published, whose activation is quick GELU."""


def is_clip(contents: Contents) -> bool:
    """Return whether a file holds a vision transformer of CLIP."""
    return any(_MARK.search(name) for name in contents.tensors)


def activation(contents: Contents) -> str | None:
    """Return "gelu" or "quick_gelu", if the file or its configuration states it; it does not show in the tensors."""
    stated = contents.values.get("hidden_act")
    if isinstance(stated, str):
        return stated
    return "quick_gelu" if set(_OF_OPENAI) <= contents.tensors.keys() else None


def check_exact(backbone: nn.Module, name: str, contents: Contents) -> list[str]:
    """Return sentences on what a file does not state about weights of CLIP; empty for other weights.

    Raises:
        ConfigError: If the encoder cannot compute what the weights were trained for: CLIP's layer norm before the
            blocks, its activation, or the biases of DINOv3's queries and values.
    """
    own = backbone.state_dict()
    plain = "reg_token" in own and not any(key.endswith(("q_bias", "qkv.bias", "q_proj.bias")) for key in own)
    if plain and has_biases(contents):
        raise ConfigError(
            f"the weights are of DINOv3 with biases of queries and values, and {name} has none: choose {name}_qkvb"
        )
    return _check_clip(backbone, name, contents) if is_clip(contents) else []


def has_biases(contents: Contents) -> bool:
    """Return whether a file of DINOv3 has biases of queries or values that are not 0, in any of its layouts."""
    names = "".join(contents.tensors)
    if "storage_tokens" not in names and "layer.0.attention.q_proj" not in names:
        return False
    for name, tensor in contents.tensors.items():
        if name.endswith(("q_proj.bias", "v_proj.bias")) and bool(tensor.any()):
            return True
        if name.endswith("qkv.bias"):  # the key's part is masked
            query, _, value = tensor.chunk(3)
            if bool(query.any()) or bool(value.any()):
                return True
    return False


def _check_clip(backbone: nn.Module, name: str, contents: Contents) -> list[str]:
    modules: Mapping[str, nn.Module] = dict(backbone.named_modules())
    if not isinstance(modules.get("norm_pre"), nn.LayerNorm):
        raise ConfigError(
            f"the weights are of CLIP, whose vision transformers have a layer norm before the blocks (ln_pre), and "
            f"{name} has none: choose an encoder of CLIP, such as vit_base_patch16_clip_224"
        )
    quick = any("QuickGELU" in type(module).__name__ for module in modules.values())
    theirs = activation(contents)
    if theirs is None:
        ours = "quick GELU" if quick else "GELU"
        return [
            f"The file does not state the activation of CLIP; {name} computes {ours}. OpenAI's weights need quick GELU "
            f"(encoders with {QUICK_GELU} in their name), most others GELU"
        ]
    if theirs not in ("gelu", "quick_gelu"):
        raise ConfigError(
            f"the weights are of CLIP with the activation {theirs}, which timm's encoders of CLIP lack: choose other "
            "weights"
        )
    if (theirs == "quick_gelu") != quick:
        other = name.replace("_clip_", f"_clip_{QUICK_GELU}_") if not quick else name.replace(f"{QUICK_GELU}_", "")
        raise ConfigError(
            f"the weights are of CLIP with the activation {theirs}, and {name} computes "
            f"{'quick GELU' if quick else 'GELU'}: choose {other}"
        )
    return []
