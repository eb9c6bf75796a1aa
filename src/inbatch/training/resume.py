"""Resume a run: find it, and compare the requested settings, its checkpoint and its images with its recipe."""

import os
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.data import open_data
from inbatch.errors import ConfigError, DataError, many
from inbatch.runtime import distributed
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.resources import launch_id, launched
from inbatch.training import checkpoint
from inbatch.training.build_checks import local_batch_size
from inbatch.training.checkpoint_recipe import CHANGEABLE, check_recipe
from inbatch.training.data_places import check_same_images, images_signature, located, opening
from inbatch.training.own_requests import check_own_parts
from inbatch.training.plan import RunPlan
from inbatch.training.recipe import Recipe, Settings, make
from inbatch.training.registry import OPTIONAL
from inbatch.training.run import Run, load_run
from inbatch.training.settings_file import read_file, read_settings
from inbatch.training.side_files import FILES, FOLDERS, report_of

_LENGTHS = ("epochs", "steps", "budget")


def run_to_resume(out: Path | None, resume: str | Path | bool | None) -> Path | None:
    """Return the directory of the run to resume, or None for a new run.

    Args:
        out: Requested run directory.
        resume: Directory of a run; True or "auto" for the run in `out`, if it can be resumed.

    Raises:
        ConfigError: If there is no such run, or if `out` is another directory.
    """
    if resume is False or resume is None:
        return None
    automatic = resume is True or resume == "auto"
    if automatic and out is None:
        raise ConfigError("--resume auto needs --output-dir: the directory of the run")
    folder = out if automatic and out is not None else path_of(resume, "resume")
    if out is not None and os.path.realpath(out) != os.path.realpath(folder):
        raise ConfigError(
            f"--resume {folder} continues the run in its own directory, and --output-dir {out} is another: leave out "
            f"--output-dir, or copy the directory and resume the copy"
        )
    if (folder / "recipe.json").is_file() and list((folder / "checkpoints").glob("*.pt")):
        return folder
    if automatic:
        return None
    raise ConfigError(f"nothing to resume in {folder}: it has no run with a checkpoint")


def restarted(out: Path | None) -> Path | None:
    """Return the directory of the unfinished run that an earlier start by the same torchrun command began.

    It needs no --resume: the launcher repeats the command as it was typed.

    Args:
        out: Requested run directory; None for those in runs/.
    """
    if (launch := launch_id()) is None:
        return None
    again = launched("TORCHELASTIC_RESTART_COUNT", 0) > 0  # 0 if a machine left or joined
    for folder in sorted(Path("runs").glob("*")) if out is None else [out]:
        report = report_of(folder)
        if report.get("launch") == launch and (again or report.get("status") != "finished"):
            return folder
    return None


def barely_begun(out: Path | None, resume: str | Path | bool | None) -> bool:
    """Return whether `out` may be resumed but holds only a run that ended before its first checkpoint."""
    if out is None or resume not in (True, "auto"):
        return False
    begun = any((out / name).exists() for name in ("recipe.json", "run.json"))
    names = ("encoder", "result.json") if begun else (*FILES, *FOLDERS)
    return not any((out / name).exists() for name in names)


def finished_run(
    folder: Path, data: Any, requested: Settings, download: bool, notify: Callable[[str], None]
) -> Run | None:
    """Return a run with a budget if it is finished: evaluating it again would exceed the budget. None otherwise.

    Raises:
        ConfigError, DataError: If the requested settings or images are not those of the run.
    """
    recipe = make(read_file(folder / "recipe.json"))
    if recipe.budget is None or report_of(folder).get("status") != "finished":
        return None
    try:
        run = load_run(folder)
    except (ConfigError, DataError):  # without a result it is not finished
        return None
    data = _check_settings(folder, recipe, data, requested)
    if data is not None and not (isinstance(data, str) and data == recipe.data):
        source = open_data(data, recipe.split, subset=recipe.subset, download=download, **recipe.learning)
        then = checkpoint.load(folder / "checkpoints", mapped=True).state.get("progress", {}).get("data")
        left_out = run.result.get("unreadable", 0)  # which of them are is not known without decoding all
        if not left_out or not str(then).startswith(f"{len(source) - left_out:,} images "):
            check_same_images(then, images_signature(source))
    notify(f"The run in {folder} is finished; inbatch evaluate {folder} evaluates it again.")
    return run


