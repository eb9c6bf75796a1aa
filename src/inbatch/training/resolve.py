"""The complete recipe of a run from its settings and images."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from inbatch.data import Source, open_data
from inbatch.data.pixels import checked_levels
from inbatch.data.views import own_views, sizes_of
from inbatch.errors import ConfigError, DataError
from inbatch.runtime import own_parts
from inbatch.runtime.remote import public
from inbatch.training.image_size import natural_size
from inbatch.training.presets import default_method, method_named
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.registry import shown
from inbatch.training.requested_settings import chosen_reading


def resolve_recipe(data: Any, settings: Mapping[str, Any], download: bool = False) -> tuple[Recipe, Source]:
    """Return the complete recipe and the opened data; size, channels and preset depend on the images."""
    settings = dict(settings)
    source = open_data(
        data,
        str(settings.get("split", "train")),
        subset=None if settings.get("subset") is None else _whole("subset", settings["subset"]),
        channels=None if settings.get("channels") is None else _whole("channels", settings["channels"]),
        **{
            key: None if settings.get(key) is None else str(settings[key])
            for key in ("classes", "image_column", "label_column", "group_column")
        },
        levels=None if settings.get("levels") is None else checked_levels(settings["levels"]),
        download=download,
    )
    settings |= chosen_reading(settings, data)
    settings["data"] = public(str(data)) if isinstance(data, str | Path) else source.name
    settings["channels"] = source.channels
    _set_sizes(settings, source)
    if settings.get("image_size") is None:
        method, preset = method_named(default_method(settings)), settings.get("preset")
        own = method.presets.get(preset, {}) if isinstance(preset, str) else {}
        settings["image_size"] = own.get("image_size") or natural_size(source)
    recipe = make(settings)
    if settings.get("preset") is None and settings.get("batch_size") is None:
        # The batch of a paper was not requested: use one that these images fill and a laptop can hold. The learning
        # rate scales with it.
        recipe = make(settings | {"batch_size": max(2, min(recipe.batch_size, 256, 1 << len(source).bit_length() - 1))})
    return recipe, source


def _set_sizes(settings: Settings, source: Source) -> None:
    """Set the sides of the user's own views, and the image size to the largest of them if it is not set."""
    name = settings.get("views.name")
    own = own_parts.find("views", name)
    if own is None or settings.get("views.sizes") is not None:
        return
    options = {key.removeprefix("views."): value for key, value in settings.items() if key.startswith("views.")}
    del options["name"]
    if own_parts.is_maker("views", own.maker) and "size" in inspect.signature(own.maker).parameters:
        settings["image_size"] = settings.get("image_size") or natural_size(source)
        options.setdefault("size", settings["image_size"])
    views = own_views(str(name), options)
    settings["views.sizes"] = sizes_of(views, _first_image(source), str(name))
    settings["image_size"] = settings.get("image_size") or max(settings["views.sizes"])


def _first_image(source: Source) -> Tensor:
    """Return the first image that can be read; DataError if none can."""
    for i in range(len(source)):
        with suppress(DataError):
            return source.image(i)
    return source.image(0)


def _whole(key: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{key} = {shown(value)}: input should be a whole number")
