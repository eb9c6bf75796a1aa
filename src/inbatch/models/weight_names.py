"""Names of tensors in weights that other libraries publish, translated to those of timm."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

_OF_VIT: Rules = (
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"attention\.attention\.(query|key|value)\.", r"attn.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.register_tokens$", "register_tokens"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
)
_OF_TORCHVISION: Rules = (
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"ln_([12])\.", r"norm\1."),
    (r"self_attention\.in_proj_(weight|bias)$", r"attn.qkv.\1"),
    (r"self_attention\.out_proj\.", "attn.proj."),
    (r"mlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"mlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"class_token$", "cls_token"),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.ln\.", "norm."),
)
_RESNETS = (
    ("conv1.", r"embedder\.embedder\.convolution\.", r"net\.0\.0\."),
    ("bn1.", r"embedder\.embedder\.normalization\.", r"net\.0\.1\.0\."),
    *((rf"layer{i + 1}.\1.", rf"encoder\.stages\.{i}\.layers\.(\d+)\.", rf"net\.{i + 1}\.blocks\.(\d+)\.")
      for i in range(4)),
    ("downsample.0.", r"shortcut\.convolution\.", r"projection\.shortcut\."),
    ("downsample.1.", r"shortcut\.normalization\.", r"projection\.bn\.0\."),
    *((f"conv{i + 1}.", rf"layer\.{i}\.convolution\.", rf"net\.{2 * i}\.(?=weight$)") for i in range(3)),
    *((f"bn{i + 1}.", rf"layer\.{i}\.normalization\.", rf"net\.{2 * i + 1}\.0\.") for i in range(3)),
)  # fmt: skip
"""Names of timm, of transformers and of SimCLRv2's conversion."""
_OF_TRANSFORMERS_RESNET: Rules = tuple((theirs, ours) for ours, theirs, _ in _RESNETS)
_OF_SIMCLR: Rules = tuple((theirs, ours) for ours, _, theirs in _RESNETS)
_OF_DINOV3: Rules = (
    (r"(model\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"attention\.q_proj\.", "attn.query."),
    (r"attention\.k_proj\.", "attn.key."),
    (r"attention\.v_proj\.", "attn.value."),
    (r"attention\.o_proj\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"embeddings\.register_tokens$", "storage_tokens"),
    (r"embeddings\.patch_embeddings\.(?=weight$|bias$)", "patch_embed.proj."),
)
"""To the names of DINOv3's authors, which timm converts."""
_OF_DINOV3_GATED: Rules = (
    *_OF_DINOV3, (r"mlp\.gate_proj\.", "mlp.w1."), (r"mlp\.up_proj\.", "mlp.w2."), (r"mlp\.down_proj\.", "mlp.w3.")
)  # fmt: skip
_OF_DINOV3_PLAIN: Rules = (*_OF_DINOV3, (r"mlp\.up_proj\.", "mlp.fc1."), (r"mlp\.down_proj\.", "mlp.fc2."))
_OF_CLIP: Rules = (
    (r"transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"ln_([12])\.", r"norm\1."),
    (r"attn\.in_proj_(weight|bias)$", r"attn.qkv.\1"),
    (r"attn\.out_proj\.", "attn.proj."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
    (r"class_embedding$", "cls_token"),
    (r"positional_embedding$", "pos_embed"),
    (r"conv1\.(?=weight$)", "patch_embed.proj."),
    (r"ln_pre\.", "norm_pre."),
    (r"ln_post\.", "norm."),
)
_OF_TRANSFORMERS_CLIP: Rules = (
    (r"encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"layer_norm([12])\.", r"norm\1."),
    (r"self_attn\.q_proj\.", "attn.query."),
    (r"self_attn\.k_proj\.", "attn.key."),
    (r"self_attn\.v_proj\.", "attn.value."),
    (r"self_attn\.out_proj\.", "attn.proj."),
    (r"embeddings\.class_embedding$", "cls_token"),
    (r"embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"post_layernorm\.", "norm."),
)
_FAMILIES: tuple[tuple[str, Rules], ...] = (
    (r"(^|\.)encoder\.layer\.0\.attention\.attention\.query\.weight$", _OF_VIT),
    (r"(^|\.)encoder\.layers\.encoder_layer_0\.", _OF_TORCHVISION),
    (r"(^|\.)layer\.0\.mlp\.gate_proj\.weight$", _OF_DINOV3_GATED),
    (r"(^|\.)layer\.0\.attention\.q_proj\.weight$", _OF_DINOV3_PLAIN),
    (r"(^|\.)transformer\.resblocks\.0\.attn\.in_proj_weight$", _OF_CLIP),
    (r"(^|\.)pre_layrnorm\.weight$", _OF_TRANSFORMERS_CLIP),
    (r"(^|\.)embedder\.embedder\.convolution\.weight$", _OF_TRANSFORMERS_RESNET),
    (r"(^|\.)net\.1\.blocks\.0\.projection\.shortcut\.weight$", _OF_SIMCLR),
    (r"(^|\.)blocks\.\d+\.\d+\.norm1\.weight$", ((r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),)),
    (r"(^|\.)layer\d\.\d+\.shortcut\.0\.weight$", ((r"shortcut\.([01])\.", r"downsample.\1."),)),
    (r"(^|\.)\d\.\d+\.shortcut\.0\.weight$", ((r"shortcut\.([01])\.", r"downsample.\1."),)),
)
"""Pattern of a tensor's name by which a family is recognised, and the rules to timm's names, in order.

The families: ViT and DINOv2 of transformers, ViT of torchvision, DINOv3 of transformers with and without gates, CLIP
and CLIP of transformers, ResNet of transformers, SimCLRv2 converted with nested `net`, DINOv2 saved in chunks of
blocks, and the ResNet of lightly.
"""
_VISION = re.compile(r"^(.*?)(embeddings\.)?class_embedding$")
_PARTS = re.compile(r"^(.*\battn\.)(query|key|value)\.(weight|bias)$")


def namings(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the tensors by their own names, and by timm's names for each family of which they have the names."""
    yield tensors
    tower = next((match[1] for name in tensors if (match := _VISION.match(name))), "")  # not the text tower of CLIP
    for mark, rules in _FAMILIES:
        if any(re.search(mark, name) for name in tensors):
            names = {name: _renamed(name, rules) if name.startswith(tower) else name for name in tensors}
            yield _joined({names[name]: tensor for name, tensor in tensors.items()})


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        name = re.sub(rf"(?<![^.]){pattern}", new, name)  # at the beginning, or after a dot
    return name


def _joined(tensors: Tensors) -> Tensors:
    """Return the tensors with query, key and value of an attention in one, and tokens in the shapes that timm has.

    DINOv3 of transformers has no bias of the key, which is 0 in that of its authors.
    """
    whole: Tensors = {}
    for name, tensor in tensors.items():
        part, last = _PARTS.match(name), name.rpartition(".")[2]
        if part is None:
            missing = {"cls_token": 3, "pos_embed": 3}.get(last, 0) - tensor.ndim
            whole[name] = tensor[(None,) * missing] if missing > 0 else tensor
        elif part[2] == "query":
            both = [tensors.get(f"{part[1]}{which}.{part[3]}") for which in ("key", "value")]
            if both[0] is None and part[3] == "bias":
                both[0] = torch.zeros_like(tensor)
            if both[0] is not None and both[1] is not None:
                whole[f"{part[1]}qkv.{part[3]}"] = torch.cat([tensor, both[0], both[1]])
    return whole
