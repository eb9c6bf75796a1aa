"""Train a run from its start, or from its checkpoint, to its result."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, InbatchError
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime import distributed, shared_work
from inbatch.runtime.process_group import assert_equal_across_ranks
from inbatch.runtime.signals import stop_on_signals
from inbatch.runtime.threads import Threads
from inbatch.training.budget import duration
from inbatch.training.build import RunComponents
from inbatch.training.callbacks import Callback, come_or_gone, named, with_state
from inbatch.training.checkpoint import Checkpoint, load, restore, set_aside
from inbatch.training.checkpoint_recipe import check_recipe, notes_on_version
from inbatch.training.data_places import check_same_images, images_signature
from inbatch.training.evaluation_plan import plan_evaluations
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.loop import Loop
from inbatch.training.machine import machine, record
from inbatch.training.metric_logger import Log, elapsed_seconds
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.online_evaluation import evaluation_epochs
from inbatch.training.monitors.reference import Reference
from inbatch.training.run_result import finish
from inbatch.training.side_files import report_of
from inbatch.training.status import Report
from inbatch.training.stopping import Stopping
from inbatch.training.summary import describe
from inbatch.training.timing import expectation, step_seconds
from inbatch.training.trackers.followers import Followers
from inbatch.training.trackers.selection import Selection, select
from inbatch.training.train_state import TrainState


def check_start(built: RunComponents, callbacks: Sequence[Callback], images: str | None) -> str:
    """Return the signature of the images; raise an error that ends a run before it writes a file.

    Args:
        built: The run.
        callbacks: Its callbacks.
        images: Signature of the images of a resumed run; None for a new run.

    Raises:
        InbatchError: If a checkpoint cannot hold the state of a callback.
        DataError: If the images of a resumed run have changed.
        ConfigError: If ranks differ in what they have built, or if a callback could not change weights.
    """
    for name, callback in named(callbacks).items():
        if callback.changes_weights and built.whole is not None:
            raise ConfigError(
                f"shard and the callback {name} exclude each other: it changes weights, and with shard callbacks get a "
                "copy of the encoder; leave one of the two out"
            )
    for part in with_state(named(callbacks)).values():
        part.state_dict()  # a fault in it must not end the run at its first checkpoint
    now = images_signature(built.loader.source)
    if images is not None:
        check_same_images(images, now)
    facts = {"images that can be read": now, "context": built.context, "callbacks": list(named(callbacks))}
    assert_equal_across_ranks(facts)
    return now


def train(
    built: RunComponents, out: Path, split: EvaluationSplit | None, images: str, *, resume: bool, quiet: bool,
    notes: Sequence[str] = (), stop_on_collapse: bool = False, reference: Reference | None = None,
    began: float | None = None, calibration: Mapping[str, Any] | None = None, track: tuple[str, ...] | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train to the end, or to a checkpoint if a signal requests it; return the written result.

    Args:
        built: The run.
        out: Run directory, locked by the caller.
        split: Images of the evaluation, from `evaluation_split`; None without labels.
        images: Signature of the training images, from `check_start`.
        resume: Whether to continue from the last checkpoint.
        quiet: Print no progress.
        notes: Sentences for the user, printed at the start.
        stop_on_collapse: Stop if outputs are collapsed at two successive evaluations, after saving a checkpoint.
        reference: Reference curve for comparison, on rank 0; it affects no decision.
        began: Start time of the command (`time.perf_counter`), from which a budget counts; now if None.
        calibration: How the recipe was chosen for its budget, for the result.
        callbacks: Callbacks, the same on every rank.
        track: Requested trackers, as for `trackers.selection.select`.

    Raises:
        Preempted: After a request to terminate.
        Interrupted: After an interrupt from the keyboard.
        TrainingError: If the loss or the gradient is not finite (the step is kept, see `replay.capture`), or if the run
            stops on collapse.
    """
    progress = TrainState(began=began or time.perf_counter(), unreadable=built.loader.bad)
    called, main = named(callbacks), distributed.rank() == 0
    parts = built.parts() | {"progress": progress} | with_state(called)
    saved = None
    if resume:
        saved = _restore(built, parts, progress, out)
        where_from = f"Resuming from step {progress.step:,} of {built.total:,}{_ranks(saved, out, built)}."
        notes = [*notes, saved.note or where_from, *notes_on_version(saved, built.recipe)]
    else:
        progress.calibration = dict(calibration) if calibration else None
    assert_equal_across_ranks({"checkpoint": f"step {progress.step}"})
    if saved is not None and main:  # every rank has read it
        set_aside(saved)
    progress.data = images
    epochs = evaluation_epochs(built.recipe)
    compared = (
        Comparison(reference.average_losses(epochs), progress.curve, epochs, built.loader.steps) if reference else None
    )

    where = machine(built.loader.device, built.network.precision)  # now: a checkout may change during the run
    notes = [*notes, *filter(None, [record(progress.machines, where)])]
    report = Report(out, built, progress, main)
    followers = Followers(out, select(out, track, resume) if main else Selection(), report.untracked)
    with followers, report.running(), _log(built, out if main else None, followers, progress, quiet or not main) as log:
        log.note(describe(built))
        log.restore(progress.curve)
        with report.record_exit_status():
            log.note(_expected(built, progress))
        for note in [*notes, *(compared.opening(built.recipe.nested()) if compared else ())]:
            log.note(note)
        with report.record_exit_status():
            products = fast_products() if built.loader.device.type == "cpu" else contextlib.nullcontext()
            threads = Threads(built.loader.device, progress.threads)
            with products, contextlib.closing(built.loader), threads, stop_on_signals() as stop:
                stopping = Stopping(built, parts, report, stop)
                with stopping.answering():
                    with report.record_exit_status():  # torchrun terminates the other ranks if one has died
                        if sentence := threads.decide():
                            log.note(sentence)
                        plan = plan_evaluations(built, split, progress)
                        followers.start(progress.step, log.note)  # now: the steps before were timed
                        loop = Loop(
                            built, progress, parts, out, log, followers, stopping, plan.clock(progress), threads,
                            compared, plan.online, stop_on_collapse, called,
                        )  # fmt: skip
                        loop.run()
                    with shared_work.sharing(stop), built.gathered():
                        stop.release()  # everything is saved
                        result = finish(built, progress, plan, out, where, compared)
                    result = distributed.broadcast_object(result)
        for sentence in _closing(built, result, compared):
            log.note(sentence)
    return result


