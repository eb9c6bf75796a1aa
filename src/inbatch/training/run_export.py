"""Export of a run's encoder, or of a classifier: its own folder, or the files of another library."""

from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, InbatchError, Unwritten
from inbatch.models import load_classifier, save_encoder
from inbatch.models.classifier import holds_classifier
from inbatch.models.export import ENCODER_FILES, check_free, export_model, push, target_named
from inbatch.runtime.files import read_json
from inbatch.runtime.isolation import briefly_isolated
from inbatch.runtime.paths import path_of
from inbatch.training.run_encoder import RunEncoder, load_run_encoder
from inbatch.training.run_facts import run_facts


@briefly_isolated
def export_run(
    path: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    push_to: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write the encoder of a run, finished or stopped, into its own folder, for this or for another library.

    Without `to`, as `save_encoder` does: `inbatch.load(out)` reads it, and so does timm (`local-dir:`) if it can build
    the backbone, as "timm" in the result states. With `to`, the files are opened by the other library and compared with
    the encoder before the folder appears; `docs/after/export.md` has a table of targets and encoders. Of a classifier,
    the encoder alone is written without `to`, and the classifier with its probabilities with `to`.

    Args:
        path: run directory, or the folder of an encoder or of a classifier.
        out: folder to write; an empty folder or a previous export is replaced.
        to: "timm", "torchvision", "hf", "onnx", "torch" or "coreml-ready".
        push_to: with "hf": repository of the Hugging Face hub to which the folder is uploaded, "USER/NAME". It is
            created as a private one.
        licence: with "hf": licence of the weights in the model card, such as "apache-2.0".

    Returns:
        The run, the folder, the encoder and its step; with `to` also the files with their sizes and SHA-256, the
        largest difference of features or probabilities, the classes of a classifier, and how to load the files.

    Raises:
        ConfigError: for an unknown target, one that cannot build the model, a missing library, the folder of the
            model itself, or one that contains anything except a previous export.
        InbatchError: if the other library gives other features, or files cannot be written.
        Unwritten: if the upload fails; the folder is then complete.
    """
    if to != "hf" and (push_to is not None or licence is not None):
        raise ConfigError("--push and --license belong to --to hf: add it, or leave them out")
    if to is not None:
        target_named(to)
    path, out = path_of(path), path_of(out, "out")
    if out.resolve() == path.resolve():
        raise ConfigError(f"{out} is the model to export, which must not be replaced: choose another folder")
    check_free(out, ENCODER_FILES if to is None else None)
    loaded = load_run_encoder(path)
    encoder = loaded.encoder
    what = {"encoder": encoder.name, "size": encoder.size, "channels": encoder.channels}
    what |= {"width": encoder.feature_width}
    result: dict[str, Any] = {"run": str(path), "out": str(out)}
    if to is None:
        save_encoder(encoder, out)
        readable_by_timm = "architecture" in read_json(out / "config.json")
        return result | {"timm": readable_by_timm} | what | loaded.stage()
    result |= _exported(loaded, path, out, to, licence) | what | loaded.stage()
    if push_to is not None:
        try:
            result["pushed"] = push(out, push_to)
        except ConfigError:
            raise
        except InbatchError as error:
            raise Unwritten(str(error), result) from error
    return result


def _exported(loaded: RunEncoder, run: Path, out: Path, to: str, licence: str | None) -> dict[str, Any]:
    facts = run_facts(run) | {"step": loaded.step, "steps": loaded.steps, "licence": licence}
    model = load_classifier(run) if holds_classifier(run) else loaded.encoder
    written = export_model(model, out, to, {key: value for key, value in facts.items() if value is not None})
    return {key: value for key, value in written.items() if key not in ("encoder", "inbatch")}
