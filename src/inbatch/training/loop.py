"""The training loop: epochs, online evaluation, checkpoints, and the files written at the end."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inbatch.data import Subset
from inbatch.errors import DataError, InbatchError, TrainingError
from inbatch.models import save_encoder
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime import distributed
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import peak_memory
from inbatch.runtime.signals import stop_on_signals
from inbatch.runtime.threads import Threads
from inbatch.training.budget import Keeper, Pace, duration
from inbatch.training.build import RunComponents
from inbatch.training.checkpoint import load, restore, save, set_aside
from inbatch.training.head_evaluation import save_heads
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.judgement import IMAGES, images_within, worth
from inbatch.training.metric_logger import Log, spent
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.online_evaluation import (
    affordable,
    check_collapse,
    check_leak,
    choose_online_subsets,
    evaluate_online,
    evaluation,
    evaluation_epochs,
    limited,
    make_online_evaluator,
    report_comparison,
    survey,
)
from inbatch.training.monitors.reference import Reference
from inbatch.training.replay import capture
from inbatch.training.status import Report, report_unreadable
from inbatch.training.step import NonFiniteError
from inbatch.training.stopping import Stopping
from inbatch.training.summary import describe
from inbatch.training.timing import expectation, growth, step_seconds
from inbatch.training.train_state import TrainState

JUDGED = 0.03
"""Share of a budget that embedding the images of one evaluation may take."""
SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch without a budget; with a budget, a twentieth of it."""


