"""Complete a recipe from data and settings; every value that depends on the images is decided here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.data import Source, open_data
from inbatch.errors import ConfigError, DataError
from inbatch.training.recipe import PARTS, Recipe, Settings, make, method_named, read_file
from inbatch.training.registry import shown


def resolve_recipe(data: Any, settings: Mapping[str, Any], download: bool = False) -> tuple[Recipe, Source]:
    """Return the complete recipe and the opened data; size, channels and preset depend on the images."""
    settings = dict(settings)
    source = open_data(
        data,
        str(settings.get("split", "train")),
        subset=None if settings.get("subset") is None else _whole("subset", settings["subset"]),
        channels=None if settings.get("channels") is None else _whole("channels", settings["channels"]),
        classes=None if settings.get("classes") is None else str(settings["classes"]),
        levels=_levels(settings.get("levels")),
        download=download,
    )
    settings["data"] = str(data) if isinstance(data, str | Path) else source.name
    settings["channels"] = source.channels
    if settings.get("image_size") is None:
        method, preset = method_named(settings.get("method.name", "simclr")), settings.get("preset")
        own = method.presets.get(preset, {}) if isinstance(preset, str) else {}
        settings["image_size"] = own.get("image_size") or natural_size(source)
    recipe = make(settings)
    if settings.get("preset") is None and settings.get("batch_size") is None:
        # The batch of a paper was not requested: use one that these images fill and a laptop can hold. The learning
        # rate scales with it.
        recipe = make(settings | {"batch_size": max(2, min(recipe.batch_size, 256, 1 << len(source).bit_length() - 1))})
    return recipe, source


def natural_size(source: Source) -> int:
    """Return the side of the images if they are squares of one size of at most 96 pixels, else 224."""
    sizes = set()
    for i in torch.linspace(0, len(source) - 1, min(len(source), 16)).long().tolist():
        try:
            with source.open(i) as picture:
                sizes.add(tuple(picture.size))
        except DataError:
            continue  # counted and reported when all images are read
    height, width = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return height if height == width and height <= 96 else 224


def _levels(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"levels = {shown(value)}: give two numbers, the lower one first, such as [0, 4095]")
    return low, high


def _whole(key: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} = {shown(value)}: input should be a whole number") from None


def data_asked_for(data: Any, given: Settings) -> Any:
    """Return the data to learn from: the argument, else the setting."""
    data = given.get("data") if data is None else data
    if data is None:
        raise ConfigError("no images: pass --data with a folder, a file of images, or a data set such as digits-canvas")
    return data


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
    asked: Settings = {} if method is None else {"method.name": method}
    asked |= {f"{key}.name" if key in (*PARTS, "schedule") else key: value for key, value in values.items()}
    asked |= dict(settings or {})
    if values.get("budget") is not None:  # the command of a planned run has all three, by --set
        check_one_length(asked)
    return asked if config is None else _over(read_file(config), asked)


_PLANNED = ("evaluate_every", "checkpoint_every", "schedule.warmup_epochs")
"""Settings that a budget plans in addition to the length; a settings file without a budget defines them itself."""


def _over(file: Settings, asked: Settings) -> Settings:
    """Return the settings of a file, overridden by the requested ones.

    A requested length replaces that of the file and everything derived from it. Options apply to one part only.
    """
    lengths = ("budget", "epochs", "steps")
    if any(asked.get(key) is not None for key in lengths):
        followed = (*lengths, "replans", *(_PLANNED if file.get("budget") is not None else ()))
        file = {key: value for key, value in file.items() if key not in followed}
    for part in PARTS:
        name = asked.get(f"{part}.name")
        if name is not None and name != file.get(f"{part}.name", name):
            file = {key: value for key, value in file.items() if not key.startswith(f"{part}.")}
    return file | asked


DEFAULT = "1h"
"""The budget on a CPU if no setting determines the length or the encoder."""


_SAYS = ("budget", "epochs", "steps", "preset", "encoder.name")


def with_default_budget(given: Settings, data: Any, device: torch.device, configured: bool) -> Settings:
    """Return the settings, on a CPU with a budget of one hour if they set neither length nor encoder.

    Args:
        given: Requested settings.
        data: Data to learn from; embedded data have their own preset, which takes minutes.
        device: Device of the networks.
        configured: The settings come from a file, which defines the run.
    """
    embedded = isinstance(data, str) and data.startswith("digits-canvas")
    if device.type != "cpu" or configured or embedded or any(given.get(key) is not None for key in _SAYS):
        return given
    return given | {"budget": DEFAULT}


def needs_plan(given: Settings) -> bool:
    """Return whether a budget is set but not yet planned; the recipe of a planned run has all three lengths."""
    planned = all(given.get(key) is not None for key in ("steps", "epochs"))
    return given.get("budget") is not None and not planned


def check_one_length(given: Settings) -> None:
    """Raise ConfigError if a budget is set together with another length."""
    for key, other in (("epochs", "--epochs"), ("steps", "steps")):
        if given.get("budget") is not None and given.get(key) is not None:
            raise ConfigError(
                f"budget = {given['budget']} and {key} = {given[key]} both set the length of the run: "
                f"leave out {other}, or --budget"
            )
