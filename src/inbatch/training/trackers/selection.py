"""Choose the trackers of a run among those that are installed, and keep the choice with the run."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

from inbatch.errors import ConfigError, DataError
from inbatch.runtime.files import read_json, write_json

GROUP = "inbatch.trackers"
"""Group of the entry points by which packages offer trackers."""
TENSORBOARD = "tensorboard"
"""Name of the tracker that runs in the process of the training, by default."""
_LIBRARIES = {
    TENSORBOARD: (TENSORBOARD,),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
"""Modules that the trackers of this package need; each is an extra of the same name."""


@dataclass(frozen=True)
class Selection:
    """The trackers of a run.

    Attributes:
        id: Identifier of the run, the same after a resume; empty if only the default was chosen.
        names: Trackers in a process of their own.
        tensorboard: Whether to write TensorBoard's files.
    """

    id: str = ""
    names: tuple[str, ...] = ()
    tensorboard: bool = True


def available() -> dict[str, EntryPoint]:
    """Return the trackers of all installed packages by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP))}


def requested_trackers(track: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Return the names of the requested trackers; none of them for "none", and None without a request.

    Raises:
        ConfigError: If a tracker is unknown or its library is not installed.
    """
    if track is None:
        return None
    parts = [track] if isinstance(track, str) else list(track)
    names = tuple(dict.fromkeys(name.strip() for part in parts for name in str(part).split(",")))
    if names == ("none",):
        return ()
    if "none" in names:
        raise ConfigError("none leaves out every tracker: name it alone, or leave it out")
    known = available()
    for name in names:
        if name not in known:
            choices = ", ".join([*known, "none"])
            hint = f'. The tracker {name} is an extra: pip install "inbatch[{name}]"' if name in _LIBRARIES else ""
            raise ConfigError(f"unknown tracker {name!r}: choose from {choices}{hint}")
        if missing := _missing(name):
            raise ConfigError(f'the tracker {name} needs {missing}: pip install "inbatch[{name}]"')
    return names


def _missing(name: str) -> str:
    return " and ".join(module for module in _LIBRARIES.get(name, ()) if find_spec(module) is None)


def select(folder: Path, requested: tuple[str, ...] | None, resumed: bool) -> Selection:
    """Return the trackers of a run, and write them to trackers.json unless they are the default.

    Args:
        folder: Run directory.
        requested: Names of trackers: those of a new run besides TensorBoard, or further ones of a resumed run. None for
            the default, or for those that the resumed run has; an empty tuple for no tracker at all.
        resumed: Whether the run continues.
    """
    path = folder / "trackers.json"
    kept = _read(path) if resumed else None
    if requested is None:
        return Selection() if kept is None else kept
    before = kept or Selection(token_hex(8))
    names = tuple(dict.fromkeys((*before.names, *(name for name in requested if name != TENSORBOARD))))
    tensorboard = bool(requested) and (before.tensorboard or TENSORBOARD in requested)
    chosen = Selection(before.id, names if requested else (), tensorboard)
    write_json(path, {"id": chosen.id, "trackers": [*[TENSORBOARD] * chosen.tensorboard, *chosen.names]})
    return chosen


def _read(path: Path) -> Selection | None:
    """Return the trackers of a run; None if it has the default, or if the file is damaged."""
    try:
        content = read_json(path)
        names = [str(name) for name in content["trackers"]]
        return Selection(str(content["id"]), tuple(n for n in names if n != TENSORBOARD), TENSORBOARD in names)
    except (DataError, KeyError, TypeError):
        return None