def train(
    built: RunComponents, out: Path, split: EvaluationSplit | None, *, resume: bool, quiet: bool,
    notes: Sequence[str] = (), stop_on_collapse: bool = False, reference: Reference | None = None,
    began: float | None = None, calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train to the end, or to a checkpoint if a signal requests it; return the written result.

    Args:
        built: The run.
        out: Run directory, locked by the caller.
        split: Images of the evaluation, from `evaluation_split`; None without labels.
        resume: Whether to continue from the last checkpoint.
        quiet: Print no progress.
        notes: Sentences for the user, printed at the start.
        stop_on_collapse: Stop if outputs are collapsed at two successive evaluations, after saving a checkpoint.
        reference: Reference curve for comparison, on rank 0; it affects no decision.
        began: Start time of the command (`time.perf_counter`), from which a budget counts; now if None.
        calibration: How the recipe was chosen for its budget, for the result.

    Raises:
        Preempted: After a request to terminate.
        Interrupted: After an interrupt from the keyboard.
        TrainingError: If the loss or the gradient is not finite (the step is kept, see `replay.capture`), or if the run
            stops on collapse.
    """
    progress, main = TrainState(began=time.perf_counter() if began is None else began), distributed.rank() == 0
    parts, data = built.parts() | {"progress": progress}, _signature(built)
    if resume:
        found = load(out / "checkpoints")
        _same_data(found.state.get("progress", {}).get("data", data), data)
        restore(parts, found.state)
        progress.before = max(progress.before, spent(out / "metrics.jsonl"))  # with that of a killed process
        notes = [*notes, found.note or f"Resuming from step {progress.step:,} of {built.total:,}{_ranks(out)}."]
    if not resume:
        progress.calibration = dict(calibration) if calibration else None
    calibration = progress.calibration
    distributed.assert_equal_across_ranks(
        {"checkpoint": f"step {progress.step}", "images that can be read": data, "context": built.context}
    )
    if resume and main:  # every rank has read it
        set_aside(found)
    progress.data = data
    looks = evaluation_epochs(built.recipe)
    compared = Comparison(reference.over(looks), progress.curve, looks, built.loader.steps) if reference else None

    where = environment(built.loader.device)  # the current environment: a checkout may change during the run
    report = Report(out, built, progress, main)
    report.status("running")
    with Log(out if main else None, total_steps=built.total, quiet=quiet or not main, resume_step=progress.step) as log:
        log.note(describe(built))
        with report.record_exit_status():
            log.note(_expected(built, progress, calibration))
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
                        online, pace, images = split, None, IMAGES
                        if main and built.recipe.budget is not None:
                            split, pace, images = _within(built, split, progress, calibration)
                        if main and split is not None:
                            online, split = choose_online_subsets(built, split)
                        keeper = Keeper(pace, lambda: progress.wall, SAVE_EVERY if pace is None else pace.seconds / 20)
                        _epochs(
                            built, progress, parts, log, stopping, online, out, stop_on_collapse, compared, keeper,
                            threads,
                        )  # fmt: skip
                    stop.release()  # everything is saved
                    extra = {"calibration": calibration} if calibration else {}
                    ended = (built, progress, split, out, where, compared, extra, images)
                    result = distributed.broadcast_object(_finish(*ended) if main else None)
        log.note(f"Compared with the encoder before training in {result['comparison_seconds']:.1f} s.")
        if built.recipe.budget is not None:
            share = result["wall_seconds"] / built.recipe.budget
            log.note(f"Took {share:.0%} of the budget of {duration(built.recipe.budget)}.")
        if compared:
            log.note(compared.summary())
    report.status("finished")
    return result


def _expected(built: RunComponents, progress: TrainState, calibration: Mapping[str, Any] | None) -> str:
    """Return the expected duration of the remaining run: from calibration, earlier steps, or a slice of a step."""
    if calibration and not progress.step:
        tried = {one["name"]: one["seconds"] for one in calibration["tried"]}
        seconds = tried[calibration["chosen"]]
    elif progress.step:
        seconds = progress.seconds / progress.step
    else:
        seconds = distributed.broadcast_object(step_seconds(built))
    return expectation(built, seconds, progress.step)


def _within(
    built: RunComponents, split: EvaluationSplit | None, progress: TrainState, calibration: Mapping[str, Any] | None
) -> tuple[EvaluationSplit | None, Pace, int]:
    """Return the evaluation data of a run with a budget, its pace, and the number of images to compare at the end.

    The duration of all this is measured in advance; the encoder before training is also evaluated.
    """
    budget = built.recipe.budget or 0.0
    left = max(1.0, budget - progress.wall)
    began = time.perf_counter()
    if split is not None:
        split = limited(split, *progress.judged[:2]) if progress.judged else affordable(built, split, JUDGED * left)
    make_online_evaluator(built, split)()
    looks = time.perf_counter() - began
    images, compared = images_within(built, JUDGED * left, *progress.judged[2:])
    progress.judged = [*((len(split.bank), len(split.queries)) if split else (0, 0)), images]
    until = built.recipe.grow_until
    costs = [(until, calibration["small"])] if calibration and until else growth(built)
    return split, Pace(budget, 3.0 * looks + compared + 0.01 * left + 2.0, costs), images


def _signature(built: RunComponents) -> str:
    """Return a signature of the training images: another number, name, order or label changes the permutation."""
    source = built.loader.source
    return f"{len(source):,} images {source.signature()}"


def _ranks(out: Path) -> str:
    """Return the number of ranks of a resumed run as text, if there are or were several."""
    now, path = distributed.world(), out / "run.json"
    before = json.loads(path.read_text()).get("world", now) if path.exists() else now
    changed = f" ({before} before: the same images at every step, equal to rounding)" if before != now else ""
    return f" on {now} rank{'s' * (now > 1)}{changed}" if changed or now > 1 else ""


def _same_data(then: str, now: str) -> None:
    if then != now:
        raise DataError(
            f"the images have changed since the run began ({then[:-56]}... then, {now[:-56]}... now): names, number or "
            "labels. Restore them, or start a new run from the weights of this one: --init RUN"
        )


def _epochs(
    built: RunComponents, progress: TrainState, parts: dict[str, Any], log: Log, stopping: Stopping,
    split: EvaluationSplit | None, out: Path, stop_on_collapse: bool, compared: Comparison | None, keeper: Keeper,
    threads: Threads,
) -> None:  # fmt: skip
    """Run every epoch from `progress.step` on."""
    recipe, steps, main = built.recipe, built.loader.steps, distributed.rank() == 0
    look = make_online_evaluator(built, split)
    source = built.loader.source
    few = torch.linspace(0, len(source) - 1, min(256, len(source))).long()
    watched = Subset(source, few, "watched for collapse")
    told = report_unreadable(built, out, log, 0)

    def end(epoch: int) -> None:
        """Check the features after this many epochs, the last one possibly incomplete, and save."""
        nonlocal told
        before = set(progress.collapsed)
        check_collapse(built, watched, progress, epoch, log)
        told = report_unreadable(built, out, log, told)
        stays = distributed.broadcast_object(sorted(before & progress.collapsed.keys())) if stop_on_collapse else []
        best, last = False, progress.step >= built.total
        if epoch % recipe.evaluate_every == 0 or last:
            best = look_at(epoch)
        stopping.stop.hold()
        progress.ended = progress.step // steps
        if best or epoch % recipe.checkpoint_every == 0 or last or stays:
            _save(parts, progress, out, best)
            keeper.saved()
        if stays:
            raise TrainingError(
                f"stopped at epoch {epoch} of {recipe.epochs}: {' and '.join(stays)} collapsed and did not recover by "
                f"the next look; a checkpoint is saved, curves are in {out / 'metrics.jsonl'}"
            )
        stopping.finished()

    def look_at(epoch: int) -> bool:
        began = time.perf_counter()
        sizes: dict[str, float] = {"bank": len(split.bank), "queries": len(split.queries)} if split else {}
        log.record(progress.step, progress.cost() | sizes)
        best = evaluate_online(look, progress, epoch, log, steps)
        report_comparison(compared, out, log)
        if progress.step:
            check_leak(built, progress, epoch, log)
        keeper.look_seconds = time.perf_counter() - began
        return best

    if progress.step == 0:
        check_collapse(built, watched, progress, 0, log)
        look_at(0)
    elif progress.ended < progress.step // steps or progress.curve[-1]["step"] < progress.step == built.total:
        end(-(-progress.step // steps))  # stopped by a signal at the last step of an epoch
    keeper.start(progress.step, built.total)
    while progress.step < built.total:
        epoch, first = divmod(progress.step, steps)
        if sentence := threads.decide():
            log.note(sentence)
        began, used = time.perf_counter(), time.process_time()  # waiting for data counts, evaluation and saving do not
        if first == 0 and built.method.surveys(epoch):
            found = survey(built, epoch)
            if found:
                log.evaluation(progress.step, found)
        for batch in built.loader.epoch(epoch, start=first, stop=min(steps, built.total - epoch * steps)):
            stopping.begin()
            try:
                losses = built.step(batch, progress.step)
            except NonFiniteError as error:
                kept = capture(out, built, error)
                raise TrainingError(f"{error}. The step is kept in {kept}: inbatch replay {out}") from error
            progress.step = step = progress.step + 1
            now, cpu = time.perf_counter(), time.process_time()
            progress.seconds, began = progress.seconds + now - began, now
            progress.cpu_seconds, used = progress.cpu_seconds + cpu - used, cpu
            progress.images += recipe.batch
            progress.loss = progress.loss + losses["loss"]  # out of place: the sum moves to the loss's device
            now_so = {"lr": built.optimizer.param_groups[0]["lr"], "elapsed": progress.wall}
            log.step(step, epoch, losses | now_so, recipe.batch)
            # One collective communicates a signal on any rank, and whether rank 0 must check its clock.
            asked, due = divmod(
                distributed.all_reduce_max(2 * (stopping.stop.requested or 0) + int(main and keeper.due())), 2
            )
            if asked:
                _save(parts, progress, out, best=False)
                raise stopping.answer(asked)
            if due and _keep_time(built, keeper, progress, out, log):
                _save(parts, progress, out, best=False)
                keeper.saved()
                keeper.paused(time.perf_counter() - now)
                began, used = time.perf_counter(), time.process_time()
            stopping.finished()
            if step >= built.total:
                break
        if progress.step % steps == 0 or progress.step >= built.total:
            ended = time.perf_counter()
            end(-(-progress.step // steps))
            keeper.paused(time.perf_counter() - ended)


def _keep_time(built: RunComponents, keeper: Keeper, progress: TrainState, out: Path, log: Log) -> bool:
    """Change the length of the run if its budget requires it; return whether a checkpoint is due."""
    step, recipe = progress.step, built.recipe
    between = recipe.evaluate_every * built.loader.steps
    looks = -(-built.total // between) - step // between
    left, save_now = distributed.broadcast_object(
        keeper.check(step, built.timeline, looks) if distributed.rank() == 0 else None
    )
    if left is not None:
        built.timeline.change(step, left)
        built.recipe = replace(recipe, replans=tuple(built.timeline.changes))
        if distributed.rank() == 0:  # before the steps that follow: a resumed run repeats them
            write_json(out / "recipe.json", built.recipe.nested())
        log.length(built.total)
        if abs(built.total - keeper.said) > 0.25 * keeper.said:
            why = "longer" if built.total < keeper.said else "less time"
            log.note(
                f"Budget: steps take {why} than planned; the run now ends at step {built.total:,}, not "
                f"{keeper.said:,}, and its schedule is fitted to that."
            )
            keeper.said = built.total
    return save_now


def _save(parts: dict[str, Any], progress: TrainState, out: Path, best: bool) -> None:
    """Write a checkpoint on rank 0; an error there ends every rank."""
    problem = None
    if distributed.rank() == 0:
        try:
            state = {name: part.state_dict() for name, part in parts.items()}
            save(out / "checkpoints", state, step=progress.step, best=best)
        except InbatchError as error:
            problem = str(error)
    if problem := distributed.broadcast_object(problem):
        raise InbatchError(problem)
    progress.saved = progress.step, progress.ended


def _finish(
    built: RunComponents, progress: TrainState, split: EvaluationSplit | None, out: Path, where: dict[str, Any],
    compared: Comparison | None, extra: Mapping[str, Any], images: int,
) -> dict[str, Any]:  # fmt: skip
    """Save the encoder and heads, evaluate by every protocol, draw the curves and write the result."""
    save_encoder(built.encoder, out / "encoder")
    save_heads(built, out / "heads")
    plot_curves(out / "metrics.jsonl", out / "curves.png", compared)
    result = {
        "command": built.recipe.command(),
        "recipe": built.recipe.nested(),
        "context": built.context,
        "world": distributed.world(),
        "precision": str(built.network.precision).removeprefix("torch."),
        "environment": where,
        "images": len(built.source),
        "unreadable": len(built.loader.unreadable()),
        "steps": built.total,
        "threads": progress.threads,
        "training_seconds": progress.seconds,
        "training_cpu_seconds": progress.cpu_seconds,
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(built.loader.device),
        "curve": progress.curve,
        "compared": compared and compared.json(),
        "collapsed": list(progress.collapsed.values()),
        "leak": progress.leak or None,
        "held_out": split and split.description,
        "evaluation": None if split is None else evaluation(built, split, out),
    }
    result |= worth(built, split, out, images) | dict(extra)
    result["wall_seconds"] = progress.wall
    write_json(out / "result.json", result)
    return result
