"""Python interface: the functions behind the commands of the command line."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inbatch.data import Source, open_data
from inbatch.errors import ConfigError
from inbatch.runtime import distributed, tuning
from inbatch.runtime.device import device_for
from inbatch.runtime.files import locked, write_json
from inbatch.runtime.terminal import progress
from inbatch.training.advice import advice
from inbatch.training.auto_context import ContextSize, resolve, within_memory
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents, build, local_batch_size
from inbatch.training.calibration import plan_budget
from inbatch.training.holdout import evaluation_split
from inbatch.training.loop import train
from inbatch.training.monitors.reference import Reference, read_reference
from inbatch.training.monitors.shipped_references import find_reference
from inbatch.training.plan import data_asked_for, merged_settings, needs_plan, resolve_recipe, with_default_budget
from inbatch.training.recipe import Recipe, Settings, make, read_file
from inbatch.training.run import Run, embed_run, evaluate_run, export_run, load, load_run, replay_run, report_of
from inbatch.training.run_encoder import kept_initial, save_initial, with_encoder_of_init
from inbatch.training.status import clear
from inbatch.training.summary import describe, estimate
from inbatch.training.timing import expectation, smaller_choices, step_seconds

__all__ = [
    "Run",
    "dry_run",
    "embed_run",
    "evaluate_run",
    "export_run",
    "load",
    "load_run",
    "prepare",
    "pretrain",
    "replay_run",
]  # fmt: skip


def pretrain(
    data: Any = None,
    method: str | None = None,
    *,
    out: str | Path | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    test: Any = None,
    resume: str | Path | bool = False,
    overwrite: bool = False,
    device: str = "auto",
    workers: int | None = None,
    expect_world_size: int | None = None,
    download: bool = False,
    dist_timeout: float = 1800.0,
    quiet: bool = False,
    stop_on_collapse: bool = False,
    compare: str | Path | None = None,
    **fields: Any,
) -> Run:
    """Pretrain an encoder on images and write the results to a run directory.

    Works under torchrun, SLURM or an existing process group without changes; all ranks return the same Run.

    Args:
        data: a folder, a file that holds or lists images, the name of a data set ("torchvision/STL10",
            "digits-canvas"), or uint8 images (N, C, H, W), alone or with labels.
        method: a name of `METHODS`; simclr by default.
        out: run directory, runs/METHOD-DATA-NUMBER by default; a directory that holds a run is refused unless
            `overwrite`.
        config: a YAML or JSON file of settings.
        settings: settings with a dotted name, {"method.temperature": 0.2}.
        test: labelled images for evaluation, if the data has no test split.
        resume: True to resume the run in `out` if it can be resumed, or the directory of such a run.
        overwrite: replace a run in `out`.
        device: device of the run, or "auto".
        workers: number of data workers.
        expect_world_size: required number of ranks.
        download: download a torchvision data set that is not on the disk.
        dist_timeout: seconds after which a dead or hanging rank ends the other ranks with an error that names it. It
            must be longer than the evaluation on rank 0, for which the other ranks wait.
        quiet: print no progress.
        stop_on_collapse: save a checkpoint and raise TrainingError if the outputs collapse and do not recover.
        compare: a run directory or a folder of results; its curve is shown with that of this run during training and
            does not affect it. "auto": the shipped reference runs of the same recipe.
        **fields: any setting of the recipe (epochs=100, batch=256, encoder="resnet18", preset="cifar", seed=1, ...).
            budget="45m" (minutes, hours, days) ends the run, including its evaluation, within that time: encoder, image
            size, batch size and length are chosen by real steps on this data and machine. On a CPU, a budget of one
            hour is the default if none of budget, epochs, steps, preset, encoder and a config is given.
            context="auto" finds the largest context group that fits in memory with a few dry steps and writes it to the
            recipe; the whole batch then need not fit. With several groups this costs one more forward pass.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError, TrainingError, Preempted, Interrupted: see `inbatch.errors`.
    """
    began = tuning.command_began()
    tuning.ready()
    with distributed.process_group(expect_world_size, device_for(device).type, dist_timeout):
        given = merged_settings(method, config, settings, fields)
        going_on, choice = _run_to_resume(out, resume), None
        if going_on is not None and _spent(going_on):
            _resumed(going_on, data, given, download)  # raises if an argument contradicts the run
            with progress(quiet) as (tell, _):
                tell(f"The run in {going_on} is finished; inbatch evaluate {going_on} evaluates it again.")
            return load_run(going_on)
        if going_on is not None:
            recipe, source, data = _resumed(going_on, data, given, download)
            directory = going_on
        else:
            data = data_asked_for(data, given)
            given = with_default_budget(given, data, device_for(device), config is not None)
            given = with_encoder_of_init(given)
            if needs_plan(given):
                _new_folder(out, None, overwrite or _barely_begun(out, resume))  # refuse before minutes are spent
                with progress(quiet) as (tell, _):
                    choice, source = plan_budget(
                        data, given, began, device=device_for(device), workers=workers, download=download, tell=tell
                    )
                recipe = choice.recipe
            else:
                recipe, source = resolve_recipe(data, given, download)
            directory = _new_folder(out, recipe, overwrite or _barely_begun(out, resume))
        if distributed.world() > 1:  # reading a million names is only needed with several ranks
            distributed.assert_equal_across_ranks(_facts(recipe, source))
        recipe, fitted = resolve(recipe, source, device_for(device), workers)
        memory = ""
        if going_on is None and choice is None:  # a budget has already checked the memory
            recipe, memory = within_memory(recipe, source, device_for(device), workers)
        reference = _reference(compare, recipe) if distributed.rank() == 0 else None
        loader, init = choice.loader if choice else None, going_on and kept_initial(going_on)
        built = build(recipe, source, device=device_for(device), workers=workers, loader=loader, init=init)
        split = evaluation_split(recipe, built.loader.source, data, test, download)
        lock = locked(directory) if distributed.rank() == 0 else contextlib.nullcontext()
        with lock as stale:  # writing starts here: all checks that can refuse the run have passed
            if distributed.rank() == 0 and going_on is None:
                clear(directory)
                write_json(directory / "recipe.json", recipe.nested())
                save_initial(recipe, built.encoder, directory)
            notes = [note for note in (stale, memory, fitted and fitted.sentence(), _advice(built)) if note]
            notes = [*(choice.sentences() if choice else ()), *notes, *built.notes]
            result = train(
                built,
                directory,
                split,
                resume=going_on is not None,
                quiet=quiet,
                notes=notes,
                stop_on_collapse=stop_on_collapse,
                reference=reference,
                began=began,
                calibration=choice.json() if choice else None,
            )
        return Run(directory, recipe, result)


def prepare(
    data: Any, method: str | None = None, *, config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, device: str = "auto", workers: int | None = None,
    download: bool = False, **fields: Any,
) -> RunComponents:  # fmt: skip
    """Build everything that `pretrain` would train with, without training: for --dry-run or a custom training loop."""
    return _prepared(data, merged_settings(method, config, settings, fields), device, workers, download)[0]


def dry_run(
    data: Any, method: str | None = None, *, expect_world_size: int | None = None, device: str = "auto",
    config: str | Path | None = None, settings: Mapping[str, Any] | None = None, workers: int | None = None,
    download: bool = False, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return what `pretrain` would do: recipe, description, shapes, steps, memory and estimated duration.

    Does not train; only decoded images in the cache remain.
    """
    began = tuning.command_began()
    with distributed.process_group(expect_world_size, device_for(device).type):
        given, choice = merged_settings(method, config, settings, fields), None
        given = with_default_budget(given, data_asked_for(data, given), device_for(device), config is not None)
        given = with_encoder_of_init(given)
        if needs_plan(given):
            choice, source = plan_budget(
                data_asked_for(data, given), given, began, device=device_for(device), workers=workers, download=download
            )
            built, fitted = build(choice.recipe, source, device=device_for(device), loader=choice.loader), None
        else:
            built, fitted = _prepared(data, given, device, workers, download)
        where = built.recipe.data if isinstance(data, str | None) else data
        split = evaluation_split(built.recipe, built.source, where, download=download)
        lines, found = [describe(built)], {"recipe": built.recipe.nested(), "held_out": split and split.description}
        if fitted is not None:
            lines, found = [*lines, fitted.sentence()], found | {"context_found": fitted.json()}
        seconds = choice.chosen.seconds if choice else step_seconds(built)
        lines += [*(choice.sentences() if choice else ()), expectation(built, seconds)]
        smaller = smaller_choices(built) if built.total * seconds > 3600 and built.recipe.budget is None else []
        found["seconds_estimate"] = {"step": seconds, "training": built.total * seconds, "smaller": dict(smaller)}
        lines += [f"  {how}: about {duration(time)}" for how, time in smaller]
        return found | {"description": "\n".join(lines)} | estimate(built)


