"""Layouts of weights that other libraries publish: where an encoder is among the tensors, and their names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn


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
    (r"", (r"(^|\.)layer\.0\.attention\.q_proj\.weight$",), "DINOv3 of transformers"),
    (r"", (r"(^|\.)pre_layrnorm\.weight$",), "CLIP of transformers, vision tower"),
    (r"", (r"(^|\.)class_embedding$", r"(^|\.)transformer\.resblocks\.0\."), "CLIP, vision tower"),
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
    (r"text.*|transformer|token_embedding|positional_embedding|ln_final|logit_\w+|context_length|input_resolution"
     r"|vocab_size", "text tower"),
    (r"fc|fc_norm|.*(head|classifier|proj|predict|prototype|loss).*|linear|mlp|neck|g|bn|pooler|\d+", "head"),
)  # fmt: skip


def noun(group: str) -> str:
    """Return what the tensors of a group are that an encoder does not use."""
    return next((word for pattern, word in _NOUNS if re.fullmatch(pattern, group)), "not recognised")
