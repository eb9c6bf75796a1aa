"""Names of tensors in weights that other libraries publish: their translation to timm's, and the name of a layout."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

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
_OF_TRANSFORMERS_RESNET: Rules = (
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    *((rf"encoder\.stages\.{i}\.layers\.(\d+)\.", rf"layer{i + 1}.\1.") for i in range(4)),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    *((rf"layer\.{i}\.convolution\.", f"conv{i + 1}.") for i in range(3)),
    *((rf"layer\.{i}\.normalization\.", f"bn{i + 1}.") for i in range(3)),
)
_OF_SIMCLR: Rules = (
    (r"net\.0\.0\.", "conv1."),
    (r"net\.0\.1\.0\.", "bn1."),
    (r"net\.([1-4])\.blocks\.(\d+)\.", r"layer\1.\2."),
    (r"projection\.shortcut\.", "downsample.0."),
    (r"projection\.bn\.0\.", "downsample.1."),
    *((rf"net\.{2 * i}\.(?=weight$)", f"conv{i + 1}.") for i in range(3)),
    *((rf"net\.{2 * i + 1}\.0\.", f"bn{i + 1}.") for i in range(3)),
)
_FAMILIES: tuple[tuple[str, Rules], ...] = (
    (r"(^|\.)encoder\.layer\.0\.attention\.attention\.query\.weight$", _OF_VIT),
    (r"(^|\.)encoder\.layers\.encoder_layer_0\.", _OF_TORCHVISION),
    (r"(^|\.)embedder\.embedder\.convolution\.weight$", _OF_TRANSFORMERS_RESNET),
    (r"(^|\.)net\.1\.blocks\.0\.projection\.shortcut\.weight$", _OF_SIMCLR),
    (r"(^|\.)blocks\.\d+\.\d+\.norm1\.weight$", ((r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),)),
    (r"(^|\.)layer\d\.\d+\.shortcut\.0\.weight$", ((r"shortcut\.([01])\.", r"downsample.\1."),)),
    (r"(^|\.)\d\.\d+\.shortcut\.0\.weight$", ((r"shortcut\.([01])\.", r"downsample.\1."),)),
)
"""Pattern of a tensor's name by which a family is recognised, and the rules to timm's names, in order.

The families: ViT and DINOv2 of transformers, ViT of torchvision, ResNet of transformers, SimCLRv2 converted with nested
`net`, DINOv2 saved in chunks of blocks, and the ResNet of lightly.
"""
_PARTS = re.compile(r"^(.*\battn\.)(query|key|value)\.(weight|bias)$")


def namings(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the tensors by their own names, and by timm's names for each family of which they have the names."""
    yield tensors
    for mark, rules in _FAMILIES:
        if any(re.search(mark, name) for name in tensors):
            yield _joined({_renamed(name, rules): tensor for name, tensor in tensors.items()})


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        name = re.sub(rf"(?<![^.]){pattern}", new, name)  # at the beginning, or after a dot
    return name


def _joined(tensors: Tensors) -> Tensors:
    """Return the tensors with query, key and value of an attention in one, as timm has them."""
    whole: Tensors = {}
    for name, tensor in tensors.items():
        part = _PARTS.match(name)
        if part is None:
            whole[name] = tensor
        elif part[2] == "query":
            names = [f"{part[1]}{which}.{part[3]}" for which in ("query", "key", "value")]
            if all(one in tensors for one in names):
                whole[f"{part[1]}qkv.{part[3]}"] = torch.cat([tensors[one] for one in names])
    return whole


def aliases(backbone: nn.Module) -> Iterator[dict[str, str]]:
    """Yield names of the tensors of a backbone -> its own names: the same, and those within an `nn.Sequential`.

    Programs that leave out the classifier of a ResNet often put its other modules into an `nn.Sequential`, all of them,
    without the max-pool (for small images), or those with weights only.
    """
    own = list(backbone.state_dict())
    yield {name: name for name in own}
    children: list[tuple[str, nn.Module]] = list(backbone.named_children())
    keeps: tuple[Callable[[str, nn.Module], bool], ...] = (
        lambda name, module: True,
        lambda name, module: name != "maxpool",
        lambda name, module: bool(module.state_dict()),
    )
    for keep in keeps if "layer4" in dict(children) else ():
        places = {name: i for i, (name, _) in enumerate(one for one in children if keep(*one))}
        numbered = (name.partition(".") for name in own)
        yield {f"{places[child]}.{rest}": f"{child}.{rest}" for child, _, rest in numbered if child in places}


_SECOND = (
    r"encoder_k|momentum_encoder|momentum_backbone|backbone_momentum|target_\w+|\w*_target|gram_teacher|key_encoder"
)
_PREFERRED = ((rf"(^|\.)({_SECOND})\.", -1), (r"(^|\.)(teacher|teacher_backbone)\.", 2), (r"(^|[._])ema([._]|$)", 1))


