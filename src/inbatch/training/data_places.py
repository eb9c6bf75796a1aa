"""Where the data of a run are: data.json keeps a relative path as absolute, and relative to the run directory.

The recipe keeps every path as it was given. A run is then found again from another working directory, and with its data
after both were moved together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.data import Source
from inbatch.errors import DataError
from inbatch.runtime.files import read_json, write_json
from inbatch.runtime.path_list import listed_paths
from inbatch.runtime.remote import is_url
from inbatch.training.recipe import Recipe

FILE = "data.json"
_KEYS = ("data", "test", "classes")
"""Settings of a recipe that may be paths."""
_NAMED = ("digits-canvas", "torchvision/", "hf/")
"""Beginnings of names of data sets, which are not paths."""
_PATTERN = "*?[{"
"""Characters of a pattern of file names, which does not exist as a path."""


def save_places(run: Path, recipe: Recipe, here: Recipe) -> None:
    """Write data.json: the paths of a recipe, if they are on the disk.

    Args:
        run: Run directory.
        recipe: Recipe with the paths as they were given at the start of the run.
        here: Recipe with the current paths, relative ones from the working directory.
    """
    places = {key: _place(run, getattr(recipe, key), getattr(here, key)) for key in _KEYS}
    write_json(run / FILE, {key: place for key, place in places.items() if place is not None})


def _place(run: Path, setting: str | None, path: str | None) -> dict[str, str] | None:
    if setting is None or path is None or not _is_path(path):
        return None
    paths = [os.path.abspath(one) for one in listed_paths(path)]
    here = os.path.abspath(run)
    try:
        relative = [os.path.relpath(one, here) for one in paths]
    except ValueError:  # another drive of Windows
        relative = paths
    return {"given": setting, "absolute": os.pathsep.join(paths), "from_run": os.pathsep.join(relative)}


def located(run: Path, recipe: Recipe) -> Recipe:
    """Return a recipe with the paths at which its data are now.

    For each setting it is the first path that exists: the absolute one, the one relative to the run directory, and the
    one in the recipe, which is kept if none exists, or if it was edited.
    """
    try:
        places = read_json(run / FILE)
    except DataError:  # missing, of an older version, or damaged: the recipe's own paths remain
        return recipe
    paths = {key: _first(run, places.get(key), getattr(recipe, key)) for key in _KEYS}
    present: dict[str, Any] = {key: path for key, path in paths.items() if path is not None}
    return replace(recipe, **present)


@contextmanager
def opening(run: Path, recipe: Recipe) -> Iterator[None]:
    """Open the images of a run at their known place within the context; DataError with the way on if they are gone.

    Args:
        run: Run directory.
        recipe: Its recipe, from `located`.
    """
    try:
        yield
    except DataError as error:
        if recipe.data.startswith(_NAMED) or is_url(recipe.data) or _is_path(recipe.data):
            raise
        raise DataError(
            f"Cannot read the images of the run in {run}: {_last_place(run, recipe.data)} does not exist. Pass their "
            "present place (--data)"
        ) from error


def _last_place(run: Path, setting: str) -> str:
    """Return where the images of a run were at its last start."""
    try:
        place = read_json(run / FILE).get("data")
    except DataError:
        return setting
    return str(place.get("absolute")) if isinstance(place, dict) and place.get("given") == setting else setting


def images_signature(source: Source) -> str:
    """Return a signature of the training images: another number, name, order or label changes the permutation."""
    return f"{len(source):,} images {source.signature()}"


def check_same_images(then: str, now: str) -> None:
    """Raise DataError if the signature of the images of a run has changed."""
    if then != now:
        raise DataError(
            f"the images have changed since the run began ({then[:-56]}... then, {now[:-56]}... now): names, number or "
            "labels. Restore them, pass their new place (--data), or start a new run from the weights of this one: "
            "--init RUN"
        )


def _first(run: Path, place: Any, setting: str | None) -> str | None:
    """Return the first place of a setting that exists; None if none does, or if the recipe has another path now."""
    if not isinstance(place, dict) or setting is None or place.get("given") != setting:
        return None
    absolute, relative = (str(place.get(key, "")) for key in ("absolute", "from_run"))
    moved = [os.path.normpath(os.path.join(run, one)) for one in relative.split(os.pathsep)]
    return next((text for text in (absolute, os.pathsep.join(moved)) if _is_path(text)), None)


def _is_path(text: str) -> bool:
    """Return whether a setting is a path that exists, several of them, or a pattern in a folder that exists."""
    if text.startswith(_NAMED) or not text or "\0" in text:
        return False
    return all(os.path.exists(one) or _is_open_pattern(one) for one in listed_paths(text))


def _is_open_pattern(text: str) -> bool:
    start = min((text.find(sign) for sign in _PATTERN if sign in text), default=None)
    return start is not None and os.path.isdir(os.path.dirname(text[:start]) or ".")
