"""Python interface: the functions behind the commands of the command line."""

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inbatch.data import Source
from inbatch.models import load_classifier
from inbatch.runtime import distributed, own_parts, tuning
from inbatch.runtime.device import device_for
from inbatch.runtime.files import locked
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.process_group import assert_equal_across_ranks, process_group
from inbatch.runtime.terminal import progress
from inbatch.training.advice import advice
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents, build
from inbatch.training.claim import check_free, check_place, check_unchanged, claim, numbered, run_identity
from inbatch.training.classifier import train_classifier
from inbatch.training.evaluation_plan import evaluation_seconds
from inbatch.training.holdout import evaluation_split
from inbatch.training.monitors.reference import Reference, read_reference
from inbatch.training.monitors.shipped_references import find_reference
from inbatch.training.own_requests import with_own_parts
from inbatch.training.plan import RunPlan, plan_run, plan_without_budget, with_context
from inbatch.training.predictions import predict
from inbatch.training.pretraining import check_start, train
from inbatch.training.recipe import Recipe
from inbatch.training.requested_settings import merged_settings, requested_test
from inbatch.training.resume import barely_begun, finished_run, restarted, resumed_plan, run_to_resume
from inbatch.training.run import Run, evaluate_run, load, load_run, replay_run
from inbatch.training.run_embedding import embed_run
from inbatch.training.run_encoder import kept_initial
from inbatch.training.run_export import export_run
from inbatch.training.size_estimate import estimate
from inbatch.training.status import begin_run
from inbatch.training.summary import describe
from inbatch.training.teacher import kept_teacher
from inbatch.training.timing import expectation, smaller_choices, step_seconds
from inbatch.training.trackers.selection import requested_trackers

__all__ = [
    "Run",
    "dry_run",
    "embed_run",
    "evaluate_run",
    "export_run",
    "load",
    "load_classifier",
    "load_run",
    "predict",
    "prepare",
    "pretrain",
    "replay_run",
    "train_classifier",
]  # fmt: skip


