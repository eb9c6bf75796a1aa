"""Results of runs: one JSON file each, validated by a schema, and identified by the recipe."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from inbatch.apps.papers.spec import Cell, key
from inbatch.errors import ConfigError, DataError
from inbatch.runtime.files import read_json, write_json
from inbatch.training.monitors.shipped_references import folder
from inbatch.training.recipe import make
from inbatch.training.settings_file import read_settings

Number = Annotated[float | int, pydantic.Field(ge=-1e300, le=1e300)] | None  # neither NaN nor infinite
MEASURES = ("top1", "top5", "nmi", "acc", "ari", "area")
"""Figures of an evaluation that a table may show, as shares of 1."""


class Environment(pydantic.BaseModel, extra="allow"):
    """The part of a record's environment that a table states."""

    processor: str
    device: str
    threads: int
    versions: dict[str, str | None]

    @pydantic.field_validator("versions")
    @classmethod
    def _of_torch(cls, versions: dict[str, str | None]) -> dict[str, str | None]:
        if "torch" not in versions:
            raise ValueError("the version of torch is missing")
        return versions


class Failure(pydantic.BaseModel, extra="forbid"):
    """The reason why a run has no figures: exit code, message and end of the log."""

    exit_code: int
    sentence: str
    log: str = ""


class Record(pydantic.BaseModel, extra="forbid", allow_inf_nan=False):
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
    training_cpu_seconds: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    curve: list[dict[str, Number]] = []
    collapsed: list[str] = []
    leak: dict[str, Number] | None = None
    held_out: str | None = None
    evaluation: dict[str, Any] | None = None
    failure: Failure | None = None
    _repetitions: tuple["Record", ...] = ()

    @pydantic.field_validator("environment")
    @classmethod
    def _stated(cls, environment: dict[str, Any]) -> dict[str, Any]:
        Environment.model_validate(environment)
        return environment

    @pydantic.field_validator("evaluation")
    @classmethod
    def _figures(cls, evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
        _check_figures(evaluation or {}, "evaluation")
        return evaluation

    @pydantic.field_validator("curve")
    @classmethod
    def _epochs(cls, curve: list[dict[str, Number]]) -> list[dict[str, Number]]:
        if any(entry.get("epoch") is None for entry in curve):
            raise ValueError("an entry of the curve has no epoch")
        return curve

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "Record":
        if (self.status == "finished") == (self.evaluation is None) or (self.status == "failed") == (
            self.failure is None
        ):
            raise ValueError("a finished run has an evaluation, a failed one a failure, and neither has both")
        if self.recipe.get("seed") != self.seed:
            raise ValueError("the seed is not the recipe's")
        return self

    @cached_property
    def run_key(self) -> tuple[str, str, int]:
        """Identity of the run: key of the recipe, data set, seed."""
        return key(self.recipe if "pairs" in self.recipe else make(read_settings(self.recipe))), self.data, self.seed

    @property
    def computation(self) -> tuple[str | None, str | None]:
        """Precision and instructions of the processor (AVX2, AVX512), which change the bits of every step."""
        return self.precision, self.environment.get("instructions")

    @property
    def outdated(self) -> bool:
        """Whether a fault that is mended since changed its weights, those of fusion by convolutions (`STEP_RULES`)."""
        fusion = self.recipe.get("fuse") or {}
        layout = fusion.get("name") == "conv" and bool(self.recipe.get("channels_last"))
        return layout and self.environment.get("step rules", 1) < 2

    def like(self, other: "Record") -> "Record":
        """Return the repetition of this run that was computed like another run; this one if there is none."""
        for one in (self, *self._repetitions):
            if one.computation == other.computation and set(self.protocols) <= set(one.protocols):
                return one
        return self

    @property
    def failures(self) -> dict[str, str]:
        """Failures and their reasons: "" for the whole run, else protocols of its evaluation."""
        if self.failure is not None:
            return {"": self.failure.sentence}
        parts = {name: part for name, part in (self.evaluation or {}).items() if isinstance(part, dict)}
        return {name: part["failed"] for name, part in parts.items() if "failed" in part}

    def file(self) -> dict[str, Any]:
        """Return the content of the record's file."""
        return self.model_dump(by_alias=True, exclude_none=True)


def _check_figures(part: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for a figure that is not a number and a failure that is not a text, at any depth."""
    for measure, value in part.items():
        if measure in MEASURES and not (value is None or _number(value)):
            raise ValueError(f"{name}.{measure} is not a number")
        if measure == "failed" and not isinstance(value, str):
            raise ValueError(f"{name}.failed is not the reason of a failure")
        if isinstance(value, dict) and measure != "each":  # lists of the single draws
            _check_figures(value, f"{name}.{measure}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # false for nan


Records = Mapping[tuple[str, str, int], Record]


def read_record(path: Path) -> Record:
    """Return the record in a file; raise DataError if it is invalid."""
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(f"{path} is not the result of a run: {error}") from None
    return valid_record(content, str(path))


def valid_record(content: Mapping[str, Any], name: str) -> Record:
    """Return the record in a JSON object; raise DataError, with its name, if it is invalid."""
    try:
        record = Record.model_validate(content)
        record.run_key  # noqa: B018 - validates the recipe
    except (ConfigError, pydantic.ValidationError, RecursionError) as error:
        raise DataError(f"{name} is not the result of a run: {_reason(error)}; repeat the run") from None
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error)


def read_records(folder: Path) -> dict[tuple[str, str, int], Record]:
    """Return every record of a folder by run; raise DataError for an invalid file.

    A run that was repeated, such as on another processor, has several files: the last in name order is its record, and
    the others are its repetitions (`Record.like`).
    """
    records: dict[tuple[str, str, int], Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        if (previous := records.get(record.run_key)) is not None:
            record._repetitions = (previous, *previous._repetitions)
        records[record.run_key] = record
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
