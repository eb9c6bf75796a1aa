"""Target `timm`: a folder for `timm.create_model("local-dir:FOLDER")`, for what timm can build."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.models.attention_slots import mixes_in_training_only, without
from inbatch.models.classifier import Classifier, save_classifier, timm_layer
from inbatch.models.encoder import Encoder
from inbatch.models.export.target import Written, compare, library, refused
from inbatch.models.factory import create_encoder
from inbatch.models.weights import fill, save_encoder
from inbatch.runtime.files import read_json

HINT = "--to onnx and --to torch take every encoder"
OWN = "it is an encoder of inbatch, which no other library has"
CIFAR = (
    "it has the CIFAR stem (the default up to 64 pixels: a 3x3 convolution of stride 1, no max-pool), which no model "
    "of {library} has; an encoder trained with --set encoder.stem=imagenet has the stem of {library}"
)


WHITENED = (
    "its linear layer takes whitened features, which no model of timm has; train-classifier --mode finetune leaves the "
    "whitening out"
)
HEAD = "its model in timm has other layers than one linear layer behind the features"


def write(model: Encoder | Classifier, folder: Path, facts: Mapping[str, Any], target: str = "timm") -> Written:
    """Write model.safetensors and config.json in timm's layout, and compare the features of the model that timm opens.

    If the encoder whitens its features, the statistics are written as readout.safetensors, which `inbatch.load` uses
    and timm does not: its features are those before whitening. The output of a classifier in timm is logits.
    """
    import timm

    encoder = model.encoder if isinstance(model, Classifier) else model
    native = as_timm(encoder, target)
    if isinstance(model, Classifier):
        with refused(encoder, target, HINT):
            _check_head(native, len(model.classes))
        classes, temperature = model.classes, model.temperature
        save_classifier(Classifier(native, model.head, classes, temperature=temperature, figures=model.figures), folder)
    else:
        save_encoder(native, folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            rows: Tensor = theirs(encoder.preprocess(images))
        return rows.softmax(1) if isinstance(model, Classifier) else rows

    difference, largest = compare(model, run, f"timm's {native.name}", whitened=False)
    load = "timm.create_model('local-dir:' + OUT, pretrained=True)"
    features = "before whitening" if encoder.readout is not None else "embed"
    architecture = read_json(folder / "config.json")["architecture"]  # timm's name: resnet10 is its resnet18
    return Written(library("timm"), difference, largest, load, features, {"model": architecture})


def _check_head(encoder: Encoder, classes: int) -> None:
    """Raise ConfigError if timm's model has no linear layer on the same features."""
    if encoder.readout is not None:
        raise ConfigError(WHITENED)
    if timm_layer(encoder, classes) is None:
        raise ConfigError(HEAD)


def as_timm(encoder: Encoder, target: str = "timm") -> Encoder:
    """Return an encoder with the same weights whose backbone is built by timm alone.

    Attention that is inactive in evaluation is left out; `se`, `eca` and `cbam` become timm's own blocks.

    Args:
        encoder: the encoder.
        target: name of the target in the message.

    Raises:
        ConfigError: if timm has no such model, with the reason and a target for this encoder.
    """
    with refused(encoder, target, HINT):
        name = encoder.name.removeprefix("torchvision/")
        if encoder.arguments is None:
            raise ConfigError("it is a custom backbone, which timm cannot build")
        if name in ("tiny", "fast"):
            raise ConfigError(OWN)
        if encoder.stem == "cifar":
            raise ConfigError(CIFAR.format(library="timm"))
        plain, arguments = encoder, dict(encoder.arguments)
        if encoder.attend is not None and mixes_in_training_only(encoder.attend["name"]):
            plain = without(encoder)
        elif encoder.attend is not None:
            arguments["block_args"] = {**arguments.get("block_args", {}), "attn_layer": encoder.attend["name"]}
        native = create_encoder(
            name, size=encoder.size, channels=encoder.channels, stem="imagenet" if encoder.stem else "auto",
            mean=encoder.mean, std=encoder.std, check=False, **arguments,
        )  # fmt: skip
        fill(native.backbone, plain.backbone.state_dict(), f"timm's {name}")
        native.levels, native.readout = encoder.levels, encoder.readout
        return native.eval()