def _facts(recipe: Recipe, source: Source) -> dict[str, object]:
    """Return the values that must be equal on all ranks before anything is built."""
    versions: dict[str, object] = {f"version of {name}": version(name) for name in ("inbatch", "torch")}
    data = {"number of images": f"{len(source):,}", "names or labels of the images": source.signature()}
    return versions | recipe.flat() | data


def _advice(built: RunComponents) -> str:
    """Return advice on how to make this run faster on this machine."""
    return advice(built.loader.device, max(view.size for view in built.views.views), built.loader.workers)


def _prepared(
    data: Any, given: Settings, device: str, workers: int | None, download: bool
) -> tuple[RunComponents, ContextSize | None]:
    """Return the components built from these settings, and the context size if it was searched for."""
    given = with_encoder_of_init(given)
    recipe, source = resolve_recipe(data_asked_for(data, given), given, download)
    recipe, fitted = resolve(recipe, source, device_for(device), workers)
    return build(recipe, source, device=device_for(device), workers=workers), fitted


def _reference(compare: str | Path | None, recipe: Recipe) -> Reference | None:
    """Return the reference curve for this recipe; read it before --overwrite can remove it."""
    if compare is None:
        return None
    return find_reference(recipe.nested()) if compare == "auto" else read_reference(compare)


