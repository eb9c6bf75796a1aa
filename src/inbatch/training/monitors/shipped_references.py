"""The runs that come with the package, to compare with one's own."""

import json
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError
from inbatch.runtime.files import read_json, to_json
from inbatch.training.monitors.reference import Reference
from inbatch.training.monitors.reference_files import differing, listed, read_result
from inbatch.training.recipe import make, read_settings

SCHEMA = 1
"""Of the files: a run's result.json and this number under "schema"."""
FREE = {"seed", "test", "evaluate_every", "checkpoint_every", "resident", "max_bad", "k", "precision", "compile"}
FREE |= {"channels_last"}
"""Settings in which a run may differ from its reference, as in its data's path: they are no part of what is learned."""


def folder() -> Path:
    """Where the files lie: in the package, or in a checkout among its results."""
    here = Path(__file__).parents
    packaged = here[2] / "apps" / "papers" / "records"
    return packaged if packaged.is_dir() else here[4] / "results" / "records"


def find_reference(recipe: dict[str, Any]) -> Reference:
    """The runs of a (nested) recipe that come along, whatever their seed; ConfigError that names the closest."""
    recipe = json.loads(to_json(recipe))  # as it would come back from a file
    learned = [file for file in sorted(folder().glob("*.json")) if _learned(read_json(file))]
    results = {file.stem: read_result(file) for file in learned}
    for result in results.values():  # settings that came after the file have their defaults
        result["recipe"] = json.loads(to_json(make(read_settings(result["recipe"])).nested()))
    if not results:
        raise ConfigError("no runs to compare with come with this installation: give --compare a run's folder")
    other = {name: differing(recipe, result["recipe"], FREE) for name, result in results.items()}
    same = [name for name, differences in other.items() if not differences]
    if not same:
        closest = min(other, key=lambda name: len(other[name]))
        raise ConfigError(
            f"no run of this recipe comes with inbatch. The closest, {closest}, differs in {listed(other[closest], 8)}"
        )
    theirs = results[same[0]]["recipe"]
    curves = [results[name]["curve"] for name in same]
    return Reference(f"the runs {', '.join(same)} that come with inbatch", curves, theirs)


def _learned(record: Any) -> bool:
    """Whether a file is of a finished run: pairs of crops that were counted have no curve, and what failed has none to
    be like."""
    return record.get("schema") == SCHEMA and record.get("status", "finished") == "finished" and "curve" in record
