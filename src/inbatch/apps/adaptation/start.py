"""The weights that an adaptation starts from, and the settings with which it trains them."""

from collections.abc import Mapping
from typing import Any

from inbatch.errors import ConfigError
from inbatch.models.shipped_weights import is_shipped, with_shipped
from inbatch.runtime.files import object_in, read_json
from inbatch.runtime.paths import path_of
from inbatch.training.recipe import Settings, make
from inbatch.training.settings_file import read_file
from inbatch.training.teacher import published_size

EPOCHS = 10
"""Passes over the images if no length is set."""
OPTIMIZER: Settings = {
    "optimizer.name": "adamw", "optimizer.lr": 3e-4, "optimizer.weight_decay": 0.05, "optimizer.layer_decay": 0.75,
    "schedule.scaling": "none",
}  # fmt: skip
"""A low rate of the heads, which decreases further from layer to layer of the encoder."""


def starting_settings(weights: Any) -> Settings:
    """Return the settings that follow from the weights: encoder, image size, channels and levels.

    Args:
        weights: A run, an encoder's folder, a file of weights, inbatch/NAME, hub:OWNER/NAME, or timm/NAME.

    Raises:
        ConfigError: If there is nothing at a path, or timm has no such model.
    """
    text = str(weights)
    if text.startswith("timm/"):
        return _timm_settings(text.removeprefix("timm/"))
    if text.startswith("hub:"):
        return {"encoder.init": text}
    named = path_of(weights, "--from")
    path = with_shipped(named)
    if not path.exists():
        raise ConfigError(
            f"--from {text}: there are no such weights. Name a run, an encoder's folder, a file of weights, "
            "inbatch/NAME, hub:OWNER/NAME, or timm/NAME"
        )
    if not (path / "recipe.json").is_file() and (path / "encoder" / "config.json").is_file():
        path /= "encoder"  # the result of another adaptation
    settings: Settings = {"encoder.init": str(named if is_shipped(named) else path)}
    if (path / "recipe.json").is_file():
        recipe = make(read_file(path / "recipe.json"))
        return settings | {"image_size": recipe.image_size, "channels": recipe.channels} | _levels(recipe.levels)
    if (path / "config.json").is_file():
        saved = object_in(read_json(path / "config.json"), "inbatch", path / "config.json")
        size = {"image_size": saved.get("size"), "channels": saved.get("channels")}
        return settings | {key: value for key, value in size.items() if value} | _levels(saved.get("levels"))
    return settings


def _levels(levels: Any) -> Settings:
    return {"levels": list(levels)} if levels else {}


def _timm_settings(name: str) -> Settings:
    """Return the settings of published weights: their name and the size of their images."""
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise ConfigError(f"--from timm/{name}: timm has no such model; {hint}")
    return {"encoder.name": name, "encoder.init": "timm", "image_size": published_size(name)}


def training_settings(requested: Mapping[str, Any], start: Mapping[str, Any]) -> Settings:
    """Return the settings of every run of an adaptation, except its seed; requested ones come first.

    Args:
        requested: Settings of the user.
        start: Those of `starting_settings`.
    """
    usual = {key: value for key, value in OPTIMIZER.items() if not key.startswith("optimizer.")}
    if requested.get("optimizer.name", "adamw") == "adamw":
        usual = OPTIMIZER
    settings = {**usual, **start, **requested}
    if all(settings.get(key) is None for key in ("epochs", "steps", "budget")):
        settings["epochs"] = EPOCHS
    # With a budget or a length in steps, both are at most a tenth of the run.
    epochs = float(settings["epochs"]) if isinstance(settings.get("epochs"), int | float) else float(EPOCHS)
    settings.setdefault("schedule.freeze_encoder_epochs", max(0.0, min(1.0, epochs / 10)))
    settings.setdefault("schedule.warmup_epochs", max(0.0, min(2.0, epochs / 5)))
    return settings
