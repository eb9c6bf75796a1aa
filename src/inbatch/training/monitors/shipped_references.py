"""Reference runs that are part of the package."""

import json
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, listed
from inbatch.runtime.files import read_json, to_json
from inbatch.training.monitors.reference import Reference
from inbatch.training.monitors.reference_files import differing, read_result
from inbatch.training.recipe import make
from inbatch.training.settings_file import read_settings

SCHEMA = 1
"""Schema version of the files, stored under "schema" in addition to a run's result.json."""
FREE = {
    "seed",
    "test",
    "evaluate_every",
    "checkpoint_every",
    "cache_on_device",
    "max_unreadable",
    "knn_k",
    "precision",
    "compile",
}
FREE |= {"channels_last"}
"""Settings in which a run may differ from its reference (as in the path of its data): they do not affect learning."""


def folder() -> Path:
    """Return the directory of the files: in the package, or among the results of a checkout."""
    here = Path(__file__).parents
    packaged = here[2] / "apps" / "papers" / "records"
    return packaged if packaged.is_dir() else here[4] / "results" / "records"


def find_reference(recipe: dict[str, Any]) -> Reference:
    """Return the shipped runs of a (nested) recipe, with any seed.

    Raises:
        ConfigError: If there are none; it names the closest.
    """
    recipe = json.loads(to_json(recipe))  # as if read from a file
    learned = [file for file in sorted(folder().glob("*.json")) if _learned(read_json(file))]
    results = {file.stem: read_result(file) for file in learned}
    for result in results.values():  # settings newer than the file have their defaults
        result["recipe"] = json.loads(to_json(make(read_settings(result["recipe"])).nested()))
    if not results:
        raise ConfigError("this installation contains no reference runs: pass a run directory to --compare")
    other = {name: differing(recipe, result["recipe"], FREE) for name, result in results.items()}
    same = [name for name, differences in other.items() if not differences]
    if not same:
        closest = min(other, key=lambda name: len(other[name]))
        raise ConfigError(
            f"inbatch has no reference run of this recipe. The closest, {closest}, differs in "
            f"{listed(other[closest], 8)}: set these as it does, or pass a run directory to --compare"
        )
    theirs = results[same[0]]["recipe"]
    curves = [results[name]["curve"] for name in same]
    return Reference(f"the runs {', '.join(same)} shipped with inbatch", curves, theirs)


def _learned(record: Any) -> bool:
    """Return whether a file is of a finished training run.

    Counted pairs of crops have no curve, and failed runs have none to compare with.
    """
    return record.get("schema") == SCHEMA and record.get("status", "finished") == "finished" and "curve" in record
