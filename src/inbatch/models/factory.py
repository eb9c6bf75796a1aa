"""Create and load encoders by name.

`create_encoder` accepts timm's names, `torchvision/NAME`, and three small encoders of this library:
  fast      a narrow ResNet-9 with strides, for 32 to 96 pixels (1.6 million parameters at its width of 32);
  resnet10  ResNet-18 with one basic block per stage instead of two (4.9 million parameters);
  tiny      three 3x3 convolutions with batch norm, 32-64-96, for canvases of about 20 pixels (74,400 parameters).
At 64 pixels or less a ResNet gets the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from inbatch.errors import ConfigError, DataError, check_whole, reason
from inbatch.models.attention_slots import blocks, install, meets_in_training_only
from inbatch.models.backbones import build, cifar_stem, pretrained, published_cfg
from inbatch.models.encoder import MAX_SIDE, Encoder
from inbatch.models.input_sizes import check_side
from inbatch.models.readout import Readout
from inbatch.models.weights import STEMS, encoder_weights, fill, read, read_folder, set_readout, split
from inbatch.runtime.paths import path_of


def create_encoder(
    name: str,
    *,
    size: int,
    channels: int = 3,
    stem: str = "auto",
    init: str | Path | Encoder | None = None,
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
        stem: "auto" (CIFAR stem for ResNets at 64 pixels or less), "cifar" or "imagenet".
        init: None, "timm" (pretrained weights through timm, from the network or its cache), a folder written by
            `save_encoder`, a state dict in a .safetensors, .pt or .pth file, or another encoder, of which the weights
            are copied.
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
    backbone, classifier = build(name, size, channels, kwargs)
    used = _stem_in_use(name, backbone, stem, size)
    if used == "cifar":
        cifar_stem(backbone, channels)
    initial = _Initial()
    if init == "timm":
        if used == "cifar":
            raise ConfigError(STEMS.format(name=name, ours="3x3 (CIFAR)", theirs="ImageNet's"))
        backbone = pretrained(name, size, channels, kwargs)
        config = published_cfg(backbone)
        initial = _Initial(mean=config["mean"], std=config["std"])
    elif init is not None:
        initial = _fill_backbone(backbone, classifier, name, init)
    encoder = Encoder(
        backbone,
        name=name,
        size=size,
        channels=channels,
        mean=initial.mean if mean is None else mean,
        std=initial.std if std is None else std,
        stem=used,
        arguments=kwargs,
    )
    if check:
        check_side(encoder, size)
    if whiten:
        encoder.readout = Readout(encoder.width)
    if attend is not None:
        install(encoder, attend, attend_options)
    _fill_blocks(encoder, initial)
    return encoder


@dataclass(frozen=True)
class _Initial:
    """What comes with the initial weights of a backbone.

    Attributes:
        origin: Origin of the weights, for messages.
        mean: One number per channel; None if the weights state none.
        std: As `mean`.
        blocks: Weights of attention blocks.
        attend: Name and options of these blocks; None without blocks.
    """

    origin: str = ""
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    blocks: dict[str, Any] = field(default_factory=dict)
    attend: dict[str, Any] | None = None


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


def _stem_in_use(name: str, backbone: nn.Module, stem: str, size: int) -> str | None:
    """Return "cifar" or "imagenet" for a ResNet, else None; raise ConfigError for a CIFAR stem of another backbone."""
    resnet = {"conv1", "bn1", "maxpool", "layer1"} <= dict(backbone.named_children()).keys()
    if stem == "cifar" and not resnet:
        raise ConfigError(f'{name} is not a ResNet, so it has no CIFAR stem: use stem="auto".')
    if not resnet:
        return None
    if stem == "auto":
        return "cifar" if size <= 64 else "imagenet"
    return stem


def _fill_backbone(backbone: nn.Module, classifier: Sequence[str], name: str, init: str | Path | Encoder) -> _Initial:
    """Load saved weights into a backbone, except those of its classifier, and return what came with them."""
    origin = f"the encoder {init.name}" if isinstance(init, Encoder) else str(init)
    weights, config = read(init if isinstance(init, Encoder) else path_of(init, "init"))
    weights, attended = split(weights)
    saved = config.get("attend")
    if attended and not saved:
        raise ConfigError(f"{origin} contains attention blocks: pass its folder, whose config.json defines them.")
    weights = {k: v for k, v in weights.items() if not k.startswith(tuple(f"{c}." for c in classifier))}
    fill(backbone, weights, f"{name} ({origin})")
    return _Initial(origin, config.get("mean"), config.get("std"), attended, saved)


def _fill_blocks(encoder: Encoder, initial: _Initial) -> None:
    """Load saved attention blocks; raise ConfigError if the encoder needs but does not have them."""
    saved = initial.attend
    if saved and encoder.attend == saved:
        fill(blocks(encoder), initial.blocks, f"{saved['name']} ({initial.origin})")
    elif saved and not meets_in_training_only(saved["name"]):
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
        known = {k: config[k] for k in ("name", "size", "channels", "mean", "std")}
        encoder = create_encoder(**known, stem=config["stem"] or "auto", check=False, **config["arguments"])
        if levels := config.get("levels"):
            encoder.levels = (float(levels[0]), float(levels[1]))
        fill(encoder.backbone, own, str(origin))
        if saved := config.get("attend"):  # absent from encoders saved before this key existed
            install(encoder, saved["name"], saved["options"])
            fill(blocks(encoder), attended, str(origin))
        set_readout(encoder, weights, config, origin)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise DataError(f"{origin}: config.json describes no encoder ({reason(e)}).") from e
    return encoder.eval()