def resumed_plan(folder: Path, data: Any, requested: Settings, download: bool) -> RunPlan:
    """Return the recipe of a run and its images.

    Args:
        folder: Run directory.
        data: Current place of its images; None for the known one (`data_places.located`).
        requested: Requested settings, which must be those of the run.
        download: Whether missing data may be downloaded.

    Raises:
        ConfigError: If the requested settings contradict the recipe, or the checkpoint has another recipe.
    """
    recipe = make(read_file(folder / "recipe.json"))
    data = _check_settings(folder, recipe, data, requested)
    saved = checkpoint.load(folder / "checkpoints", mapped=True)
    check_recipe(saved, recipe, folder / "recipe.json")
    changed = {key: requested[key] for key in CHANGEABLE if key in requested}
    recipe = make(read_settings(recipe.nested()) | changed) if changed else recipe
    recipe = _with_context(folder, recipe, saved.run or report_of(folder))
    here = located(folder, recipe)
    if isinstance(data, str):
        here = replace(here, data=data)
    opened = here.data if data is None else data
    with opening(folder, here) if data is None else nullcontext():
        source = open_data(opened, recipe.split, subset=recipe.subset, download=download, **here.learning)
    images = saved.state.get("progress", {}).get("data")
    return RunPlan(recipe, source, opened, here=here, images=images)


def _with(settings: Settings, key: str, value: Any) -> Settings:
    """Return the settings with another value; a part with another name loses its options, which are of the former."""
    part, _, option = key.partition(".")
    if option == "name" and part in OPTIONAL:
        settings = {name: x for name, x in settings.items() if not name.startswith(f"{part}.")}
    return settings | {key: value}


def _check_settings(folder: Path, recipe: Recipe, data: Any, requested: Settings) -> Any:
    """Return the current place of a run's images, None for the known one; check that other settings are the run's."""
    check_own_parts(recipe)
    requested = dict(requested)
    requested.pop("own", None)
    place = requested.pop("data", None)
    data = joined_paths(place if data is None else data)
    saved, flat, changed = recipe.nested(), recipe.flat(), {}
    for key, value in requested.items():
        chosen = ("context", "auto"), ("cache_on_device", None), ("read", "auto"), ("read", None)
        if (key, value) in chosen or key in CHANGEABLE:
            continue  # `chosen` were chosen when the run started; another value would make it a different run
        if flat.get(key) != value and make(_with(read_settings(saved), key, value)).flat() != flat:
            changed[key] = value
    if changed:
        what = ", ".join(f"{k} = {v!r} (the run has {flat.get(k)!r})" for k, v in changed.items())
        raise ConfigError(
            f"a resumed run keeps its recipe: {what}. Leave it out, or begin a new run in another folder"
            + _longer(folder, changed)
        )
    if isinstance(data, Path):
        data = str(data)
    known = isinstance(data, str) and data == recipe.data and not os.path.exists(data)
    return None if known else data


def _longer(folder: Path, changed: Settings) -> str:
    """Return how to train the encoder of a run for longer, if a length is among the changed settings; else nothing."""
    if not any(key in changed for key in _LENGTHS):
        return ""
    weights = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    return (
        f". To train its encoder for longer, start a new run from its weights: --init {shlex.quote(str(weights))} "
        "instead of --resume, with the length of the new run; heads and schedule start again"
    )


def _with_context(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> Recipe:
    """Return the recipe with the context size of the run if it follows from the number of ranks, which has changed."""
    world, fixed = distributed.world(), isinstance(recipe.context, int)
    context = recipe.context if fixed else facts.get("context")
    before = f"resume with {many(facts['world'], 'rank') if 'world' in facts else 'as many'}, as before"
    if recipe.batch_size % world:
        raise ConfigError(
            f"the run in {folder} has batches of {recipe.batch_size}, which {world} ranks cannot share: {before}"
        )
    share = local_batch_size(recipe, world)
    if not isinstance(context, int):
        return recipe
    if share % context or (recipe.sync_norm and context % world):
        raise ConfigError(
            f"the run in {folder} has context groups of {context}, which {world} ranks cannot form: {before}"
        )
    return recipe if fixed or context == share else replace(recipe, context=context)