def preference(prefix: str) -> int:
    """Return which of several complete encoders of a file to take: the one with the largest number.

    The teacher of DINO and an average of weights (EMA) are preferred, and momentum encoders of the other methods are
    not, as their authors do.
    """
    return next((value for pattern, value in _PREFERRED if re.search(pattern, prefix)), 0)


_LAYOUTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"teacher", (r"storage_tokens",), "DINOv3, teacher"),
    (r"teacher", (r"ibot_head|dino_head|\.register_tokens$|\.ls1\.gamma$",), "DINOv2, teacher"),
    (r"teacher", (), "DINO, teacher"),
    (r"student", (), "DINO, student (the file holds no complete teacher)"),
    (r"encoder_q\.", (), "MoCo v1 or v2, query encoder"),
    (r"base_encoder\.", (), "MoCo v3, base encoder"),
    (r"online_(network|encoder)", (), "BYOL, online network"),
    (r"(^|\.)net\.$", (r"online_encoder\.",), "BYOL, online network"),
    (r"", (r"target_network_state_dict\.",), "BYOL, online network"),
    (r"_feature_blocks\.", (), "VISSL, trunk"),
    (r"backbone\.", (r"(^|\.)projection_head\.layers\.",), "lightly, backbone"),
    (r"", (r"(^|\.)projection_head\.\d", r"(^|\.)prototypes\."), "SwAV"),
    (r"(backbone|encoder)\.", (r"(^|\.)(projector|momentum_projector)\.", r"(^|\.)classifier\.weight$"),
     "solo-learn, backbone"),
    (r"backbone\.", (r"(^|\.)backbone\.fc\.\d",), "SimCLR (PyTorch), backbone"),
    (r"backbone\.", (r"(^|\.)projector\.", r"(^|\.)bn\.running_mean$"), "Barlow Twins, backbone"),
    (r"module\.backbone\.", (r"(^|\.)projector\.",), "VICReg, backbone"),
    (r"", (r"(^|\.)decoder_blocks\.",), "MAE, encoder"),
    (r"encoder\.", (r"(^|\.)projector\.",), "SimCLR (PyTorch), encoder"),
    (r"(^|\.)f\.$", (r"(^|\.)g\.\d",), "SimCLR (PyTorch), encoder"),
    (r"", (r"(^|\.)net\.1\.blocks\.0\.projection\.shortcut",), "SimCLR (converted from TensorFlow)"),
    (r"", (r"(^|\.)storage_tokens$",), "DINOv3, backbone"),
    (r"", (r"(^|\.)mask_token$", r"\.ls1\.gamma$"), "DINOv2, backbone"),
    (r"", (r"embeddings\.patch_embeddings\.|embedder\.embedder\.",), "transformers"),
    (r"", (r"(^|\.)encoder\.layers\.encoder_layer_0\.",), "torchvision, ViT"),
)  # fmt: skip
"""Pattern of an encoder's prefix, patterns of any names of the file, and the name of the layout; the first counts."""


def layout_name(prefix: str, names: Iterable[str], values: Mapping[str, object]) -> str:
    """Return the name of the layout of a file of weights.

    Args:
        prefix: What precedes the names of the encoder's tensors.
        names: Names of all tensors.
        values: Its other top-level entries.
    """
    every = list(names)
    name = next(
        (name for at, marks, name in _LAYOUTS
         if re.search(at, prefix) and all(any(re.search(mark, one) for one in every) for mark in marks)),
        f'state dict within "{prefix}"' if prefix else "state dict",
    )  # fmt: skip
    lightning = "Lightning checkpoint, " if "pytorch-lightning_version" in values else ""
    average = " (average of weights, EMA)" if re.search(_PREFERRED[2][0], prefix) else ""
    return f"{lightning}{name}{average}"


_NOUNS = (
    (r".*(optim|scaler|scheduler).*|callbacks|loops", "optimizer"),
    (rf"{_SECOND}|student.*|teacher.*|.*ema.*|online_\w+|encoder_state_dict|state_dict|model|net|encoder|backbone",
     "another copy of the network"),
    (r".*(queue|memory|bank).*", "memory bank"),
    (r"decoder.*|mask_token", "for pretraining only"),
    (r"blocks|rope.*", "without a place in timm's model"),
    (r"fc|fc_norm|.*(head|classifier|proj|predict|prototype|loss).*|linear|mlp|neck|g|bn|pooler|\d+", "head"),
)  # fmt: skip


def noun(group: str) -> str:
    """Return what the tensors of a group are that an encoder does not use."""
    return next((word for pattern, word in _NOUNS if re.fullmatch(pattern, group)), "not recognised")
