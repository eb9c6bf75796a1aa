"""Initial weights of an encoder: where they come from, the stem that they need, and what fits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inbatch.errors import ConfigError
from inbatch.models.backbones import cifar_stem, pretrained, published_cfg
from inbatch.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from inbatch.models.exact_weights import check_exact
from inbatch.models.hub_weights import folder_weights, is_hub, read_hub
from inbatch.models.likely_encoder import likely_encoder
from inbatch.models.published_weights import MIN_MATCH, Match, load, match
from inbatch.models.shipped_weights import with_shipped
from inbatch.models.weight_files import Contents, is_sharded, read_contents
from inbatch.models.weights import read, split
from inbatch.runtime.paths import path_of


@dataclass(frozen=True)
class Initial:
    """Weights to start from, before they are loaded into a backbone.

    Attributes:
        contents: Their tensors; None for published weights of timm, which timm loads itself.
        origin: Their origin, for messages.
        exact: They were saved by this library, so all of them must fit.
        stem: Stem of the encoder that was saved by this library; None if unknown.
        mean: One number per channel; None if the weights state none.
        std: As `mean`.
        blocks: Weights of attention blocks.
        attend: Name and options of these blocks; None without blocks.
    """

    contents: Contents | None = None
    origin: str = ""
    exact: bool = False
    stem: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    blocks: dict[str, Any] = field(default_factory=dict)
    attend: dict[str, Any] | None = None


def is_named(init: Any) -> bool:
    """Return whether a value of `init` names published weights instead of a path."""
    return init == "timm" or is_hub(init)


def read_initial(init: str | Path | Encoder | None, classifier: Sequence[str]) -> Initial | None:
    """Return the weights that `init` names; None without.

    Args:
        init: As for `create_encoder`.
        classifier: Names of the removed classifiers of the backbone.
    """
    if init is None:
        return None
    if init == "timm":
        return Initial(origin="timm")
    if is_hub(init):
        contents, cfg = read_hub(str(init))
        return Initial(contents, str(init), mean=cfg.get("mean"), std=cfg.get("std"))
    origin = f"the encoder {init.name}" if isinstance(init, Encoder) else str(init)
    if not isinstance(init, Encoder):
        init = with_shipped(path_of(init, "init"))
    if isinstance(init, Path) and (not init.is_dir() or is_sharded(init)):
        contents = read_contents(init)
        if any(name.startswith("attend.") for name in contents.tensors):
            raise ConfigError(f"{origin} contains attention blocks: pass its folder, whose config.json defines them.")
        return Initial(contents, origin)
    if isinstance(init, Path) and (foreign := folder_weights(init)):
        return Initial(foreign[0], origin, mean=foreign[1].get("mean"), std=foreign[1].get("std"))
    weights, config = read(init)
    weights, attended = split(weights)
    if attended and not config.get("attend"):
        raise ConfigError(f"{origin} contains attention blocks: pass its folder, whose config.json defines them.")
    weights = {k: v for k, v in weights.items() if not k.startswith(tuple(f"{c}." for c in classifier))}
    return Initial(
        Contents(weights, {}), origin, True, config.get("stem"), config.get("mean"), config.get("std"),
        attended, config.get("attend"),
    )  # fmt: skip


def stem_of(initial: Initial, backbone: nn.Module, channels: int) -> str | None:
    """Return the stem of a ResNet's weights, "cifar" or "imagenet"; None if they have neither."""
    if initial.contents is None:
        return "imagenet"
    if initial.stem is not None:
        return initial.stem
    best = match(backbone, initial.contents, channels)
    conv: Tensor | None = best.tensors.get("conv1.weight")
    shape = best.others.get("conv1.weight") if conv is None else tuple(conv.shape)
    return None if shape is None else "cifar" if shape[-1] == 3 else "imagenet"


def fill_backbone(
    initial: Initial, backbone: nn.Module, name: str, size: int, channels: int, kwargs: dict[str, Any], cifar: bool,
    least: float | None,
) -> tuple[nn.Module, tuple[float, ...] | None, tuple[float, ...] | None, list[str]]:  # fmt: skip
    """Load weights into a backbone.

    Args:
        initial: The weights.
        backbone: The backbone, with the stem that it keeps.
        name: Name of the encoder.
        size: Side of its images in pixels.
        channels: Channels of its images.
        kwargs: Arguments of the model.
        cifar: It has the CIFAR stem.
        least: Smallest share of tensors that must fit; None: all of weights of this library, else `MIN_MATCH`.

    Returns:
        The backbone, which is another one for timm's weights; mean; std; sentences for the user.
    """
    if initial.contents is None:
        backbone = pretrained(name, size, channels, kwargs)
        if cifar:
            cifar_stem(backbone, channels)
        config = published_cfg(backbone)
        mean, std = per_channel(config["mean"], channels), per_channel(config["std"], channels)
        sentences = [_of_timm(config, size, channels, cifar), _normalised(mean, std, "as they were trained")]
        return backbone, mean, std, sentences
    best = match(backbone, initial.contents, channels)
    if least is None:
        least = 1.0 if initial.exact else MIN_MATCH
    notes = check_exact(backbone, name, initial.contents)
    try:
        sentence = load(backbone, best, name, initial.origin, least, strict=initial.exact)
    except ConfigError as error:
        other = None if initial.exact else likely_encoder(initial.contents)
        raise error if other in (None, name) else ConfigError(f"{error}. They are weights of {other}") from None
    if initial.exact and not best.adapted:
        return backbone, per_channel(initial.mean, channels), per_channel(initial.std, channels), []
    mean, std, sentences = _normalisation(initial, best, channels, sentence)
    return backbone, mean, std, [*sentences, *notes]


def _normalisation(
    initial: Initial, best: Match, channels: int, sentence: str
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, list[str]]:
    """Return mean and std for weights, and sentences: of the weights if stated, else ImageNet's."""
    rgb = channels == 3 or any("channel" in text for text in best.adapted)
    if initial.mean is None and not rgb:
        return None, None, [sentence]
    mean = per_channel(initial.mean or IMAGENET_MEAN, channels)
    std = per_channel(initial.std or IMAGENET_STD, channels)
    where = "their configuration" if initial.mean else "ImageNet's, usual for such weights; their file states none"
    return mean, std, [sentence, _normalised(mean, std, where)]


def per_channel(values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """Return one number per channel; their average for each channel if they are of another number of channels."""
    if values is None or len(values) == channels:
        return None if values is None else tuple(values)
    return (sum(values) / len(values),) * channels


def _normalised(mean: Sequence[float] | None, std: Sequence[float] | None, where: str) -> str:
    numbers = [", ".join(f"{value:.4g}" for value in values or ()) for values in (mean, std)]
    return f"Images are normalised with mean ({numbers[0]}) and std ({numbers[1]}): {where}"


def _of_timm(config: dict[str, Any], size: int, channels: int, cifar: bool) -> str:
    """Return a sentence on weights that timm loaded."""
    name = ".".join(filter(None, (str(config.get("architecture")), config.get("tag"))))
    (theirs, side, _), parts = config["input_size"], [f"Initial weights: timm's {name}"]
    if cifar:
        parts.append("Initialised: conv1, because the CIFAR stem was requested")
    if channels != theirs and not cifar:
        parts.append(f"Adapted by timm: the first convolution from {theirs} to {channels} channels")
    if size != side and config.get("fixed_input_size"):
        parts.append(f"Adapted by timm: position embeddings from {side} to {size} pixels")
    return ". ".join(parts)