@isolated
@with_own_parts
def pretrain(
    data: Any = None,
    method: Any = None,
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
    track: str | Sequence[str] | None = None,
    callbacks: Sequence[Any] = (),
    **fields: Any,
) -> Run:
    """Pretrain an encoder on images and write the results to a run directory.

    Works under torchrun, SLURM or an existing process group without changes; all ranks return the same Run.

    Args:
        data: a folder, a file that holds or lists images, the name of a data set ("torchvision/STL10",
            "digits-canvas"), a pattern ("photos/*/*.jpg"), a list of paths, or uint8 images (N, C, H, W), alone or with
            labels.
        method: a name of `METHODS`, simclr by default; or a `Method` of your own, or its class. `encoder`, `views` and
            `optimizer` among the fields may be objects too (docs/own-parts.md).
        out: run directory, runs/METHOD-DATA-NUMBER by default; a directory that holds a run is refused unless
            `overwrite`.
        config: a YAML or JSON file of settings.
        settings: settings with a dotted name, {"method.temperature": 0.2}.
        test: labelled images for evaluation, if the data has no test split. A path is part of the recipe; pass other
            objects again to resume or to evaluate the run.
        resume: True to resume the run in `out` if it can be resumed, or the directory of such a run. `data` can be a
            new place of the same images.
        overwrite: replace a run in `out`. Processes that torchrun restarts resume their run, also without `resume`.
        device: device of the run, or "auto".
        workers: number of data workers.
        expect_world_size: required number of ranks.
        download: download a torchvision data set that is not on the disk.
        dist_timeout: seconds after which a dead or hanging rank ends the other ranks with an error that names it. It
            must be longer than what one rank may need more than another for its part of an evaluation.
        quiet: print no progress.
        stop_on_collapse: save a checkpoint and raise TrainingError if the outputs collapse and do not recover.
        compare: a run directory or a folder of results; its curve is shown with that of this run during training and
            does not affect it. "auto": the shipped reference runs of the same recipe.
        track: names of experiment trackers, such as "wandb,mlflow", besides TensorBoard, which is used if it is
            installed; "none" for no tracker. They do not affect the run and are not part of its recipe. A resumed
            run keeps its trackers, to which this adds.
        callbacks: `Callback` objects or classes, called after steps, epochs and evaluations.
        **fields: any setting of the recipe (epochs=100, batch_size=256, encoder="resnet18", seed=1, ...).
            budget="45m" (minutes, hours, days) ends the run, including its evaluation, within that time: encoder, image
            size, batch size and length are chosen by real steps on this data and machine. On a CPU, a budget of one
            hour is the default if none of budget, epochs, steps, preset, encoder and a config is given.
            context="auto" finds the largest context group that fits in memory with a few dry steps and writes it to the
            recipe; the whole batch then need not fit. With several groups this costs one more forward pass.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError, TrainingError, Preempted, Interrupted, Unwritten: see `inbatch.errors`.
    """
    began = tuning.command_began()
    tuning.ready()
    data = joined_paths(data)
    trackers = requested_trackers(track)
    with process_group(expect_world_size, device_for(device).type, dist_timeout):
        requested = merged_settings(method, config, settings, fields)
        out = None if out is None else path_of(out, "out")
        if resume is False and out is not None and restarted(out):
            resume, overwrite = True, False
        previous, replaces = run_to_resume(out, resume), overwrite or barely_begun(out, resume)
        if previous is None:
            requested |= requested_test(test)
        seen = "none" if previous is None else "found"  # before any rank plans a new run, which all do together
        assert_equal_across_ranks({"checkpoint in the run directory, which all ranks must see": seen})
        before = run_identity(previous or out)
        with progress(quiet) as (notify, _):
            if previous is not None:
                if finished := finished_run(previous, data, requested, download, notify):
                    return finished
                plan = resumed_plan(previous, data, requested, download)
            else:
                _check_out(out, replaces)  # before minutes are spent
                if distributed.rank() == 0:
                    check_place(Path("runs") if out is None else out)
                plan = plan_run(
                    data, requested, device=device_for(device), workers=workers, download=download, began=began,
                    configured=config is not None, notify=notify,
                )  # fmt: skip
        if distributed.world() > 1:  # reading a million names is only needed with several ranks
            assert_equal_across_ranks(_facts(plan.recipe, plan.source))
        plan = with_context(plan, device_for(device), workers, check_memory=previous is None)
        reference = _reference(compare, plan.recipe) if distributed.rank() == 0 else None
        built = build(
            plan.recipe, plan.source, device=device_for(device), workers=workers, loader=plan.loader,
            init=previous and kept_initial(previous), teacher=previous and kept_teacher(previous),
        )  # fmt: skip
        images = check_start(built, callbacks, plan.images)
        here = plan.here or plan.recipe
        split = evaluation_split(here, built.loader.source, plan.data, test, download)
        directory = previous or _claim_directory(out, plan.recipe)
        lock = locked(directory) if distributed.rank() == 0 else contextlib.nullcontext()
        with lock as stale:  # writing starts here: all checks that can refuse the run have passed
            notes = _notes(plan, built, stale)
            with built.gathered():
                if distributed.rank() == 0:
                    check_unchanged(directory, before)
                    _check_out(out, replaces or previous is not None)
                    notes += begin_run(directory, built, here, previous is not None)
            result = train(
                built, directory, split, images, resume=previous is not None, quiet=quiet, notes=notes,
                stop_on_collapse=stop_on_collapse, reference=reference, began=began,
                calibration=plan.choice.json() if plan.choice else None, track=trackers, callbacks=callbacks,
            )  # fmt: skip
        return Run(directory, built.recipe, result, own_parts.current())


@isolated
@with_own_parts
def prepare(
    data: Any, method: Any = None, *, config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None, device: str = "auto", workers: int | None = None,
    download: bool = False, **fields: Any,
) -> RunComponents:  # fmt: skip
    """Build everything that `pretrain` would train with, without training: for --dry-run or a custom training loop."""
    requested = merged_settings(method, config, settings, fields)
    plan = with_context(plan_without_budget(data, requested, download), device_for(device), workers)
    return build(plan.recipe, plan.source, device=device_for(device), workers=workers)


