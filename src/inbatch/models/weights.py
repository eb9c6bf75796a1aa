"""Encoder weights on disk, in timm's `local-dir` layout: reading, fitting, saving. Pickle code is never executed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from inbatch.errors import ConfigError, DataError, reason
from inbatch.models.attention_slots import blocks, without
from inbatch.models.backbones import published_cfg, timm_arguments
from inbatch.models.encoder import Encoder
from inbatch.models.lora import plain_backbone
from inbatch.models.readout import Readout
from inbatch.runtime.files import check_writable, object_in, read_json, replacing
from inbatch.runtime.paths import path_of

_AGAIN = "copy or export the folder again"
READOUT = "readout.safetensors"
"""File next to model.safetensors, which other libraries load and in which they would reject more tensors."""
INSIDE = "readout"
"""Prefix of these statistics in weights that hold everything, those of `as_one`."""


def fill(backbone: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    """Load weights that fit exactly; else ConfigError lists those that are missing, unexpected or of another shape."""
    own = backbone.state_dict()
    problems = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [k for k in own if k in weights and own[k].shape != weights[k].shape],
    }
    mismatches = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in problems.items() if v]
    if mismatches:
        raise ConfigError(
            f"the weights do not fit {what}: {'; '.join(mismatches)}. Choose weights of the same architecture."
        )
    backbone.load_state_dict(weights)


def read(path: Path | Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights, and the inbatch part of config.json if any, from a folder or an encoder.

    For an encoder, returns what `save_encoder` would write; for the folder of a classifier, the weights of its encoder.
    """
    if isinstance(path, Encoder):
        module, ours = as_saved(path)
        return dict(module.state_dict()), ours
    weights, config = read_folder(path)
    return encoder_weights(weights, config), config


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all weights and the inbatch part of config.json of an encoder's or a classifier's folder."""
    try:
        data = (path / "model.safetensors").read_bytes()
        whole = read_json(path / "config.json")
        config = object_in(whole, "inbatch", path / "config.json")
        if "inbatch" in whole and "sha256" not in config:
            raise DataError(
                f"{path / 'config.json'} does not describe the weights beside it: its object 'inbatch' lacks 'sha256'; "
                "export the encoder again, or pass the file model.safetensors"
            )
        if config and hashlib.sha256(data).hexdigest() != config["sha256"]:
            raise DataError(
                f"{path}: model.safetensors is not the file config.json describes; it is damaged: {_AGAIN}."
            )
        return safetensors.torch.load(data), config
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{path} cannot be read as weights: a folder needs model.safetensors and config.json; of another one, pass "
            "the file of weights in it"
        ) from None
    except Exception as e:  # a crafted file makes the reader raise any exception
        raise DataError(f"{path} cannot be read as weights: {str(e) or reason(e)}; {_AGAIN}") from e


def encoder_weights(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights without those of the readout and of the linear layer of a classifier."""
    layer = object_in(config, "classifier", Path("config.json")).get("layer")
    others = [f"{name}." for name in (layer, INSIDE if _is_inside(config) else None) if name is not None]
    return {k: v for k, v in weights.items() if not k.startswith(tuple(others))}


def _is_inside(config: dict[str, Any]) -> bool:
    """Return whether the readout is among the weights, instead of in a file with a checksum of its own."""
    readout = config.get("readout")
    return isinstance(readout, dict) and "sha256" not in readout


def save_encoder(encoder: Encoder, directory: str | Path) -> None:
    """Write `model.safetensors` and `config.json`, each replaced atomically, in timm's `local-dir` layout.

    A plain timm architecture loads with `timm.create_model("local-dir:DIRECTORY", pretrained=True)`, and with
    transformers, `AutoModel.from_pretrained(DIRECTORY)`. With attention, the weights of the backbone keep their plain
    names, and those of the n-th block are added as `attend.n.NAME`.
    """
    module, ours = as_saved(encoder)
    folder = path_of(directory, "directory")
    check_writable(folder / "config.json")
    write(folder, module.state_dict(), ours | write_readout(encoder, folder), timm_config(encoder))


