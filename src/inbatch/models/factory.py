"""Create and load encoders by name.

`create_encoder` accepts timm's names, `torchvision/NAME`, and three small encoders of this library:
  fast      a narrow ResNet-9 with strides, for 32 to 96 pixels (1.6 million parameters at its width of 32);
  resnet10  ResNet-18 with one basic block per stage instead of two (4.9 million parameters);
  tiny      three 3x3 convolutions with batch norm, 32-64-96, for canvases of about 20 pixels (74,400 parameters).
At 64 pixels or less a ResNet gets the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from inbatch.errors import ConfigError, DataError, check_whole, reason
from inbatch.models.attention_slots import blocks, install, mixes_in_training_only
from inbatch.models.backbones import arguments_for_own, build, cifar_stem, own_backbone, own_encoder
from inbatch.models.encoder import MAX_SIDE, Encoder
from inbatch.models.initial_weights import Initial, fill_backbone, read_initial, stem_of
from inbatch.models.input_sizes import check_side
from inbatch.models.readout import Readout
from inbatch.models.weights import encoder_weights, fill, read_folder, set_readout, split
from inbatch.runtime import own_parts
from inbatch.runtime.paths import path_of


def create_encoder(
    name: str,
    *,
    size: int,
    channels: int = 3,
    stem: str = "auto",
    init: str | Path | Encoder | None = None,
    init_min_match: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    attend: str | None = None,
    attend_options: Mapping[str, Any] | None = None,
    whiten: bool = False,
    check: bool = True,
    **kwargs: Any,
) -> Encoder:
    """Create an encoder by name: `tiny`, `fast`, `resnet10`, a timm model, or `torchvision/NAME`.

    Args:
        name: name of the backbone.
        size: side of the images in pixels.
        channels: channels of the images.
        stem: "auto" (that of the initial weights; without any, the CIFAR stem for ResNets at 64 pixels or less),
            "cifar" or "imagenet".
        init: None, "timm" (pretrained weights through timm, from the network or its cache), "hub:NAME" (a repository
            of the Hugging Face hub, from the network or its cache), a folder written by `save_encoder`, a file of
            weights of this or another program in a layout of docs/init.md, or another encoder, of which the weights are
            copied.
        init_min_match: smallest share of the encoder's tensors that must fit; by default 0.95, and 1 for weights that
            this library saved. The others are initialised.
        mean: one number per channel; by default that of the weights, else ImageNet's for 3 channels, else 0.5.
        std: one number per channel; by default that of the weights, else ImageNet's for 3 channels, else 0.25.
        attend: None, or the name of an attention of `ATTENDS`.
        attend_options: options of the attention, and the residual `stages` that get a block
            (`attention_slots.install`). Weights are loaded into the backbone first; the blocks are initialised, unless
            init is a folder with an encoder saved with the same attend and options.
        whiten: pool the returned features over quarters of the image and whiten them (`Readout`), after training has
            fitted the whitening; heads and losses use the plain features.
        check: refuse a size of which the model ignores a part (no multiple of its patches), and a model that cannot
            train (`check_side`). Encoders that exist already are loaded without it.
        **kwargs: arguments of the model.

    Raises:
        ConfigError: for unknown names, or settings or weights that do not fit.
        DataError: for unreadable weights.
    """
    _check_arguments(name, size, channels, stem, attend, attend_options, kwargs)
    number = isinstance(init_min_match, int | float) and not isinstance(init_min_match, bool)
    if init_min_match is not None and not (number and 0 <= init_min_match <= 1):
        raise ConfigError(f"init_min_match must be a number from 0 to 1, not {init_min_match!r:.40}")
    own = own_encoder(name)
    classifier: tuple[str, ...] = ()
    if own is None:
        backbone, classifier = build(name, size, channels, kwargs)
    else:
        backbone = own_backbone(own, size, channels, kwargs)
    initial = read_initial(init, classifier)
    used = None if own is not None else _stem_in_use(name, backbone, stem, size, initial, channels)
    if used == "cifar":
        cifar_stem(backbone, channels)
    notes: list[str] = []
    if initial is not None:
        backbone, weights_mean, weights_std, notes = fill_backbone(
            initial, backbone, name, size, channels, kwargs, used == "cifar", init_min_match
        )
        mean, std = weights_mean if mean is None else mean, weights_std if std is None else std
        notes += _stem_note(stem, used, size)
    encoder = Encoder(
        backbone,
        name=name,
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        stem=used,
        arguments=kwargs,
    )
    encoder.own = None if own is None else own.facts()
    if check:
        check_side(encoder, size)
    if whiten:
        encoder.readout = Readout(encoder.width)
    if attend is not None:
        install(encoder, attend, attend_options)
    if initial is not None:
        _fill_blocks(encoder, initial)
    encoder.init_notes = tuple(notes)
    return encoder


def _check_arguments(
    name: str,
    size: int,
    channels: int,
    stem: str,
    attend: str | None,
    attend_options: Mapping[str, Any] | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Raise ConfigError for invalid arguments of `create_encoder`."""
    if not isinstance(name, str):
        raise ConfigError(f"the name of an encoder must be a text, not {name!r:.40}")
    check_whole("channels", channels, least=1)
    check_whole("size", size)
    if size not in range(1, MAX_SIDE + 1):
        raise ConfigError(f"an encoder takes images of 1 to {MAX_SIDE:,} pixels a side, not {size!r:.40}.")
    if stem not in ("auto", "cifar", "imagenet"):
        raise ConfigError(f'stem is "auto", "cifar" or "imagenet", not {stem!r}.')
    if attend is None and attend_options:
        raise ConfigError("attend_options are options of an attention block: name it with attend=.")
    try:
        json.dumps(kwargs)
    except TypeError as e:
        raise ConfigError(f"an encoder's arguments must fit into JSON, to be saved with it: {e}") from e


