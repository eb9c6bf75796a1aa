"""Attention slots: a block in every residual block of a backbone, or one block after its pooling."""

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from inbatch.context.attention import BA2M, BatchFormer
from inbatch.context.grouped import Grouped, as_group
from inbatch.errors import ConfigError, closest, reason
from inbatch.models.encoder import Encoder


def se(channels: int, reduction: int = 16) -> nn.Module:
    """Squeeze-and-excitation of each sample's channels (Hu et al. 2018, arXiv 1709.01507), from timm.

    reduction: ratio of the channels to those inside the block, which timm rounds to a multiple of 8.
    """
    from timm.layers import SEModule

    return SEModule(channels, rd_ratio=1 / reduction)


def eca(channels: int, kernel: int | None = None) -> nn.Module:
    """Efficient channel attention (Wang et al. 2020, arXiv 1910.03151): a convolution over channels, from timm.

    kernel: its width, odd; None: by the number of channels, as in the paper.
    """
    from timm.layers import EcaModule

    if kernel is None:
        return EcaModule(channels)
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"eca: kernel is an odd number, not {kernel}.")
    return EcaModule(kernel_size=kernel)


def cbam(channels: int, reduction: int = 16, kernel: int = 7) -> nn.Module:
    """Attention of each sample over its channels, then its positions (Woo et al. 2018, arXiv 1807.06521), from timm.

    reduction: ratio of the channels to those inside the channel part.
    kernel: width of the convolution over positions, odd.
    """
    from timm.layers.cbam import CbamModule

    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"cbam: kernel is an odd number, not {kernel}.")
    return CbamModule(channels, rd_ratio=1 / reduction, spatial_kernel_size=kernel)


ATTENDS: dict[str, Callable[..., nn.Module]] = {
    "ba2m": BA2M,
    "batchformer": BatchFormer,
    "se": se,
    "eca": eca,
    "cbam": cbam,
}
"""Attentions by name. The first argument depends on the slot: `channels` of a map, or `width` of pooled features;
the others are options, of JSON types.
"""


def install(encoder: Encoder, name: str, options: Mapping[str, Any] | None = None) -> None:
    """Add a block of ATTENDS to an encoder without attention, keeping its weights.

    A block of maps is placed after the last norm of each residual block, before the sum; in a plain chain of layers,
    such as `tiny`, after every norm, each of which is a stage.

    Args:
        encoder: encoder without attention.
        name: name of the attention.
        options: of the block, and `stages` for blocks of maps: which residual stages get them, from 1; all by default.

    Raises:
        ConfigError: for unknown names and options, and for backbones without such a place.
    """
    maker, first, full = _resolve(name, options or {})
    if encoder.attend is not None:
        raise ConfigError(f"{encoder.name} has the attention {encoder.attend['name']} already: create another encoder.")
    if first == "width":
        encoder.pooled = _make(maker, name, encoder.width, full)
        slots = ["pooled"]
    else:
        places = _places(encoder, name)
        stages = full.get("stages") or list(range(1, len(places) + 1))
        if not isinstance(stages, list) or not set(stages) <= set(range(1, len(places) + 1)):
            raise ConfigError(f"{encoder.name} has the stages 1 to {len(places)} for {name}, not {stages!r}.")
        full["stages"] = sorted(set(stages))
        inner = {key: value for key, value in full.items() if key != "stages"}
        slots = []
        for block, norm in (place for stage in full["stages"] for place in places[stage - 1]):
            layer, owner = encoder.get_submodule(norm), encoder.get_submodule(block)
            module = _make(maker, name, _channels(layer), inner)
            if hasattr(owner, "se"):  # timm's own slot
                owner.se = module
                slots.append(f"{block}.se")
            else:
                encoder.set_submodule(norm, nn.Sequential(layer, module))
                slots.append(f"{norm}.1")
    encoder.attend, encoder.slots = {"name": name, "options": full}, tuple(slots)
    blocks(encoder).to(encoder.device).train(encoder.training)


def blocks(encoder: Encoder) -> nn.ModuleList:
    """Return the attention blocks of an encoder, in the order of its layers; empty without `attend`."""
    return nn.ModuleList(encoder.get_submodule(slot) for slot in encoder.slots)


def without(encoder: Encoder) -> Encoder:
    """Return a copy without its attention blocks.

    If samples interact in training only (ba2m, batchformer), it gives the same features in evaluation.
    """
    plain = copy.deepcopy(encoder)
    for slot in plain.slots:
        above, _, leaf = slot.rpartition(".")
        owner = plain.get_submodule(above)
        if isinstance(owner, nn.Sequential):
            plain.set_submodule(above, owner[0])
        else:
            setattr(owner, leaf, None)
    plain.attend, plain.slots = None, ()
    return plain


