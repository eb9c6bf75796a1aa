"""From data and settings to a complete recipe: everything that is decided by the images is decided here."""

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
    """The complete recipe for some data, and the data opened: size, channels and preset follow the images."""
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
    if settings.get("size") is None:
        method, preset = method_named(settings.get("method.name", "simclr")), settings.get("preset")
        own = method.presets.get(preset, {}) if isinstance(preset, str) else {}
        settings["size"] = own.get("size") or natural_size(source)
    recipe = make(settings)
    if settings.get("preset") is None and settings.get("batch") is None:
        # Nobody asked for a paper's batch: one that these images fill and a laptop holds; the rate follows it.
        recipe = make(settings | {"batch": max(2, min(recipe.batch, 256, 1 << len(source).bit_length() - 1))})
    return recipe, source


def natural_size(source: Source) -> int:
    """The side of the images where they are small squares of one size (at most 96 pixels), else 224."""
    sizes = set()
    for i in torch.linspace(0, len(source) - 1, min(len(source), 16)).long().tolist():
        try:
            with source.open(i) as picture:
                sizes.add(tuple(picture.size))
        except DataError:
            continue  # counted, named and judged where all images are read
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
    """The data to learn from: what is given, else what the settings say."""
    data = given.get("data") if data is None else data
    if data is None:
        raise ConfigError("which images? give --data a folder, a file of images, or a set such as digits-canvas")
    return data


def merged_settings(
    method: str | None, config: str | Path | None, settings: Mapping[str, Any] | None, values: Mapping[str, Any]
) -> Settings:
    asked: Settings = {} if method is None else {"method.name": method}
    asked |= {f"{key}.name" if key in (*PARTS, "schedule") else key: value for key, value in values.items()}
    asked |= dict(settings or {})
    if values.get("budget") is not None:  # the command of a run that was planned has all three, by --set
        check_one_length(asked)
    return asked if config is None else _over(read_file(config), asked)


_PLANNED = ("evaluate_every", "checkpoint_every", "schedule.warmup")
"""What a budget plans besides the length, and a file of settings without one says by itself."""


def _over(file: Settings, asked: Settings) -> Settings:
    """What is asked for on top of a file of settings.

    Another length takes the place of the file's, with all that followed from that. Options belong to one part only.
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
"""The budget on a processor where nothing else says how long to train or what."""


_SAYS = ("budget", "epochs", "steps", "preset", "encoder.name")


def with_default_budget(given: Settings, data: Any, device: torch.device, configured: bool) -> Settings:
    """Return the settings with a budget of one hour if they say nothing of length or encoder, on a processor.

    configured: they come from a file, which says what to do. Embedded data have a preset of their own, of minutes.
    """
    embedded = isinstance(data, str) and data.startswith("digits-canvas")
    if device.type != "cpu" or configured or embedded or any(given.get(key) is not None for key in _SAYS):
        return given
    return given | {"budget": DEFAULT}


def needs_plan(given: Settings) -> bool:
    """Return whether a budget is asked for that no earlier run has been planned into: its recipe has all three."""
    planned = all(given.get(key) is not None for key in ("steps", "epochs"))
    return given.get("budget") is not None and not planned


def check_one_length(given: Settings) -> None:
    """Raise ConfigError if a budget is asked for together with another length."""
    for key, other in (("epochs", "--epochs"), ("steps", "steps")):
        if given.get("budget") is not None and given.get(key) is not None:
            raise ConfigError(
                f"budget = {given['budget']} and {key} = {given[key]} both set the length of the run: "
                f"leave out {other}, or --budget"
            )