def _spent(folder: Path) -> bool:
    """Return whether a run has used its budget and written all results: evaluating it again would exceed the budget."""
    ended = report_of(folder).get("status") == "finished" and (folder / "result.json").is_file()
    return ended and read_file(folder / "recipe.json").get("budget") is not None


def _run_to_resume(out: str | Path | None, resume: str | Path | bool) -> Path | None:
    """Return the directory of the run to resume, or None for a new run."""
    if resume is False or resume is None:
        return None
    automatic = resume is True or resume == "auto"
    if automatic and out is None:
        raise ConfigError("--resume auto needs --output-dir: the directory of the run")
    folder = Path(out if automatic else resume)  # type: ignore[arg-type]
    if (folder / "recipe.json").is_file() and list((folder / "checkpoints").glob("*.pt")):
        return folder
    if automatic:
        return None
    raise ConfigError(f"nothing to resume in {folder}: it has no run with a checkpoint")


def _barely_begun(out: str | Path | None, resume: str | Path | bool) -> bool:
    """Return whether `out` may be resumed but holds only a run that ended before its first checkpoint."""
    if out is None or resume not in (True, "auto"):
        return False
    return not any((Path(out) / name).exists() for name in ("encoder", "result.json"))


def _resumed(folder: Path, data: Any, given: Settings, download: bool) -> tuple[Recipe, Source, Any]:
    """Return the recipe of a run and its data; raise ConfigError if the current settings contradict the recipe."""
    saved = read_file(folder / "recipe.json")
    recipe = make(saved)
    mine = recipe.flat()
    if isinstance(data, str | Path):
        given = {"data": str(data)} | given
    changed = {}
    for key, value in given.items():
        if key == "context" and value == "auto":
            continue  # the context was chosen when the run started; another value would make it a different run
        if mine.get(key) != value and make(saved | {key: value}).flat() != mine:
            changed[key] = value
    if changed:
        what = ", ".join(f"{k} = {v!r} (the run has {mine.get(k)!r})" for k, v in changed.items())
        raise ConfigError(f"a resumed run keeps its recipe: {what}. Leave it out, or begin a new run in another folder")
    report = report_of(folder)
    if recipe.context is None and report.get("world", distributed.world()) != distributed.world():
        # The context follows from the number of ranks and affects the results.
        recipe = replace(recipe, context=report["context"])
        if local_batch_size(recipe, distributed.world()) % report["context"]:
            raise ConfigError(
                f"the run in {folder} has context groups of {report['context']}, which {distributed.world()} ranks "
                f"cannot form: resume with {report['world']} ranks, as before"
            )
    if isinstance(data, str | Path | None):
        data = recipe.data
    source = open_data(data, recipe.split, subset=recipe.subset, download=download, **recipe.reading)
    return recipe, source, data


def _new_folder(out: str | Path | None, recipe: Recipe | None, overwrite: bool) -> Path:
    """Return the directory for a new run, chosen by rank 0 for all ranks; without a recipe, only check `out`."""
    if out is not None:
        folder = Path(out)
        if (folder / "recipe.json").exists() and not overwrite:
            raise ConfigError(
                f"{folder} already holds a run: continue it (--resume {folder}), replace it (--overwrite), "
                "or choose another --output-dir"
            )
        return folder
    if recipe is None:
        return Path("runs")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(recipe.data).name).strip("-") or "data"
    number = 1
    while (Path("runs") / f"{recipe.method.name}-{name}-{number}").exists():
        number += 1
    return Path(distributed.broadcast_object(str(Path("runs") / f"{recipe.method.name}-{name}-{number}")))
