"""A classifier: an encoder with a linear layer on its features, and its folder on the disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from inbatch.data.pixels import Levels
from inbatch.errors import ConfigError, DataError, reason
from inbatch.models.backbones import published_cfg
from inbatch.models.encoder import Encoder
from inbatch.models.factory import restored
from inbatch.models.transform import Transform
from inbatch.models.weights import as_one, read_folder, timm_config, write
from inbatch.nn.eval_mode import evaluating, in_pieces
from inbatch.runtime.files import object_in, read_json
from inbatch.runtime.isolation import briefly_isolated, usual_numerics
from inbatch.runtime.paths import path_of

LAYER = "linear"
"""Name of the linear layer in model.safetensors, if timm has none for the backbone."""


class Classifier(nn.Module):
    """An encoder with a linear layer on its features.

    forward: normalised float (N, channels, size, size) -> logits (N, C), of which the softmax is the calibrated
    probability. It has the interface of an encoder for `inbatch.evaluation.embed_stream`, with logits as rows.

    Attributes:
        encoder: the encoder.
        head: linear layer on `encoder.represent`, divided by the temperature.
        classes: names of the classes, in the order of the logits.
        temperature: by which the logits were divided.
        figures: figures on held-out images, and how the classifier was trained, in JSON types.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Linear,
        classes: Sequence[str],
        *,
        temperature: float = 1.0,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (head.in_features, head.out_features) != (encoder.feature_width, len(classes)):
            raise ConfigError(
                f"a linear layer of {head.in_features} x {head.out_features} does not fit {encoder.feature_width} "
                f"features and {len(classes)} classes: it must have these sizes"
            )
        self.encoder, self.head, self.classes = encoder, head, tuple(classes)
        self.temperature, self.figures = temperature, dict(figures or {})

    @property
    def name(self) -> str:
        return self.encoder.name

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def size(self) -> int:
        return self.encoder.size

    @property
    def channels(self) -> int:
        return self.encoder.channels

    @property
    def levels(self) -> Levels | None:
        return self.encoder.levels

    @property
    def prepare(self) -> Callable[[Iterable[Tensor]], Tensor]:
        return self.encoder.prepare

    @property
    def transform(self) -> Transform:
        """The preparation of one image, as `Encoder.transform`."""
        return self.encoder.transform

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n k"]:
        rows: Float[Tensor, "n k"] = self.head(self.encoder.represent(x))
        return rows

    def evaluating(self) -> AbstractContextManager[None]:
        """Set evaluation mode without gradient within the context."""
        return evaluating(self)

    @usual_numerics()
    def predict_proba(self, images: Any, batch: int = 256) -> np.ndarray:
        """Return the probabilities of the classes (N, C) float32.

        Args:
            images: images in a form that `Encoder.embed` takes.
            batch: images at a time.

        Raises:
            DataError: if the images are of another form.
        """
        images, rows = self.encoder.sequence(images), [torch.empty(0, len(self.classes))]
        for start in range(0, len(images), batch):
            with self.evaluating():
                logits = in_pieces(self, self.encoder.preprocess(images[start : start + batch]))
                rows.append(logits.float().softmax(1).cpu())
        return torch.cat(rows).numpy()

    def predict(self, images: Any, batch: int = 256) -> np.ndarray:
        """Return the names of the most probable classes (N,); arguments as `predict_proba`."""
        return np.array(self.classes)[self.predict_proba(images, batch).argmax(1)]


def linear_layer(
    weight: Float[Tensor, "c f"], bias: Float[Tensor, "c"], temperature: float, mean: Any = None, std: Any = None
) -> nn.Linear:
    """Return the linear layer with the logits ((x - mean) / std) W^T + b, divided by a temperature.

    mean, std: of the features, (F,); None if they are not standardised.
    """
    weight, bias = weight.detach().double(), bias.detach().double()
    if mean is not None and std is not None:
        weight = weight / std.double()
        bias = bias - weight @ mean.double()
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight.copy_(weight / temperature)
    layer.bias.copy_(bias / temperature)
    return layer.to(weight.device)


def timm_layer(encoder: Encoder, classes: int) -> str | None:
    """Return timm's name for a linear layer on the features of an encoder.

    None if timm cannot build it: for example, CAFormer has more layers there, and a distilled ViT two linear layers.
    """
    config, name = timm_config(encoder), published_cfg(encoder.backbone).get("classifier")
    if not config or encoder.readout is not None or not isinstance(name, str):
        return None
    import timm

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = timm.create_model(config["architecture"], num_classes=classes, **config["model_args"])
    theirs = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    ours = {key: tuple(x.shape) for key, x in as_one(encoder)[0].items()}
    ours |= {f"{name}.weight": (classes, encoder.width), f"{name}.bias": (classes,)}
    return name if theirs == ours else None


def save_classifier(classifier: Classifier, directory: str | Path) -> None:
    """Write model.safetensors with all weights, and config.json, each replaced atomically.

    If timm can build the backbone with a linear layer (`timm_layer`), the layer has timm's name for it, and
    `timm.create_model("local-dir:DIRECTORY", pretrained=True)` returns the classifier with the same logits.
    """
    encoder, folder = classifier.encoder, path_of(directory, "directory")
    weights, ours = as_one(encoder)
    named, others = timm_layer(encoder, len(classifier.classes)), dict[str, Any]()
    if named is not None:
        others = timm_config(encoder)
        others |= {"num_classes": len(classifier.classes), "label_names": list(classifier.classes)}
    layer = named or LAYER
    weights |= {f"{layer}.{k}": v for k, v in classifier.head.state_dict().items()}
    ours["classifier"] = {
        "layer": layer,
        "classes": list(classifier.classes),
        "temperature": classifier.temperature,
        "figures": classifier.figures,
    }
    write(folder, weights, ours, others)


def holds_classifier(folder: Path) -> bool:
    """Return whether a folder is one of `save_classifier`, by its config.json."""
    file = folder / "config.json"
    try:
        return bool(object_in(object_in(read_json(file), "inbatch", file), "classifier", file))
    except DataError:
        return False


@briefly_isolated
def load_classifier(directory: str | Path) -> Classifier:
    """Return the classifier in a folder that `train_classifier` wrote, in evaluation mode.

    Raises:
        ConfigError: if the folder does not exist or holds no classifier.
        DataError: if it is damaged.
    """
    folder = path_of(directory, "classifier")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not the folder of a classifier: it has no config.json; inbatch train-classifier writes one"
        )
    weights, config = read_folder(folder)
    saved = object_in(config, "classifier", folder / "config.json")
    if not saved:
        raise ConfigError(f"{folder} holds an encoder without a classifier: train one with inbatch train-classifier")
    encoder = restored(weights, config, folder)
    try:
        layer, classes = saved["layer"], [str(name) for name in saved["classes"]]
        head = linear_layer(weights[f"{layer}.weight"], weights[f"{layer}.bias"], 1.0)
        temperature, figures = float(saved["temperature"]), dict(saved["figures"])
        classifier = Classifier(encoder, head, classes, temperature=temperature, figures=figures)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ConfigError) as error:
        raise DataError(
            f"{folder}: config.json describes no classifier ({reason(error)}): train it again (inbatch "
            "train-classifier)"
        ) from None
    return classifier.eval().requires_grad_(False)
