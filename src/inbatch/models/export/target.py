"""What all targets of an export share: the result of writing one, and the comparison of its features."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import ConfigError, DataError, InbatchError, reason
from inbatch.models.encoder import Encoder

TOLERANCE = 1e-4
"""Maximum difference of a feature after an export, as a share of the largest feature or of 1."""
_BATCHES = (2, 5)
"""Numbers of images in the two batches that are compared: the first is that of the traced graph."""


@dataclass(frozen=True)
class Written:
    """What a target has written into a folder, and how it was checked.

    Attributes:
        opened_by: library and version that opened the files for the comparison.
        difference: largest difference from the encoder's features, over 7 random images.
        largest: largest feature of these images.
        features: "embed" if they are those of `Encoder.embed`, "before whitening" for an encoder with `whiten`.
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
        write: writes an encoder into an empty folder, with facts on its training, and checks the files.
        summary: one line for help and documentation.
    """

    write: Callable[[Encoder, Path, Mapping[str, Any]], Written]
    summary: str


def compare(encoder: Encoder, run: Callable[[Tensor], Any], what: str, whitened: bool = True) -> tuple[float, float]:
    """Return the largest difference of features after an export, and the largest feature.

    Args:
        encoder: the encoder, on the CPU.
        run: returns the features (N, F) of uint8 images (N, C, size, size) as computed by the exported files.
        what: what was exported, for the message.
        whitened: compare with the features of `embed`; False: with those of `forward`, before whitening.

    Raises:
        DataError: if features of the encoder are not finite.
        InbatchError: if the difference is above `TOLERANCE`, or if the files give another number of features.
    """
    generator = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for count in _BATCHES:
        shape = count, encoder.channels, encoder.size, encoder.size
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with encoder.evaluating():
            prepared = encoder.preprocess(images)
            expected = (encoder.represent(prepared) if whitened else encoder(prepared)).float()
        if not expected.isfinite().all():
            raise DataError(f"the encoder {encoder.name} gives features that are not finite: its training has diverged")
        found = torch.as_tensor(run(images)).detach().float()
        if found.shape != expected.shape:
            raise InbatchError(
                f"{what} gives features of shape {tuple(found.shape)} instead of {tuple(expected.shape)}; nothing was "
                "written. Choose another target"
            )
        gap = float((found - expected).abs().max())
        difference = max(difference, gap if found.isfinite().all() else math.inf)  # max() would drop NaN
        largest = max(largest, float(expected.abs().max()))
    if not difference <= TOLERANCE * max(1.0, largest):
        raise InbatchError(
            f"{what} gives other features: they differ by up to {difference:.2g}, the largest is {largest:.2g}; "
            f"nothing was written. Choose another target"
        )
    return difference, largest


def library(name: str) -> str:
    """Return the name of a distribution with its version."""
    return f"{name} {version(name)}"


def required(*names: str, extra: str) -> list[Any]:
    """Import libraries of an extra; ConfigError with its name if one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise ConfigError(
            f'this export needs {" and ".join(names)} ({reason(error)}): pip install "inbatch[{extra}]"'
        ) from None


@contextmanager
def refused(encoder: Encoder, target: str, hint: str) -> Iterator[None]:
    """Turn a ConfigError within the context into the statement that a target cannot build this encoder."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{encoder.name} cannot be exported to {target}: {error}. {hint}") from error
