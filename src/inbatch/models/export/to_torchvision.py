"""Target `torchvision`: a state dict for `torchvision.models.NAME()`, also as a backbone of detection models."""

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError
from inbatch.models.attention_slots import mixes_in_training_only, without
from inbatch.models.backbones import torchvision_defaults
from inbatch.models.encoder import Encoder
from inbatch.models.export.target import Written, compare, library, refused
from inbatch.models.export.to_timm import CIFAR, HINT, OWN
from inbatch.models.weights import fill

FILE = "backbone"


def write(encoder: Encoder, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write backbone.pth and backbone.safetensors with the same tensors, and compare torchvision's features.

    They have all tensors of the model except those of its classifier. The weights of a first convolution for grey
    images are divided by 3 and repeated, which gives the same features for grey images in three channels.
    """
    name, arguments, model, classifier = _model(encoder)
    with refused(encoder, "torchvision", HINT):
        weights = _weights(encoder, model)
        model.set_submodule(classifier, nn.Identity())
        fill(model, weights, f"torchvision.models.{name}")
    torch.save(weights, folder / f"{FILE}.pth")
    safetensors.torch.save_file(weights, folder / f"{FILE}.safetensors")
    model.load_state_dict(torch.load(folder / f"{FILE}.pth", weights_only=True))
    model.eval()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(encoder.preprocess(images).expand(-1, 3, -1, -1))

    difference, largest = compare(encoder, run, f"torchvision's {name}", whitened=False)
    call = f"torchvision.models.{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    load = f"{call}.load_state_dict(torch.load(OUT + '/{FILE}.pth', weights_only=True), strict=False)"
    features = "before whitening" if encoder.readout is not None else "embed"
    more = {"model": call, "classifier": classifier, "grey_as_three_channels": encoder.channels == 1}
    return Written(library("torchvision"), difference, largest, load, features, more)


def _model(encoder: Encoder) -> tuple[str, dict[str, Any], nn.Module, str]:
    """Return torchvision's name, arguments and model for an encoder, and the name of the model's classifier."""
    import torchvision

    name = encoder.name.removeprefix("torchvision/").partition(".")[0]
    with refused(encoder, "torchvision", HINT):
        if name in ("tiny", "fast"):
            raise ConfigError(OWN)
        if encoder.arguments is None or name not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError("torchvision.models has no such model")
        if encoder.stem == "cifar":
            raise ConfigError(CIFAR.format(library="torchvision"))
        if encoder.channels not in (1, 3):
            raise ConfigError(f"torchvision's models take 3 channels, and this one takes {encoder.channels}")
        arguments = torchvision_defaults(name, encoder.size)
        arguments |= encoder.arguments if encoder.name.startswith("torchvision/") else {}
        builder = torchvision.models.get_model_builder(name)
        usual = inspect.signature(typing.get_type_hints(builder).get("return", builder)).parameters
        arguments = {key: value for key, value in arguments.items() if key not in usual or usual[key].default != value}
        model = torchvision.models.get_model(name, weights=None, **arguments)
        return name, arguments, model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def _weights(encoder: Encoder, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the backbone for three channels; ConfigError for attention that torchvision lacks."""
    plain = encoder
    if encoder.attend is not None:
        if not mixes_in_training_only(encoder.attend["name"]):
            raise ConfigError(f"torchvision has no attention {encoder.attend['name']!r}")
        plain = without(encoder)
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in plain.backbone.state_dict().items()}
    if encoder.channels == 1:
        first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        if (key := f"{first}.weight") in weights:
            weights[key] = weights[key].repeat(1, 3, 1, 1) / 3
    return weights
