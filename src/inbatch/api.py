"""What the command line does, in Python and in as many words."""

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
    """Learn features from images and leave a run's folder behind.

    data: a folder, a file that holds or lists images, a set's name ("torchvision/STL10", "digits-canvas"), or uint8
        images (N, C, H, W), alone or with labels. download: fetch a torchvision set that is not on the disk.
    method: a name of `METHODS`; simclr by default.
    fields: any setting of the recipe (epochs=100, batch=256, encoder="resnet18", preset="cifar", seed=1, ...);
        settings: those with a dot, {"method.temperature": 0.2}; config: a YAML or JSON file of them.
    budget="45m" (minutes, hours, days) ends the run, its evaluation included, within that time: it chooses encoder,
        image size, batch and length by real steps on this data and machine. On a CPU a budget of one hour is the
        default if neither budget, epochs, steps, preset, encoder nor a config says how long or what.
    context="auto" looks for the largest context group that fits in memory, with a few dry steps, and puts it into the
        recipe; the batch then need not fit. It costs one more forward pass where there are several groups.
    test: images with labels to judge the features by, where the data has no test split of its own.
    out: the run's folder, runs/METHOD-DATA-NUMBER by default; one that holds a run is refused unless `overwrite`.
    stop_on_collapse: end with TrainingError, after a checkpoint, where outputs collapse and do not recover.
    compare: a run's folder or a folder of results whose curve this one's is held against while it trains (it changes
        nothing); "auto": runs of the same recipe that come along.
    resume: True to go on in `out` where it holds a run that can be continued, or the folder of such a run.
    dist_timeout: seconds after which a rank that died or hangs ends the others, with an error that names it; more than
        rank 0 takes to judge the features, which the others wait for.
    Works under torchrun, SLURM or an existing process group as it is; all ranks return the same Run.
    Raises ConfigError, DataError, TrainingError, Preempted, Interrupted (`inbatch.errors`).
    """
    began = tuning.command_began()
    tuning.ready()
    with distributed.process_group(expect_world_size, device_for(device).type, dist_timeout):
        given = merged_settings(method, config, settings, fields)
        going_on, choice = _run_to_resume(out, resume), None
        if going_on is not None and _spent(going_on):
            _resumed(going_on, data, given, download)  # refuses what contradicts it
            with progress(quiet) as (tell, _):
                tell(f"The run in {going_on} is finished; inbatch evaluate {going_on} judges it again.")
            return load_run(going_on)
        if going_on is not None:
            recipe, source, data = _resumed(going_on, data, given, download)
            directory = going_on
        else:
            data = data_asked_for(data, given)
            given = with_default_budget(given, data, device_for(device), config is not None)
            given = with_encoder_of_init(given)
            if needs_plan(given):
                _new_folder(out, None, overwrite or _barely_begun(out, resume))  # refused before minutes are spent
                with progress(quiet) as (tell, _):
                    choice, source = plan_budget(
                        data, given, began, device=device_for(device), workers=workers, download=download, tell=tell
                    )
                recipe = choice.recipe
            else:
                recipe, source = resolve_recipe(data, given, download)
            directory = _new_folder(out, recipe, overwrite or _barely_begun(out, resume))
        if distributed.world() > 1:  # a million names are not read for nobody
            distributed.assert_equal_across_ranks(_facts(recipe, source))
        recipe, fitted = resolve(recipe, source, device_for(device), workers)
        memory = ""
        if going_on is None and choice is None:  # else a budget has looked already
            recipe, memory = within_memory(recipe, source, device_for(device), workers)
        reference = _reference(compare, recipe) if distributed.rank() == 0 else None
        loader, init = choice.loader if choice else None, going_on and kept_initial(going_on)
        built = build(recipe, source, device=device_for(device), workers=workers, loader=loader, init=init)
        held = evaluation_split(recipe, built.loader.source, data, test, download)
        lock = locked(directory) if distributed.rank() == 0 else contextlib.nullcontext()
        with lock as stale:  # from here on something is written: whatever could be refused has been
            if distributed.rank() == 0 and going_on is None:
                clear(directory)
                write_json(directory / "recipe.json", recipe.nested())
                save_initial(recipe, built.encoder, directory)
            notes = [note for note in (stale, memory, fitted and fitted.sentence(), _advice(built)) if note]
            notes = [*(choice.sentences() if choice else ()), *notes, *built.notes]
            result = train(
                built,
                directory,
                held,
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
    """Everything `pretrain` would train with, built and not trained: for --dry-run, or a loop of your own."""
    return _prepared(data, merged_settings(method, config, settings, fields), device, workers, download)[0]


def dry_run(
    data: Any, method: str | None = None, *, expect_world_size: int | None = None, device: str = "auto",
    config: str | Path | None = None, settings: Mapping[str, Any] | None = None, workers: int | None = None,
    download: bool = False, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `pretrain` would do, found without training: recipe, description, shapes, steps, memory. Leaves nothing but
    decoded images in the cache. Says also how long the run would take."""
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
        held = evaluation_split(built.recipe, built.source, where, download=download)
        lines, found = [describe(built)], {"recipe": built.recipe.nested(), "held_out": held and held[2]}
        if fitted is not None:
            lines, found = [*lines, fitted.sentence()], found | {"context_found": fitted.json()}
        seconds = choice.chosen.seconds if choice else step_seconds(built)
        lines += [*(choice.sentences() if choice else ()), expectation(built, seconds)]
        smaller = smaller_choices(built) if built.total * seconds > 3600 and built.recipe.budget is None else []
        found["seconds_estimate"] = {"step": seconds, "training": built.total * seconds, "smaller": dict(smaller)}
        lines += [f"  {how}: about {duration(time)}" for how, time in smaller]
        return found | {"description": "\n".join(lines)} | estimate(built)


def _facts(recipe: Recipe, source: Source) -> dict[str, object]:
    """What must be equal on all ranks before anything is built of it."""
    versions: dict[str, object] = {f"version of {name}": version(name) for name in ("inbatch", "torch")}
    data = {"number of images": f"{len(source):,}", "names or labels of the images": source.signature()}
    return versions | recipe.flat() | data


def _advice(built: RunComponents) -> str:
    """What would make this run faster here."""
    return advice(built.loader.device, max(view.size for view in built.views.views), built.loader.workers)


def _prepared(
    data: Any, given: Settings, device: str, workers: int | None, download: bool
) -> tuple[RunComponents, ContextSize | None]:
    """What these settings make of the data, and how its context was found where they ask for it."""
    given = with_encoder_of_init(given)
    recipe, source = resolve_recipe(data_asked_for(data, given), given, download)
    recipe, fitted = resolve(recipe, source, device_for(device), workers)
    return build(recipe, source, device=device_for(device), workers=workers), fitted


def _reference(compare: str | Path | None, recipe: Recipe) -> Reference | None:
    """What a run of this recipe is to be compared with; read now, for --overwrite may remove it."""
    if compare is None:
        return None
    return find_reference(recipe.nested()) if compare == "auto" else read_reference(compare)


def _spent(folder: Path) -> bool:
    """Whether a run has used its budget and written all that it hands out: judging it again would exceed the budget."""
    ended = report_of(folder).get("status") == "finished" and (folder / "result.json").is_file()
    return ended and read_file(folder / "recipe.json").get("budget") is not None


def _run_to_resume(out: str | Path | None, resume: str | Path | bool) -> Path | None:
    """The folder to go on in; None to begin anew."""
    if resume is False or resume is None:
        return None
    automatic = resume is True or resume == "auto"
    if automatic and out is None:
        raise ConfigError("--resume auto needs --out: the folder to go on in")
    folder = Path(out if automatic else resume)  # type: ignore[arg-type]
    if (folder / "recipe.json").is_file() and list((folder / "checkpoints").glob("*.pt")):
        return folder
    if automatic:
        return None
    raise ConfigError(f"nothing to resume in {folder}: it holds no run with a checkpoint")


def _barely_begun(out: str | Path | None, resume: str | Path | bool) -> bool:
    """Whether `out` holds what a run left that ended before its first checkpoint, and is to be gone on with."""
    if out is None or resume not in (True, "auto"):
        return False
    return not any((Path(out) / name).exists() for name in ("encoder", "result.json"))


def _resumed(folder: Path, data: Any, given: Settings, download: bool) -> tuple[Recipe, Source, Any]:
    """The recipe of a run, which what is given now must not contradict, and its data."""
    saved = read_file(folder / "recipe.json")
    recipe = make(saved)
    mine = recipe.flat()
    if isinstance(data, str | Path):
        given = {"data": str(data)} | given
    changed = {}
    for key, value in given.items():
        if key == "context" and value == "auto":
            continue  # decided when the run began: another would be another run
        if mine.get(key) != value and make(saved | {key: value}).flat() != mine:
            changed[key] = value
    if changed:
        what = ", ".join(f"{k} = {v!r} (the run has {mine.get(k)!r})" for k, v in changed.items())
        raise ConfigError(f"a resumed run keeps its recipe: {what}. Leave it out, or begin a new run in another folder")
    report = report_of(folder)
    if recipe.context is None and report.get("world", distributed.world()) != distributed.world():
        # It follows from the number of ranks, and decides results.
        recipe = replace(recipe, context=report["context"])
        if local_batch_size(recipe, distributed.world()) % report["context"]:
            raise ConfigError(
                f"the run in {folder} meets in groups of {report['context']}, which {distributed.world()} ranks cannot "
                f"form: go on with {report['world']}, as before"
            )
    if isinstance(data, str | Path | None):
        data = recipe.data
    source = open_data(data, recipe.split, subset=recipe.subset, download=download, **recipe.reading)
    return recipe, source, data


def _new_folder(out: str | Path | None, recipe: Recipe | None, overwrite: bool) -> Path:
    """A folder for a new run, chosen by rank 0 for all; without a recipe it is only said whether `out` may be used."""
    if out is not None:
        folder = Path(out)
        if (folder / "recipe.json").exists() and not overwrite:
            raise ConfigError(
                f"{folder} already holds a run: continue it (--resume {folder}), replace it (--overwrite), "
                "or choose another --out"
            )
        return folder
    if recipe is None:
        return Path("runs")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(recipe.data).name).strip("-") or "data"
    number = 1
    while (Path("runs") / f"{recipe.method.name}-{name}-{number}").exists():
        number += 1
    return Path(distributed.broadcast_object(str(Path("runs") / f"{recipe.method.name}-{name}-{number}")))
