"""Read runs for the page: figures, curves over steps, epochs and time, and recipes."""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, DataError
from inbatch.runtime.files import open_regular, read_json
from inbatch.runtime.paths import path_of
from inbatch.training.settings_file import read_settings

MOST = 1000
"""Largest number of runs of a page."""
MEASURES = ("knn", "loss", "feature_std", "rankme")
"""Measures of which the page shows curves."""
_LONGEST = 400
"""Largest number of points of a curve; longer ones are thinned."""
_FIGURES = {
    "knn": ("knn", "top1"), "linear": ("linear", "top1"), "nmi": ("clustering", "nmi"),
}  # fmt: skip


def collect_runs(places: Sequence[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs of folders, each ready for JSON, and the messages about those that cannot be read.

    Args:
        places: Run folders, folders that hold some at any depth, or folders of records, the result files of
            comparisons and tables.

    Raises:
        ConfigError: If there are no runs, or too many.
    """
    files: dict[Path, None] = {}
    for place in places:
        path = path_of(place, "DIR")
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder: name run folders, or folders that hold some")
        own = dict.fromkeys(_run_folders(path)) or dict.fromkeys(sorted(path.glob("*.json")))
        if not own:
            raise ConfigError(f"{path} holds no run: a run folder has a recipe.json")
        files |= own
    if len(files) > MOST:
        raise ConfigError(f"{len(files):,} runs are too many for a page of at most {MOST:,}: name fewer folders")
    runs, problems = list[dict[str, Any]](), list[str]()
    for file in files:
        try:
            runs.append(_run(file) if file.is_dir() else _record(file))
        except (DataError, ValueError, TypeError, AttributeError, LookupError) as error:
            text = str(error) if isinstance(error, DataError) else f"{file} is not a run: {type(error).__name__}"
            problems.append(text)
    if not runs:
        raise DataError(f"no run can be read: {problems[0]}")
    _name(runs)
    return runs, problems


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yield the run folders in a folder, which may be one itself; links are not followed."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        if "recipe.json" in names:
            folders.clear()
            yield Path(place)


def _run(folder: Path) -> dict[str, Any]:
    """Return a run, finished or not."""
    recipe, status, result = read_json(folder / "recipe.json"), dict[str, Any](), dict[str, Any]()
    with suppress(DataError):
        status = read_json(folder / "run.json")
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
    lines = _lines(folder / "metrics.jsonl")
    curve = _list(result.get("curve")) or _logged(lines)
    times = [(line["step"], line["elapsed"]) for line in lines if _number(line.get("elapsed"))]
    state = status.get("status") or ("finished" if result else "unknown")
    return _described(str(folder), state, result.get("recipe") or recipe, result, curve, times)


def _record(file: Path) -> dict[str, Any]:
    """Return the run of a record."""
    record = read_json(file)
    if not isinstance(record.get("recipe"), dict) or "method" not in record["recipe"]:
        raise DataError(f"{file} is not the result of a run: it has no recipe with a method")
    return _described(
        str(file), record.get("status", "finished"), record["recipe"], record, _list(record.get("curve")), []
    )


def _described(
    path: str, status: str, recipe: Mapping[str, Any], result: Mapping[str, Any], curve: list[dict[str, Any]],
    times: list[tuple[float, float]],
) -> dict[str, Any]:  # fmt: skip
    """Return a run for the page; missing figures are None."""
    settings = {key: _text(value) for key, value in read_settings(recipe).items() if value is not None}
    evaluation = result.get("evaluation") or {}
    figures = {name: _figure(evaluation, place) for name, place in _FIGURES.items()}
    last = curve[-1] if curve else {}
    figures["knn"] = last.get("knn") if figures["knn"] is None else figures["knn"]
    figures |= {name: _finite(last.get(name)) for name in ("loss", "feature_std", "rankme")}
    steps, seconds = _finite(result.get("steps")), _finite(result.get("training_seconds"))
    points = [
        {"step": entry["step"], "time": _time(entry["step"], times, steps, seconds)}
        | {name: _finite(entry.get(name)) for name in ("epoch", *MEASURES)}
        for entry in _thinned(curve)
    ]
    wall = _finite(result.get("wall_seconds"))
    epochs = (
        recipe.get("epochs") if recipe.get("steps") is None else last.get("epoch")
    )  # of a length in steps: those made
    return {
        "path": path, "status": str(status), "settings": settings, "figures": figures, "curve": points,
        "seconds": wall if wall is not None else (times[-1][1] if times else None), "steps": steps,
        "epochs": None if (number := _finite(epochs)) is None else round(number, 2),
        "collapsed": [str(text) for text in _list(result.get("collapsed"))],
    }  # fmt: skip


def _time(step: float, times: list[tuple[float, float]], steps: float | None, seconds: float | None) -> float | None:
    """Return the seconds at a step, between two log lines by their steps; of a record, the same for every step."""
    if not times:
        return None if steps is None or seconds is None or steps <= 0 else seconds * step / steps
    at = bisect_left([place for place, _ in times], step)
    if at == 0:
        return times[0][1]
    if at == len(times):
        return times[-1][1]
    (before, early), (after, late) = times[at - 1], times[at]
    return early + (late - early) * (step - before) / max(1e-9, after - before)


def _logged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the curve of an unfinished run from its log: every evaluation with the mean loss since the last one."""
    curve, losses, epoch = list[dict[str, Any]](), list[float](), 0.0
    for line in lines:
        if _number(line.get("loss")):
            losses.append(line["loss"])
            epoch = line.get("epoch", epoch)
        if "feature_std" in line:
            entry = {key: line.get(key) for key in ("step", "knn", "feature_std", "rankme")}
            curve.append(entry | {"epoch": epoch, "loss": sum(losses) / len(losses) if losses else None})
            losses = []
    return curve


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the readable lines of a log, in the order of steps; a resumed run may have repeated some."""
    try:
        with open_regular(file) as log:
            texts = log.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries = []
    for text in texts:
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _number(line.get("step")):
                entries.append(line)
    return sorted(entries, key=lambda line: line["step"])


def _thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most `_LONGEST` entries with a step, with the first and the last."""
    whole = [entry for entry in curve if isinstance(entry, dict) and _number(entry.get("step"))]
    if len(whole) <= _LONGEST:
        return whole
    return [whole[round(i * (len(whole) - 1) / (_LONGEST - 1))] for i in range(_LONGEST)]


def _name(runs: list[dict[str, Any]]) -> None:
    """Name every run by its path below the folder that all share."""
    paths = [os.path.abspath(run["path"]) for run in runs]
    root = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])
    for run, path in zip(runs, paths, strict=True):
        run["name"] = os.path.relpath(path, root).removesuffix(".json")


def _figure(evaluation: Any, place: tuple[str, str]) -> float | None:
    part = evaluation.get(place[0]) if isinstance(evaluation, dict) else None
    return _finite(part.get(place[1])) if isinstance(part, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _finite(value: Any) -> float | None:
    return float(value) if _number(value) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
