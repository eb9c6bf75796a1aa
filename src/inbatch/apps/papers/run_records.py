"""Records of runs: from a finished run's result, from a run that diverged, and from counted crops."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.apps.papers.results import Failure, Record, valid_record
from inbatch.apps.papers.spec import Cell, key
from inbatch.apps.reports.crop_statistics import count_configurations
from inbatch.errors import DataError, InbatchError
from inbatch.runtime.environment import environment
from inbatch.training.recipe import make
from inbatch.training.settings_file import read_settings


def record_of(cell: Cell, place: str, result: Mapping[str, Any]) -> Record:
    """Return the record of a finished run from its result, with the images by name.

    Args:
        cell: The run's cell.
        place: Location of the images.
        result: Content of the run's result.json.

    Raises:
        DataError: If the result is not a result of a run.
        InbatchError: If its recipe is not the cell's.
    """
    if not isinstance(result.get("recipe"), dict):
        raise DataError(f"the result of the run {cell.stem} holds no recipe: remove its folder, and run it again")
    recipe = result["recipe"] | {"data": cell.settings["data"]}
    if cell.recipe().precision == "auto":  # any precision is the table's (`Runner.precision`); the record states it
        recipe |= {"precision": "auto"}
    if key(make(read_settings(recipe))) != cell.key:
        expected = cell.recipe().nested()
        changed = [name for name, value in expected.items() if name != "seed" and value != recipe.get(name)]
        raise InbatchError(
            f"the run's recipe is not the table's: {', '.join(changed)} differ; remove its folder, and run it again"
        )
    here = json.dumps({name: result[name] for name in Record.model_fields if name in result})
    source = source_name(place)
    kept = json.loads(here.replace(json.dumps(place)[1:-1], source) if source != place else here)
    named = {"schema": 1, "status": "finished", "data": cell.data, "source": source, "seed": cell.seed}
    run = {"recipe": recipe, "command": cell.command(), "protocols": list(cell.protocols)}
    return valid_record(kept | named | run, f"the result of the run {cell.stem}")


def failed_record(cell: Cell, place: str, output: Mapping[str, Any], log: Path, seconds: float, gpu: bool) -> Record:
    """Return the record of a diverged run, with the end of its log."""
    words = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-20:])
    failure = Failure(exit_code=output["exit_code"], sentence=without_paths(output["error"]), log=without_paths(words))
    named = {"schema": 1, "status": "failed", "data": cell.data, "source": source_name(place), "seed": cell.seed}
    run = {"recipe": cell.recipe().nested(), "command": cell.command(), "protocols": list(cell.protocols)}
    where = environment(torch.device("cuda" if gpu else "cpu"))
    return Record.model_validate(named | run | {"environment": where, "wall_seconds": seconds, "failure": failure})


def counted_record(cell: Cell) -> Record:
    """Draw and count pairs of crops in this process, which takes seconds."""
    size = int(cell.settings["size"])
    counts = count_configurations(cell.settings["crops"], (size, size), cell.settings["pairs"], cell.seed).json()
    return Record.model_validate(
        {"schema": 1, "status": "finished", "data": cell.data, "source": "drawn", "seed": cell.seed}
        | {"recipe": dict(cell.settings), "command": cell.command(), "environment": environment(torch.device("cpu"))}
        | {"wall_seconds": counts.pop("seconds"), "evaluation": {"crops": counts}}
    )


def source_name(place: str) -> str:
    """Return the name of images without their path, which is private."""
    return Path(place).name if Path(place).exists() else place


def without_paths(text: str) -> str:
    """Return text without the paths of this machine's folders."""
    return text.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")