@isolated
@with_own_parts
def dry_run(
    data: Any, method: Any = None, *, expect_world_size: int | None = None, device: str = "auto",
    config: str | Path | None = None, settings: Mapping[str, Any] | None = None, workers: int | None = None,
    download: bool = False, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return what `pretrain` would do: recipe, description, shapes, steps, memory and estimated duration.

    Does not train; only decoded images in the cache remain.
    """
    began = tuning.command_began()
    with process_group(expect_world_size, device_for(device).type):
        requested = merged_settings(method, config, settings, fields)
        plan = plan_run(
            data, requested, device=device_for(device), workers=workers, download=download, began=began,
            configured=config is not None,
        )  # fmt: skip
        plan = with_context(plan, device_for(device), workers)
        built = build(plan.recipe, plan.source, device=device_for(device), workers=workers, loader=plan.loader)
        split = evaluation_split(plan.recipe, plan.source, plan.data, download=download)
        seconds = plan.choice.chosen.seconds if plan.choice else step_seconds(built)
        long = built.total * seconds > 3600 and plan.recipe.budget is None
        smaller = smaller_choices(built) if long and built.whole is None else []  # ranks time other seconds
        more = {}
        if plan.choice:
            start = time.perf_counter() - began - plan.choice.seconds
            more = {"start": start, "evaluation": evaluation_seconds(built, split)}
        lines = [describe(built)] + ([plan.context.sentence()] if plan.context else [])
        lines += [*(plan.choice.sentences() if plan.choice else ()), *built.notes, expectation(built, seconds)]
        lines += [f"  {how}: about {duration(time)}" for how, time in smaller]
        return {
            "recipe": built.recipe.nested(),
            "held_out": split and split.description,
            **({"context_found": plan.context.json()} if plan.context else {}),
            "seconds_estimate": more | {"step": seconds, "training": built.total * seconds, "smaller": dict(smaller)},
            "description": "\n".join(lines),
            **estimate(built),
        }


def _notes(plan: RunPlan, built: RunComponents, stale: str | None) -> list[str]:
    """Return the sentences for the start of a run: how its recipe was chosen, and advice."""
    context = plan.context.sentence() if plan.context else ""
    notes = [note for note in (stale, plan.memory, context, _advice(built)) if note]
    notes = [own.sentence() for own in own_parts.current().values()] + notes
    return [*(plan.choice.sentences() if plan.choice else ()), *notes, *built.notes]


def _facts(recipe: Recipe, source: Source) -> dict[str, object]:
    """Return the values that must be equal on all ranks before anything is built."""
    versions: dict[str, object] = {f"version of {name}": version(name) for name in ("inbatch", "torch")}
    data = {"number of images": f"{len(source):,}", "names or labels of the images": source.signature()}
    shards = {"places of the images in their files": source.shard_layout()} if recipe.read == "sequential" else {}
    return versions | recipe.flat() | data | shards


def _advice(built: RunComponents) -> str:
    """Return advice on how to make this run faster on this machine."""
    return advice(built.loader.device, max(view.size for view in built.views.views), built.loader.workers)


def _reference(compare: str | Path | None, recipe: Recipe) -> Reference | None:
    """Return the reference curve for this recipe; read it before --overwrite can remove it."""
    if compare is None:
        return None
    return find_reference(recipe.nested()) if compare == "auto" else read_reference(compare)


def _check_out(out: Path | None, replaces: bool) -> None:
    """Refuse a directory that a new run must not replace."""
    if out is not None and not replaces:
        check_free(out)


def _claim_directory(out: Path | None, recipe: Recipe) -> Path:
    """Return the directory of a new run; without `out`, rank 0 creates the first free one of its name in runs/."""
    if out is not None:
        return out
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(recipe.data).name).strip("-") or "data"
    method = recipe.method.name.rpartition(":")[2].rpartition(".")[2]
    names = numbered(Path("runs") / f"{method}-{name}")
    return Path(distributed.broadcast_object(str(claim(names)) if distributed.rank() == 0 else None))
