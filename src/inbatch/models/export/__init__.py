"""Export of encoders for other libraries: one file per target, and their registry."""

import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, InbatchError, closest, reason
from inbatch.models.encoder import Encoder
from inbatch.models.export import to_coreml, to_hf, to_onnx, to_timm, to_torch, to_torchvision
from inbatch.models.export.folder import ENCODER_FILES, MANIFEST, check_free, contents, replaced
from inbatch.models.export.target import Target
from inbatch.models.export.to_hf import push
from inbatch.runtime.files import write_json
from inbatch.runtime.isolation import usual_numerics

__all__ = ["ENCODER_FILES", "TARGETS", "check_free", "export_encoder", "push", "target_named"]

TARGETS: dict[str, Target] = {
    "timm": Target(to_timm.write, "folder for timm.create_model"),
    "torchvision": Target(to_torchvision.write, "state dict for torchvision.models, also inside detection models"),
    "hf": Target(to_hf.write, "folder for transformers and the Hugging Face hub, with a model card"),
    "onnx": Target(to_onnx.write, "ONNX graph from uint8 images to features, of any number of images"),
    "torch": Target(to_torch.write, "program of torch.export (.pt2), likewise"),
    "coreml-ready": Target(to_coreml.write, "program with fixed shapes, and a script for coremltools"),
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
def export_encoder(encoder: Encoder, out: Path, target: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write an encoder to a folder for another library, check its features there, and return what was written.

    The folder appears complete or not at all. An empty folder or a previous export is replaced.

    Args:
        encoder: the encoder; a copy of it on the CPU is exported, in evaluation mode.
        out: the folder.
        target: a name of `TARGETS`.
        facts: facts on the training, for the model card and the metadata of files.

    Returns:
        The content of export.json: "target", "encoder", "input", "features", "check" (library, largest difference of
        features), "load" (a line of Python), "files" (bytes, sha256).

    Raises:
        ConfigError: for an unknown target, a target that cannot build the encoder, a missing library, or a folder that
            is not an export.
        DataError: if features are not finite.
        InbatchError: if the exported files give other features, or cannot be written.
    """
    write = target_named(target).write
    check_free(out)
    own = encoder.device
    try:
        encoder.cpu()
        with replaced(out) as folder, encoder.evaluating():
            try:
                written = write(encoder, folder, facts or {})
            except (InbatchError, MemoryError, OSError):
                raise
            except Exception as error:  # a foreign library raises any exception for a model that it does not expect
                raise InbatchError(
                    f"{encoder.name} cannot be exported to {target}: {reason(error)[:300]}. Choose another target"
                ) from error
            result: dict[str, Any] = {
                "inbatch": version("inbatch"),
                "target": target,
                "encoder": {"name": encoder.name, "width": encoder.width, "attend": encoder.attend},
                "input": _input(encoder, target),
                "features": {"number": encoder.feature_width if written.features == "embed" else encoder.width}
                | {"as": written.features},
                "check": {"library": written.opened_by, "max_difference": written.difference}
                | {"largest_feature": written.largest},
                "load": written.load.replace("OUT/", shlex.quote(str(out)) + "/").replace("OUT", repr(str(out))),
                **written.more,
                "files": contents(folder),
            }
            write_json(folder / MANIFEST, result)
    finally:
        encoder.to(own)
    return result


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
