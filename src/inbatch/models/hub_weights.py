"""Weights of a repository of the Hugging Face hub, `hub:NAME` or `hub:NAME@REVISION`, from its cache or the network."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, DataError, reason
from inbatch.models.backbones import reached
from inbatch.models.weight_files import Contents, indexed_files, read_contents
from inbatch.runtime.files import read_json

PREFIX = "hub:"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", *_INDEXES)


def is_hub(init: Any) -> bool:
    """Return whether a value of `init` names a repository of the hub."""
    return isinstance(init, str) and init.startswith(PREFIX)


def read_hub(name: str) -> tuple[Contents, dict[str, Any]]:
    """Return the weights of a repository, and mean and std of its config.json, if it states them.

    Args:
        name: `hub:OWNER/NAME`, with `@REVISION` if it is not the main one.

    Raises:
        ConfigError: If the repository or its weights are not in the cache and cannot be downloaded.
        DataError: If the weights cannot be read.
    """
    config = hub_config(name)
    file = next((path for path in (_file(name, one) for one in _FILES) if path is not None), None)
    if file is None:
        raise ConfigError(f"{name} has none of the files {', '.join(_FILES)}: choose another repository")
    for part in indexed_files(file) if file.name in _INDEXES else ():
        _file(name, part)  # into the folder of the index
    return _with_activation(read_contents(file), config), _published(config)


def folder_weights(folder: Path) -> tuple[Contents, dict[str, Any]] | None:
    """Return the weights of a folder in the layout of the hub; None if this library wrote it, or it has none."""
    file = next((folder / one for one in _FILES if (folder / one).is_file()), None)
    config = read_config(folder / "config.json")
    if file is None or "inbatch" in config or ((folder / "config.json").exists() and not config):
        return None
    return _with_activation(read_contents(file), config), _published(config)


def _with_activation(contents: Contents, config: dict[str, Any]) -> Contents:
    """Return the contents with the activation that a config.json of transformers states, that of its vision tower."""
    part = config.get("vision_config")
    stated = (part if isinstance(part, dict) else config).get("hidden_act")
    return replace(contents, values=contents.values | {"hidden_act": stated}) if isinstance(stated, str) else contents


def _published(config: dict[str, Any]) -> dict[str, Any]:
    """Return mean and std of a config.json, if they are lists of numbers."""
    cfg = config.get("pretrained_cfg")
    known = {key: cfg.get(key) for key in ("mean", "std")} if isinstance(cfg, dict) else {}
    return {key: value for key, value in known.items() if isinstance(value, list) and value}


def hub_config(name: str) -> dict[str, Any]:
    """Return config.json of a repository; empty if it has none."""
    file = _file(name, "config.json")
    return {} if file is None else read_config(file)


def read_config(file: Path) -> dict[str, Any]:
    """Return the object in a config.json; empty if there is none that can be read."""
    try:
        content = read_json(file)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _file(name: str, file: str) -> Path | None:
    """Return the path of a file of a repository, from the cache or the network; None if it has no such file."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:
            return None  # known not to exist
        if constants.HF_HUB_OFFLINE or not reached(constants.ENDPOINT):
            if file == "config.json" or _any_cached(repository, revision):
                return None
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
            raise ConfigError(
                f"the weights of {name} are not in a cache, and {why}. Without a network, give init the path of a "
                "downloaded .safetensors file"
            )
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except EntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError):
        raise ConfigError(f"{name}: there is no such repository; write {PREFIX}OWNER/NAME, as on the hub") from None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"the weights of {name} cannot be downloaded: {reason(error)}") from None


def _any_cached(repository: str, revision: str) -> bool:
    """Return whether the cache holds any file of weights of a repository."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repository, one, revision=revision or None), str | os.PathLike)
               for one in _FILES)  # fmt: skip
