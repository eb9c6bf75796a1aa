"""Requested settings of a run: merged from arguments and a file, with the default budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.data.streams import READ_BUFFER
from inbatch.errors import ConfigError
from inbatch.runtime import own_parts
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.remote import is_url, public
from inbatch.training.recipe import PARTS, Settings
from inbatch.training.settings_file import read_file


def requested_data(data: Any, settings: Settings) -> Any:
    """Return the data to learn from: the argument, else the setting."""
    data = joined_paths(settings.get("data") if data is None else data)
    if data is None:
        raise ConfigError("no images: pass --data with a folder, a file of images, or a data set such as digits-canvas")
    return data


def requested_test(test: Any) -> Settings:
    """Return the setting of test data that are passed as a path, which a resumed run reads again; empty for others."""
    test = joined_paths(test)
    return {"test": public(str(test))} if isinstance(test, str | Path) else {}


def merged_settings(
    method: str | None, config: str | Path | None, settings: Mapping[str, Any] | None, values: Mapping[str, Any]
) -> Settings:
    """Return the requested settings, merged with those of a file.

    Args:
        method: Name of the method.
        config: A YAML or JSON file of settings.
        settings: Dotted settings, which override `method` and `values`.
        values: Settings by top-level name; the value of a part is its name.
    """
    requested: Settings = {} if method is None else {"method.name": method}
    requested |= {f"{key}.name" if key in (*PARTS, "schedule") else key: value for key, value in values.items()}
    requested |= dict(settings or {})
    requested = {key: str(value) if isinstance(value, Path) else value for key, value in requested.items()}
    if values.get("budget") is not None:  # the command of a planned run has all three, by --set
        check_one_length(requested)
    if isinstance(test := requested.get("test"), str) and public(test) != test:
        raise ConfigError(
            f"test = {public(test)!r} was given with credentials in its URL, which a recipe does not keep: pass them "
            "by the settings of the file system's package, such as environment variables"
        )
    if "own" in requested:
        raise ConfigError("the setting own is written by the run: leave it out")
    requested = requested if config is None else _merged(read_file(config), requested)
    return _with_own_parts(requested)


def _with_own_parts(settings: Settings) -> Settings:
    """Return the settings with the facts on the parts that are the user's code; raise ConfigError if one is not passed.

    Facts in a file are those of the run that wrote it.
    """
    facts = {}
    for part in PARTS:
        name = settings.get(f"{part}.name")
        if name is None or (isinstance(name, str) and name in (PARTS[part] or ())):
            continue
        if (own := own_parts.find(part, name)) is not None:
            facts[part] = own.facts()
        elif own_parts.is_own(name):
            raise own_parts.demand(part, name)
    callbacks = {part: own for part, own in own_parts.current().items() if part.startswith("callback ")}
    facts |= {part: own.facts() for part, own in callbacks.items() if own.lasting}
    return {key: value for key, value in settings.items() if key != "own"} | ({"own": facts} if facts else {})


_PLANNED = ("evaluate_every", "checkpoint_every", "schedule.warmup_epochs")
"""Settings that a budget plans in addition to the length; a settings file without a budget defines them itself."""


def _merged(file: Settings, requested: Settings) -> Settings:
    """Return the settings of a file, overridden by the requested ones.

    A requested length replaces that of the file and everything derived from it. Options apply to one part only.
    """
    lengths = ("budget", "epochs", "steps")
    if any(requested.get(key) is not None for key in lengths):
        followed = (*lengths, "replans", *(_PLANNED if file.get("budget") is not None else ()))
        file = {key: value for key, value in file.items() if key not in followed}
    for part in PARTS:
        name = requested.get(f"{part}.name")
        if name is not None and name != file.get(f"{part}.name", name):
            file = {key: value for key, value in file.items() if not key.startswith(f"{part}.")}
    return file | requested


DEFAULT = "1h"
"""The budget on a CPU if no setting determines the length or the encoder."""


_DEFINING = ("budget", "epochs", "steps", "preset", "encoder.name")
"""Settings that determine the length or the encoder."""


def with_default_budget(settings: Settings, data: Any, device: torch.device, configured: bool) -> Settings:
    """Return the settings, on a CPU with a budget of one hour if they set neither length nor encoder.

    Args:
        settings: Requested settings.
        data: Data to learn from; embedded data have their own preset, which takes minutes.
        device: Device of the networks.
        configured: The settings come from a file, which defines the run.
    """
    embedded = isinstance(data, str) and data.startswith("digits-canvas")
    if device.type != "cpu" or configured or embedded or any(settings.get(key) is not None for key in _DEFINING):
        return settings
    return settings | {"budget": DEFAULT}


def needs_plan(settings: Settings) -> bool:
    """Return whether a budget is set but not yet planned; the recipe of a planned run has all three lengths."""
    planned = all(settings.get(key) is not None for key in ("steps", "epochs"))
    return settings.get("budget") is not None and not planned


def check_one_length(settings: Settings) -> None:
    """Raise ConfigError if a budget is set together with another length."""
    for key, other in (("epochs", "--epochs"), ("steps", "steps")):
        if settings.get("budget") is not None and settings.get(key) is not None:
            raise ConfigError(
                f"budget = {settings['budget']} and {key} = {settings[key]} both set the length of the run: "
                f"leave out {other}, or --budget"
            )


def chosen_reading(settings: Settings, data: Any) -> Settings:
    """Return how the images of a new run are read: as requested, else one after the other if they are remote.

    Raises:
        ConfigError: If options of sequential reading are set that would have no effect.
    """
    requested = settings.get("read")
    if requested in (None, "auto"):
        by_index = settings.get("sampler.name") is not None or settings.get("cache_on_device") is True
        requested = "sequential" if is_url(data) and not by_index else "random"
    if requested == "random":
        for key in ("read_buffer", "read_streams"):
            if settings.get(key) is not None and (key, settings[key]) != ("read_buffer", READ_BUFFER):
                raise ConfigError(
                    f"{key} = {settings[key]} has no effect: images are read by their index (read = random); leave it "
                    "out, or use --read sequential"
                )
    return {"read": requested}
