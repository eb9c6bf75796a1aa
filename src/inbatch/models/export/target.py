"""What all targets of an export share: the result of writing one, and the comparison of what it computes."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import DIVERGED, ConfigError, DataError, InbatchError
from inbatch.models.classifier import Classifier
from inbatch.models.encoder import Encoder

TOLERANCE = 1e-4
"""Maximum difference of a feature or probability after an export, as a share of the largest one or of 1."""
_BATCHES = (2, 5)
"""Numbers of images in the two batches that are compared: the first is that of the traced graph."""


@dataclass(frozen=True)
class Written:
    """What a target has written into a folder, and how it was checked.

    Attributes:
        opened_by: library and version that opened the files for the comparison.
        difference: largest difference from the encoder's features or the classifier's probabilities, over 7 random
            images.
        largest: largest feature, or probability, of these images.
        features: "embed" if they are those of `Encoder.embed`, "before whitening" for an encoder with `whiten`. It does
            not apply to a classifier.
        load: line that opens the files; OUT stands for the folder.
        more: further entries of the result and of export.json.
    """

    opened_by: str
    difference: float
    largest: float
    load: str
    features: str = "embed"
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A target of an export.

    Attributes:
        write: writes an encoder into an empty folder, with facts on its training, and checks the files; a classifier,
            too, unless there is a reason against it.
        summary: one line for help and documentation.
        no_classifier: reason why a classifier cannot be written.
    """

    write: Callable[[Any, Path, Mapping[str, Any]], Written]
    summary: str
    no_classifier: str | None = None


def rows_of(model: Encoder | Classifier) -> str:
    """Return the name of what a model computes for an image: "features", or "probabilities" of a classifier."""
    return "probabilities" if isinstance(model, Classifier) else "features"


def file_of(model: Encoder | Classifier, suffix: str) -> str:
    """Return the name of the file of a whole model, such as "encoder.onnx" or "classifier.onnx"."""
    return ("classifier" if isinstance(model, Classifier) else "encoder") + suffix


def compare(
    model: Encoder | Classifier, run: Callable[[Tensor], Any], what: str, whitened: bool = True
) -> tuple[float, float]:
    """Return the largest difference of features or probabilities after an export, and the largest of them.

    Args:
        model: the encoder or classifier, on the CPU.
        run: returns the features (N, F) or probabilities (N, classes) of uint8 images (N, C, size, size), as computed
            by the exported files.
        what: what was exported, for the message.
        whitened: compare with the features of `embed`; False: with those of `forward`, before whitening. It does not
            apply to a classifier.

    Raises:
        DataError: if the features or probabilities of the model are not finite.
        InbatchError: if the difference is above `TOLERANCE`, or if the files give another number of them.
    """
    generator = torch.Generator().manual_seed(0)
    difference, largest, rows = 0.0, 0.0, rows_of(model)
    for count in _BATCHES:
        shape = count, model.channels, model.size, model.size
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected = _expected(model, images, whitened)
        if not expected.isfinite().all():
            raise DataError(f"{model.name} gives {rows} that are not finite: {DIVERGED}")
        computed = torch.as_tensor(run(images)).detach().float()
        if computed.shape != expected.shape:
            raise InbatchError(
                f"{what} gives {rows} of shape {tuple(computed.shape)} instead of {tuple(expected.shape)}; nothing was "
                "written. Choose another target"
            )
        gap = float((computed - expected).abs().max())
        difference = max(difference, gap if computed.isfinite().all() else math.inf)  # max() would drop NaN
        largest = max(largest, float(expected.abs().max()))
    if not difference <= TOLERANCE * max(1.0, largest):
        raise InbatchError(
            f"{what} gives other {rows}: they differ by up to {difference:.2g}, the largest is {largest:.2g}; "
            f"nothing was written. Choose another target"
        )
    return difference, largest


def _expected(model: Encoder | Classifier, images: Tensor, whitened: bool) -> Tensor:
    """Return the features or probabilities that the model itself computes."""
    if isinstance(model, Classifier):
        return torch.from_numpy(model.predict_proba(images))
    with model.evaluating():
        prepared = model.preprocess(images)
        return (model.represent(prepared) if whitened else model(prepared)).float()


def library(name: str) -> str:
    """Return the name of a distribution with its version."""
    return f"{name} {version(name)}"


@contextmanager
def refused(encoder: Encoder, target: str, hint: str) -> Iterator[None]:
    """Turn a ConfigError within the context into the statement that a target cannot build this encoder."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{encoder.name} cannot be exported to {target}: {error}. {hint}") from error
