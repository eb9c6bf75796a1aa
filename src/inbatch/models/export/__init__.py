"""Export of encoders and classifiers for other libraries: one file per target, and their registry."""

import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, InbatchError, closest, reason
from inbatch.models.classifier import Classifier
from inbatch.models.encoder import Encoder
from inbatch.models.export import to_coreml, to_hf, to_onnx, to_timm, to_torch, to_torchvision
from inbatch.models.export.folder import ENCODER_FILES, MANIFEST, check_free, contents, own_files, replaced
from inbatch.models.export.target import Target, Written
from inbatch.models.export.to_hf import push
from inbatch.runtime.files import write_json
from inbatch.runtime.isolation import usual_numerics

__all__ = ["ENCODER_FILES", "TARGETS", "check_free", "export_model", "own_files", "push", "target_named"]

TARGETS: dict[str, Target] = {
    "timm": Target(to_timm.write, "folder for timm.create_model"),
    "torchvision": Target(
        to_torchvision.write,
        "state dict for torchvision.models, also inside detection models",
        no_classifier="its files are the weights of a backbone",
    ),
    "hf": Target(
        to_hf.write,
        "folder for transformers and the Hugging Face hub, with a model card",
        no_classifier="its model card describes an encoder",
    ),
    "onnx": Target(to_onnx.write, "ONNX graph from uint8 images to features, of any number of images"),
    "torch": Target(to_torch.write, "program of torch.export (.pt2), likewise"),
    "coreml-ready": Target(
        to_coreml.write,
        "program with fixed shapes, and a script for coremltools",
        no_classifier="its script converts features",
    ),
}
"""Targets by name."""


def target_named(name: str) -> Target:
    """Return a target; ConfigError for an unknown name."""
    if name not in TARGETS:
        near = closest(name, TARGETS)
        raise ConfigError(
            f"unknown target {name!r}: " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(TARGETS)}")
        )
    return TARGETS[name]


@usual_numerics()
def export_model(
    model: Encoder | Classifier, out: Path, target: str, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a model to a folder for another library, check it there, and return what was written.

    The folder appears complete or not at all. An empty folder or a previous export is replaced.

    Args:
        model: the encoder, or the classifier with its head; it is exported on the CPU, in evaluation mode.
        out: the folder.
        target: a name of `TARGETS`.
        facts: facts on the training, for the model card and the metadata of files.

    Returns:
        The content of export.json: "target", "encoder", "input", "features" (of a classifier "classes" and
        "temperature"), "check" (library, largest difference of features or probabilities), "load" (a line of Python),
        "files" (bytes, sha256).

    Raises:
        ConfigError: for an unknown target, a target that cannot build the model, a missing library, or a folder that
            is not an export.
        DataError: if features or probabilities are not finite.
        InbatchError: if the exported files give others, or cannot be written.
    """
    chosen, facts = target_named(target), dict(facts or {})
    encoder = model.encoder if isinstance(model, Classifier) else model
    if isinstance(model, Classifier):
        if chosen.no_classifier is not None:
            raise ConfigError(
                f"a classifier cannot be exported to {target}: {chosen.no_classifier}. Choose --to onnx, torch or "
                "timm, or export its encoder alone (inbatch export CLASSIFIER -o ENCODER) and then that folder"
            )
        facts |= {"classes": list(model.classes), "temperature": model.temperature}
    check_free(out)
    own = model.device
    try:
        model.cpu()
        with replaced(out) as folder, model.evaluating():
            try:
                written = chosen.write(model, folder, facts)
            except (InbatchError, MemoryError, OSError):
                raise
            except Exception as error:  # a foreign library raises any exception for a model that it does not expect
                raise InbatchError(
                    f"{model.name} cannot be exported to {target}: {reason(error)[:300]}. Choose another target"
                ) from error
            result: dict[str, Any] = {
                "inbatch": version("inbatch"),
                "target": target,
                "encoder": {"name": encoder.name, "width": encoder.width, "attend": encoder.attend},
                "input": _input(encoder, target),
                **_output(model, written),
                "load": _with_folder(written.load, str(out)),
                **written.more,
                "files": contents(folder),
            }
            write_json(folder / MANIFEST, result)
    finally:
        model.to(own)
    return result


def _with_folder(line: str, out: str) -> str:
    """Return a line of Python or of a shell with the folder in the places of OUT."""
    return re.sub("OUT(/?)", lambda place: shlex.quote(out) + "/" if place[1] else repr(out), line)


def _output(model: Encoder | Classifier, written: Written) -> dict[str, Any]:
    """Return what the exported files compute, and how it was checked."""
    check = {"library": written.opened_by, "max_difference": written.difference}
    if isinstance(model, Classifier):
        classes = {"classes": list(model.classes), "temperature": model.temperature}
        return classes | {"check": check | {"largest_probability": written.largest}}
    number = model.feature_width if written.features == "embed" else model.width
    features = {"number": number, "as": written.features}
    return {"features": features, "check": check | {"largest_feature": written.largest}}


def _input(encoder: Encoder, target: str) -> dict[str, Any]:
    """Return the images that the exported files take, and how they are prepared."""
    size = encoder.size
    inside = target in ("onnx", "torch", "coreml-ready")
    return {
        "shape": ["N" if target != "coreml-ready" else 1, encoder.channels, size, size],
        "dtype": "uint8" if target in ("onnx", "torch") else "float32",
        "values": "0 to 255" if inside else "(pixels / 255 - mean) / std",
        "normalisation": "included" if inside else "not included",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "resize_shorter_side": round(size * 256 / 224) if size >= 128 else size,
        "crop_centre": size,
        "interpolation": "bilinear, antialiased",
        "levels": encoder.levels,
    }