def _log(built: RunComponents, out: Path | None, followers: Followers, progress: TrainState, quiet: bool) -> Log:
    """Return the log of a run, which writes files if `out` is not None."""
    return Log(
        out, total_steps=built.total, quiet=quiet, resume_step=progress.step,
        tensorboard=followers.selection.tensorboard, untracked=followers.untracked,
    )  # fmt: skip


def _restore(built: RunComponents, parts: dict[str, Any], progress: TrainState, out: Path) -> Checkpoint:
    """Load the last checkpoint of a run into its parts."""
    saved = load(out / "checkpoints", parts=parts)
    check_recipe(saved, built.recipe, out / "recipe.json")
    without = come_or_gone(parts, saved.state)
    restore(*({name: part for name, part in of.items() if name not in without} for of in (parts, saved.state)))
    if progress.step != saved.step or progress.step > built.total or progress.ended > saved.step // built.loader.steps:
        raise InbatchError(
            f"{saved.path} does not fit this run: step {saved.step:,}, progress.step {progress.step:,} and "
            f"progress.ended {progress.ended:,} epochs, in a run of {built.total:,} steps of {built.loader.steps:,} an "
            "epoch. Restore the file, or start a new run."
        )
    progress.before = max(progress.before, elapsed_seconds(out / "metrics.jsonl"))  # with that of a killed process
    return saved


def _closing(built: RunComponents, result: Mapping[str, Any], compared: Comparison | None) -> Iterator[str]:
    """Yield the sentences for the end of a run."""
    yield f"Compared with the encoder before training in {result['comparison_seconds']:.1f} s."
    if built.recipe.budget is not None:
        share = result["wall_seconds"] / built.recipe.budget
        yield f"Took {share:.0%} of the budget of {duration(built.recipe.budget)}."
    if compared:
        yield compared.summary()


def _expected(built: RunComponents, progress: TrainState) -> str:
    """Return the expected duration of the remaining run: from calibration, earlier steps, or a slice of a step."""
    calibration = progress.calibration
    if calibration and not progress.step:
        tried = {one["name"]: one["seconds"] for one in calibration["tried"]}
        seconds = tried[calibration["chosen"]]
    elif progress.step:
        seconds = progress.seconds / progress.step
    else:
        seconds = distributed.broadcast_object(step_seconds(built))
    return expectation(built, seconds, progress.step)


def _ranks(saved: Checkpoint, out: Path, built: RunComponents) -> str:
    """Return the number of ranks of a resumed run as text, if there are or were several."""
    now = distributed.world()
    before = (saved.run or report_of(out)).get("world", now)
    several = built.recipe.sync_norm and built.context < built.recipe.batch_size
    same = "in other context groups, because sync_norm extends them over the ranks" if several else "equal to rounding"
    changed = f" ({before} before: the same images at every step, {same})" if before != now else ""
    return f" on {now} rank{'s' * (now > 1)}{changed}" if changed or now > 1 else ""
