"""Read the result of a reference run from a file, and list the differences of two recipes."""

from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, DataError
from inbatch.runtime.files import read_json

MEASURES = {"knn": "k-NN", "loss": "loss", "feature_std": "feature_std", "rankme": "RankMe"}
"""Compared measures -> their display names."""


def read_result(path: Path) -> dict[str, Any]:
    """Return a run's result that has a recipe and a numeric curve; raise ConfigError for any other file."""
    try:
        result = read_json(path)
    except DataError as error:
        raise ConfigError(f"no reference: {error}") from None
    curve = result.get("curve")
    if not isinstance(result.get("recipe"), dict) or not isinstance(curve, list) or not curve:
        raise ConfigError(f"{path} is not a reference: pass the result.json of a finished run, with recipe and curve")
    for entry in curve:
        measured = {"epoch", *MEASURES} & entry.keys() if isinstance(entry, dict) else set()
        bad = sorted(name for name in measured if not _number(entry[name]))
        if bad or "epoch" not in measured:
            what = ", ".join(bad) or "epoch"
            raise ConfigError(
                f"{path} is not a reference: {what} is not a number at an evaluation of its curve; pass another run"
            )
    if any(then["epoch"] >= now["epoch"] for then, now in pairwise(curve)):
        raise ConfigError(f"{path} is not a reference: the epochs of its curve do not increase; pass another run")
    return result


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # also false for nan


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Return the settings in which two nested recipes differ, with both values.

    Of the data only the last part of the path is compared.

    Args:
        mine: One recipe.
        theirs: The recipe to compare with.
        but: Settings that may differ.
    """
    here, there = _flat(mine), _flat(theirs)
    keys = [key for key in dict.fromkeys([*here, *there]) if key not in but and here.get(key) != there.get(key)]
    return [f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in keys]


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
    return flat | {"data": Path(str(flat.get("data"))).name}