def _stem_in_use(
    name: str, backbone: nn.Module, stem: str, size: int, initial: Initial | None, channels: int
) -> str | None:
    """Return "cifar" or "imagenet" for a ResNet, else None; raise ConfigError for a CIFAR stem of another backbone."""
    resnet = {"conv1", "bn1", "maxpool", "layer1"} <= dict(backbone.named_children()).keys()
    if stem == "cifar" and not resnet:
        raise ConfigError(f'{name} is not a ResNet, so it has no CIFAR stem: use stem="auto".')
    if not resnet:
        return None
    if stem != "auto":
        return stem
    own = stem_of(initial, backbone, channels) if initial is not None else None
    return own or _stem_by_size(size)


def _stem_by_size(size: int) -> str:
    return "cifar" if size <= 64 else "imagenet"


def _stem_note(stem: str, used: str | None, size: int) -> list[str]:
    """Return a sentence if the stem of the weights is not the one that images of this size get without weights."""
    if used is None or stem != "auto" or used == _stem_by_size(size):
        return []
    other = "cifar" if used == "imagenet" else "imagenet"
    kinds = {"imagenet": "ImageNet (7x7, stride 2, max-pool)", "cifar": "CIFAR (3x3, stride 1)"}
    return [
        f"The encoder gets the stem of its weights, {kinds[used]}, not that for images of {size} pixels; "
        f"encoder.stem={other} takes the other one, with a new first convolution"
    ]


def _fill_blocks(encoder: Encoder, initial: Initial) -> None:
    """Load saved attention blocks; raise ConfigError if the encoder needs but does not have them."""
    saved = initial.attend
    if saved and encoder.attend == saved:
        fill(blocks(encoder), initial.blocks, f"{saved['name']} ({initial.origin})")
    elif saved and not mixes_in_training_only(saved["name"]):
        raise ConfigError(
            f"the weights in {initial.origin} were trained with attend={saved['name']!r} and are of no use without "
            f"its blocks: ask for the same, attend_options={saved['options']}, not for {encoder.attend}."
        )


def load_encoder(directory: str | Path) -> Encoder:
    """Return an encoder written by `save_encoder`, or that of a classifier, in evaluation mode.

    Raises:
        DataError: if it is damaged or foreign.
    """
    directory = path_of(directory, "directory")
    weights, config = read_folder(directory)
    return restored(weights, config, directory)


def restored(weights: dict[str, Any], config: dict[str, Any], origin: Path) -> Encoder:
    """Return the encoder of the weights and the inbatch part of config.json of a folder, in evaluation mode."""
    if config.get("arguments") is None:
        raise DataError(f"{origin} holds no encoder created by name; build it yourself and load model.safetensors.")
    own, attended = split(encoder_weights(weights, config))
    try:
        if saved := config.get("own"):
            own_parts.check_same("encoder", str(config["name"]), saved)
        known = {k: config[k] for k in ("name", "size", "channels", "mean", "std")}
        arguments = arguments_for_own(str(config["name"]), config["arguments"])
        encoder = create_encoder(**known, stem=config["stem"] or "auto", check=False, **arguments)
        encoder.arguments = config["arguments"]
        if levels := config.get("levels"):
            encoder.levels = (float(levels[0]), float(levels[1]))
        fill(encoder.backbone, own, str(origin))
        if saved := config.get("attend"):  # absent from encoders saved before this key existed
            install(encoder, saved["name"], saved["options"])
            fill(blocks(encoder), attended, str(origin))
        set_readout(encoder, weights, config, origin)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise DataError(f"{origin}: config.json describes no encoder ({reason(e)}): export it again.") from e
    return encoder.eval()
