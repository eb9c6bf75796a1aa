"""The recipe that a checkpoint was computed with: kept in the checkpoint, compared with the run's recipe.json."""

import json
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError
from inbatch.runtime.files import to_json
from inbatch.training.checkpoint import Checkpoint
from inbatch.training.recipe import Recipe, make
from inbatch.training.registry import Settings
from inbatch.training.renamed_keys import RENAMED
from inbatch.training.settings_file import read_settings

EARLIER = (
    "The checkpoint is of an earlier version, which did not keep its recipe: recipe.json is assumed to be unchanged."
)


CHANGEABLE = ("shard", "checkpoint_activations")
"""Settings that a resumed run may change: they do not change what is computed."""


def run_facts(recipe: Recipe, context: int, world: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of its run: the recipe, the context size, and the number of ranks.

    Args:
        recipe: Recipe of the run.
        context: Number of samples per context group, which the recipe may leave to the number of ranks.
        world: Number of ranks.
    """
    return {"recipe": _plain(recipe.nested()), "context": context, "world": world}


def notes_on_version(saved: Checkpoint, recipe: Recipe) -> list[str]:
    """Return sentences on what the version of a checkpoint did not keep or know: its recipe, or some settings.

    Args:
        saved: The checkpoint.
        recipe: The recipe that continues it, with the values that these settings have now.
    """
    if not saved.run:
        return [EARLIER]
    known = {RENAMED.get(key, key) for key in read_settings(saved.run["recipe"])}
    added = [f"{key} = {value!r}" for key, value in read_settings(_plain(recipe.nested())).items() if key not in known]
    if not added:
        return []
    return [f"The checkpoint is of an earlier version without {', '.join(added)}: the run continues with these values."]


def check_recipe(saved: Checkpoint, recipe: Recipe, file: Path) -> None:
    """Raise ConfigError with the differing settings if a recipe is not that of a checkpoint.

    A checkpoint of an earlier version (`EARLIER`) is accepted. A context that a recipe leaves to the number of ranks is
    that of the checkpoint, which a resumed run keeps. Changes of the length by a budget (`Recipe.replans`) must be
    equal up to the step of the checkpoint; later ones belong to steps that follow.

    Args:
        saved: The checkpoint.
        recipe: The recipe in the run directory.
        file: Its file, for the message.
    """
    if not saved.run:
        return
    names = read_settings(saved.run["recipe"])
    then = make({RENAMED.get(key, key): value for key, value in names.items()})
    before, after = (_comparable(one, saved) for one in (then, recipe))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    if keys:
        what = ", ".join(f"{key} = {after.get(key)!r} (the checkpoint has {before.get(key)!r})" for key in keys)
        raise ConfigError(
            f"{file} was edited after {saved.path} was saved, or the checkpoint is of another run: {what}. Restore "
            f"these values, or start a new run in another folder (--config {file} --output-dir NEW)"
        )


def _comparable(recipe: Recipe, saved: Checkpoint) -> Settings:
    """Return the settings of a recipe that have decided the steps before a checkpoint, as plain values.

    The place of the images is none of them; the images have a signature in the checkpoint. Nor is how memory is saved.
    """
    replans = [change for change in recipe.replans if change[0] < saved.step]
    context = saved.run["context"] if recipe.context is None else recipe.context
    settings = _plain(recipe.flat() | {"replans": replans, "context": context})
    return {key: value for key, value in settings.items() if key not in ("data", *CHANGEABLE)}


def _plain(settings: Settings) -> Settings:
    """Return settings as a JSON file holds them."""
    plain: Settings = json.loads(to_json(settings))
    return plain
