"""Results of runs: one JSON file each, validated by a schema, and identified by the recipe."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from inbatch.apps.papers.spec import Cell, key
from inbatch.errors import ConfigError, DataError
from inbatch.runtime.files import write_json
from inbatch.training.monitors.shipped_references import folder
from inbatch.training.recipe import make
from inbatch.training.settings_file import read_settings

Number = float | int | None


class Failure(pydantic.BaseModel, extra="forbid"):
    """The reason why a run has no figures: exit code, message and end of the log."""

    exit_code: int
    sentence: str
    log: str = ""


class Record(pydantic.BaseModel, extra="forbid"):
    """The stored result of one run: what was run, on which data, and its figures.

    A failed run has no evaluation. If only one of its protocols failed, the evaluation contains the failure.

    Attributes:
        data: Name of the data set in the table.
        source: Name of the images at their location.
        recipe: Recipe as written by the run, with the data by name; for counted crops, the settings of counting.
    """

    schema_: Literal[1] = pydantic.Field(alias="schema")
    status: Literal["finished", "failed"]
    data: str
    source: str
    seed: int
    command: str
    recipe: dict[str, Any]
    protocols: list[str] = []
    environment: dict[str, Any]
    wall_seconds: float
    context: int | None = None
    world: int = 1
    precision: str | None = None
    images: int | None = None
    unreadable: int = 0
    steps: int | None = None
    training_seconds: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    curve: list[dict[str, Number]] = []
    collapsed: list[str] = []
    leak: dict[str, Number] | None = None
    held_out: str | None = None
    evaluation: dict[str, Any] | None = None
    failure: Failure | None = None

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Record":
        if (self.status == "finished") == (self.evaluation is None) or (self.status == "failed") == (
            self.failure is None
        ):
            raise ValueError("a finished run has an evaluation, a failed one a failure, and neither has both")
        if self.recipe.get("seed") != self.seed:
            raise ValueError("the seed is not the recipe's")
        return self

    @property
    def told(self) -> tuple[str, str, int]:
        """Identity of the run: key of the recipe, data set, seed."""
        return key(self.recipe if "pairs" in self.recipe else make(read_settings(self.recipe))), self.data, self.seed

    @property
    def failures(self) -> dict[str, str]:
        """Failures and their reasons: "" for the whole run, else protocols of its evaluation."""
        if self.failure is not None:
            return {"": self.failure.sentence}
        judged = {name: found for name, found in (self.evaluation or {}).items() if isinstance(found, dict)}
        return {name: found["failed"] for name, found in judged.items() if "failed" in found}

    def file(self) -> dict[str, Any]:
        """Return the content of the record's file."""
        return self.model_dump(by_alias=True, exclude_none=True)


Records = Mapping[tuple[str, str, int], Record]


def read_record(path: Path) -> Record:
    """Return the record in a file; raise DataError if it is invalid."""
    try:
        found = Record.model_validate(json.loads(path.read_bytes()))
        found.told  # noqa: B018 - validates the recipe
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{path} is not the result of a run: {_reason(error)}") from None
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error)


def read_records(folder: Path) -> dict[tuple[str, str, int], Record]:
    """Return every record of a folder, by run the last in name order; raise DataError for an invalid file."""
    records: dict[tuple[str, str, int], Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        records[record.told] = record
    return records


def find_record(records: Records, cell: Cell) -> Record | None:
    """Return the record of a cell if it has all of the cell's protocols, else None."""
    record = records.get((cell.key, cell.data, cell.seed))
    lacking = record is not None and record.status == "finished" and set(cell.protocols) - set(record.protocols)
    return None if lacking else record


def write_record(folder: Path, cell: Cell, record: Record) -> Path:
    """Write a record under its cell's name; return the path."""
    path = folder / f"{cell.stem}.json"
    write_json(path, record.file())
    return path


def shipped() -> Path:
    """Return the folder of the shipped records."""
    return folder()


def wall_seconds(records: Iterable[Record]) -> float:
    """Return the total duration of the runs in seconds."""
    return sum(record.wall_seconds for record in records)