def added(encoder: Encoder, group: int = 2) -> dict[str, Any]:
    """Return the cost of the attention blocks in a forward pass in training.

    The keys are `blocks`, `parameters`, `flops` per image, and the last two as shares of the encoder without attention
    (`parameters_share`, `flops_share`). A multiplication and an addition are two FLOPs; those of convolutions and
    matrix products are counted.

    Args:
        encoder: encoder with attention.
        group: number of interacting samples, at least 2 (the cost of BatchFormer per image increases with it).
    """
    (parameters, flops), (plain_parameters, plain_flops) = _cost(encoder, group), _cost(without(encoder), group)
    return {
        "blocks": len(encoder.slots),
        "parameters": parameters - plain_parameters,
        "flops": flops - plain_flops,
        "parameters_share": parameters / plain_parameters - 1,
        "flops_share": flops / plain_flops - 1,
    }


def mixes_in_training_only(name: str) -> bool:
    """Return whether the block is inactive in evaluation, so that the plain backbone gives the same features."""
    maker = ATTENDS.get(name)
    return inspect.isclass(maker) and issubclass(maker, Grouped)


def _resolve(name: str, options: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], str, dict[str, Any]]:
    """Return the block's constructor, the name of its first argument, and all options as JSON returns them."""
    if name not in ATTENDS:
        near = closest(name, ATTENDS)
        raise ConfigError(
            f"there is no attention called {name!r}: "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(ATTENDS)}.")
        )
    first, *others = inspect.signature(ATTENDS[name]).parameters.values()
    known = {p.name: p.default for p in others}
    allowed = [*known, *(["stages"] if first.name == "channels" else [])]
    for key in options:
        if key not in allowed:
            near = closest(key, allowed)
            why = f"{name} follows the pooling and has no stages" if key == "stages" else f"{name} has no {key!r}"
            hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(allowed) or 'none'}."
            raise ConfigError(f"{why}: {hint}")
    try:
        return ATTENDS[name], first.name, json.loads(json.dumps(known | dict(options)))
    except TypeError as e:
        raise ConfigError(f"an attention's options must fit into JSON, to be saved with the encoder: {e}") from e


def _make(maker: Callable[..., nn.Module], name: str, size: int, options: dict[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):  # later modules get the same initial weights as without the block
            return maker(size, **options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as e:
        raise ConfigError(f"{name} cannot be built for {size} channels with {options}: {str(e) or reason(e)}") from e


def _places(encoder: Encoder, name: str) -> list[list[tuple[str, str]]]:
    """Return, by stage, the names within the encoder of the blocks and of their last norms."""
    backbone = encoder.backbone
    if isinstance(backbone, nn.Sequential):
        places = [[("backbone", f"backbone.{n}")] for n, m in backbone.named_children() if _channels(m)]
    else:
        stages = {f"layer{i}": getattr(backbone, f"layer{i}", None) for i in (1, 2, 3, 4)}
        places = [
            [_place(f"backbone.{key}.{n}", block) for n, block in stage.named_children()]
            for key, stage in stages.items()
            if isinstance(stage, nn.Sequential)
        ]
        if len(places) < len(stages):
            places = []
    if not places or not all(norm for stage in places for _, norm in stage):
        raise ConfigError(
            f"{encoder.name} has no residual stages for {name}: choose a ResNet, or "
            'attend="batchformer", which follows the pooling of any encoder.'
        )
    taken = [b for stage in places for b, _ in stage if getattr(encoder.get_submodule(b), "se", None) is not None]
    if taken:
        raise ConfigError(f"{encoder.name} has attention of its own ({taken[0]}.se): choose the plain ResNet.")
    return places


def _place(name: str, block: nn.Module) -> tuple[str, str]:
    norms = [n for n, m in block.named_modules() if _channels(m) and not n.startswith("downsample")]
    return name, f"{name}.{norms[-1]}" if norms else ""


def _channels(norm: nn.Module) -> int:
    """Return the channels of a norm layer of maps; 0 for anything else."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    return norm.num_features if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) else 0


def _cost(encoder: Encoder, group: int) -> tuple[int, int]:
    """Return parameters and FLOPs per image, on the meta device and without other ranks, which training norms need."""
    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(encoder).to("meta").eval()
    for part in twin.modules():
        if isinstance(part, Grouped):
            part.gather, part.own = Grouped.gather, Grouped.own
    with torch.no_grad(), as_group(twin), FlopCounterMode(display=False) as counter:
        twin(torch.empty(group, encoder.channels, encoder.size, encoder.size, device="meta"))
    return sum(p.numel() for p in encoder.parameters()), counter.get_total_flops() // group