def as_saved(encoder: Encoder) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module that is saved, and the inbatch part of config.json."""
    keys = ("name", "size", "channels", "width", "mean", "std", "stem", "arguments", "attend", "levels")
    backbone = plain_backbone(encoder)
    if encoder.attend:
        backbone = without(encoder).backbone
        backbone.add_module("attend", blocks(encoder))
    own = {} if encoder.own is None else {"own": encoder.own}
    return backbone, {k: getattr(encoder, k) for k in keys} | own


def as_one(encoder: Encoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all weights of an encoder, with its readout, and the inbatch part of config.json for them."""
    module, ours = as_saved(encoder)
    weights: dict[str, Tensor] = dict(module.state_dict())
    if readout := encoder.readout:
        weights |= {f"{INSIDE}.{k}": v for k, v in readout.state_dict().items()}
        ours = ours | {"readout": {"grid": readout.grid, "eps": readout.eps}}
    return weights, ours


def packed(weights: Mapping[str, Tensor]) -> bytes:
    """Return weights as the bytes of a safetensors file."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()})


def write_readout(encoder: Encoder, directory: Path) -> dict[str, Any]:
    """Write the readout's statistics next to the weights; return its entry of config.json."""
    readout = encoder.readout
    if readout is None:
        (directory / READOUT).unlink(missing_ok=True)
        return {}
    data = packed(readout.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / READOUT) as file:
        file.write(data)
    return {"readout": {"grid": readout.grid, "eps": readout.eps, "sha256": hashlib.sha256(data).hexdigest()}}


def set_readout(encoder: Encoder, weights: dict[str, Tensor], config: dict[str, Any], directory: Path) -> None:
    """Set the readout that was saved with an encoder; DataError if the file is damaged or missing.

    Args:
        encoder: the encoder.
        weights: the weights in `directory`, which may include the readout (`as_one`).
        config: the inbatch part of config.json.
        directory: folder of the encoder, or of the classifier.
    """
    saved = config.get("readout")
    if not saved:
        return
    path = directory / READOUT
    try:
        if _is_inside(config):
            begin = f"{INSIDE}."
            state = {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}
        else:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != saved["sha256"]:
                raise DataError(f"{path} is not the file config.json describes; it is damaged: {_AGAIN}.")
            state = safetensors.torch.load(data)
        encoder.readout = Readout(encoder.width, int(saved["grid"]), float(saved["eps"]))
        encoder.readout.load_state_dict(state)
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}; {_AGAIN}") from None


def split(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the plain backbone, and those of the attention blocks, n.NAME."""
    attend = {k: v for k, v in weights.items() if k.startswith("attend.")}
    return {k: v for k, v in weights.items() if k not in attend}, {
        k.removeprefix("attend."): v for k, v in attend.items()
    }


def write(directory: Path, weights: Mapping[str, Tensor], ours: dict[str, Any], others: dict[str, Any]) -> None:
    """Write weights with the inbatch part of config.json and the part that other libraries read."""
    data = packed(weights)
    config = {**others, "inbatch": {**ours, "sha256": hashlib.sha256(data).hexdigest()}}
    for name, content in (("model.safetensors", data), ("config.json", json.dumps(config, indent=2).encode())):
        with replacing(directory / name) as file:
            file.write(content)


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """Return timm's part of config.json; empty if timm alone cannot build the backbone."""
    known = published_cfg(encoder.backbone)
    if not known or encoder.arguments is None or encoder.stem == "cifar" or encoder.attend:
        return {}
    name, args = timm_arguments(encoder.name, encoder.size, encoder.channels, encoder.arguments)
    pretrained_cfg: dict[str, Any] = {
        "input_size": (encoder.channels, encoder.size, encoder.size),
        "mean": encoder.mean,
        "std": encoder.std,
        "crop_pct": 224 / 256 if encoder.size >= 128 else 1.0,
        "interpolation": "bilinear",
        "fixed_input_size": "img_size" in args,
        **{k: known[k] for k in ("first_conv", "classifier") if k in known},
    }
    return {
        "architecture": name.partition(".")[0],
        "num_classes": args.pop("num_classes"),  # transformers passes it next to `model_args`
        "num_features": encoder.width,
        "model_args": args,
        "pretrained_cfg": pretrained_cfg,
    }
