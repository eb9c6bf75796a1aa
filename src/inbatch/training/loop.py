"""The training loop: epochs, online evaluation, checkpoints, and the files written at the end."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data import Subset
from inbatch.errors import InbatchError, TrainingError, Unwritten
from inbatch.models import save_encoder
from inbatch.nn.cpu_matmul import fast_products
from inbatch.runtime import distributed
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import peak_memory
from inbatch.runtime.signals import stop_on_signals
from inbatch.runtime.threads import Threads
from inbatch.training.budget import Keeper, Pace, duration
from inbatch.training.build import RunComponents
from inbatch.training.checkpoint import Checkpoint, load, restore, save, set_aside
from inbatch.training.checkpoint_recipe import EARLIER, check_recipe
from inbatch.training.data_places import check_same_images, images_signature
from inbatch.training.head_evaluation import save_heads
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.judgement import IMAGES, compare_with_initial, images_within
from inbatch.training.machine import machine, record
from inbatch.training.metric_logger import Log, spent
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.online_evaluation import (
    affordable,
    check_collapse,
    check_leak,
    choose_online_subsets,
    evaluation,
    evaluation_epochs,
    limited,
    make_online_evaluator,
    record_online,
    report_comparison,
    survey,
)
from inbatch.training.monitors.reference import Reference
from inbatch.training.replay import capture
from inbatch.training.side_files import report_of
from inbatch.training.status import Report, report_unreadable
from inbatch.training.step import NonFiniteError
from inbatch.training.stopping import Stopping
from inbatch.training.summary import describe
from inbatch.training.timing import expectation, growth, step_seconds
from inbatch.training.trackers.followers import Followers
from inbatch.training.trackers.selection import Selection, select
from inbatch.training.train_state import EvaluationSizes, TrainState

JUDGED = 0.03
"""Share of a budget that embedding the images of one evaluation may take."""
SAVE_EVERY = 600.0
"""Seconds between two checkpoints within an epoch without a budget; with a budget, a twentieth of it."""


def train(
    built: RunComponents, out: Path, split: EvaluationSplit | None, *, resume: bool, quiet: bool,
    notes: Sequence[str] = (), stop_on_collapse: bool = False, reference: Reference | None = None,
    began: float | None = None, calibration: Mapping[str, Any] | None = None, track: tuple[str, ...] | None = None,
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
        track: Requested trackers, as for `trackers.selection.select`.

    Raises:
        Preempted: After a request to terminate.
        Interrupted: After an interrupt from the keyboard.
        TrainingError: If the loss or the gradient is not finite (the step is kept, see `replay.capture`), or if the run
            stops on collapse.
    """
    progress, main = TrainState(began=time.perf_counter() if began is None else began), distributed.rank() == 0
    parts, data = built.parts() | {"progress": progress}, images_signature(built.loader.source)
    saved = None
    if resume:
        saved = _restore(built, parts, progress, out, data)
        where_from = f"Resuming from step {progress.step:,} of {built.total:,}{_ranks(saved, out)}."
        notes = [*notes, saved.note or where_from, *(() if saved.run else (EARLIER,))]
    else:
        progress.calibration = dict(calibration) if calibration else None
    distributed.assert_equal_across_ranks(
        {"checkpoint": f"step {progress.step}", "images that can be read": data, "context": built.context}
    )
    if saved is not None and main:  # every rank has read it
        set_aside(saved)
    progress.data = data
    epochs = evaluation_epochs(built.recipe)
    compared = Comparison(reference.over(epochs), progress.curve, epochs, built.loader.steps) if reference else None

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
                        plan = _plan_evaluations(built, split, progress)
                        followers.start(progress.step, log.note)  # now: the steps before were timed
                        _Loop(
                            built, progress, parts, out, log, followers, stopping, plan.keeper(progress), threads,
                            compared, plan.online, stop_on_collapse,
                        ).run()  # fmt: skip
                    stop.release()  # everything is saved
                    result = distributed.broadcast_object(
                        _finish(built, progress, plan, out, where, compared) if main else None
                    )
        for sentence in _closing(built, result, compared):
            log.note(sentence)
    return result


def _log(built: RunComponents, out: Path | None, followers: Followers, progress: TrainState, quiet: bool) -> Log:
    """Return the log of a run, which writes files if `out` is not None."""
    return Log(
        out, total_steps=built.total, quiet=quiet, resume_step=progress.step,
        tensorboard=followers.selection.tensorboard, untracked=followers.untracked,
    )  # fmt: skip


def _restore(built: RunComponents, parts: dict[str, Any], progress: TrainState, out: Path, data: str) -> Checkpoint:
    """Load the last checkpoint of a run into its parts; raise DataError if the images have changed."""
    saved = load(out / "checkpoints")
    check_recipe(saved, built.recipe, out / "recipe.json")
    check_same_images(saved.state.get("progress", {}).get("data", data), data)
    restore(parts, saved.state)
    if progress.step != saved.step or progress.step > built.total or progress.ended > saved.step // built.loader.steps:
        raise InbatchError(
            f"{saved.path} does not fit this run: step {saved.step:,}, progress.step {progress.step:,} and "
            f"progress.ended {progress.ended:,} epochs, in a run of {built.total:,} steps of {built.loader.steps:,} an "
            "epoch. Restore the file, or start a new run."
        )
    progress.before = max(progress.before, spent(out / "metrics.jsonl"))  # with that of a killed process
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


@dataclass(frozen=True)
class _Evaluations:
    """What a run is evaluated on, and the pace that leaves time for it.

    Attributes:
        online: Images of the online evaluation; None without labels.
        final: Images of the evaluation at the end; None without labels.
        compared: Number of images on which the encoder is compared with the one before training.
        pace: Pace of a run with a budget, on rank 0.
    """

    online: EvaluationSplit | None
    final: EvaluationSplit | None
    compared: int = IMAGES
    pace: Pace | None = None

    def keeper(self, progress: TrainState) -> Keeper:
        """Return the monitor of the run's clock."""
        return Keeper(self.pace, lambda: progress.wall, SAVE_EVERY if self.pace is None else self.pace.seconds / 20)


def _plan_evaluations(built: RunComponents, split: EvaluationSplit | None, progress: TrainState) -> _Evaluations:
    """Return the images of the online and the final evaluation on rank 0, which evaluates."""
    if distributed.rank():
        return _Evaluations(split, split)
    plan = _Evaluations(split, split) if built.recipe.budget is None else _within_budget(built, split, progress)
    if plan.final is None:
        return plan
    online, final = choose_online_subsets(built, plan.final)
    return replace(plan, online=online, final=final)


def _within_budget(built: RunComponents, split: EvaluationSplit | None, progress: TrainState) -> _Evaluations:
    """Return the evaluations of a run with a budget, as large as a share of it allows.

    The duration of all this is measured in advance; the encoder before training is also evaluated.
    """
    budget, calibration, sizes = built.recipe.budget or 0.0, progress.calibration, progress.sizes
    left = max(1.0, budget - progress.wall)
    began = time.perf_counter()
    if split is not None:
        split = limited(split, sizes.bank, sizes.queries) if sizes else affordable(built, split, JUDGED * left)
    make_online_evaluator(built, split)()
    seconds = time.perf_counter() - began
    images, comparison = images_within(built, JUDGED * left, sizes.compared if sizes else None)
    progress.sizes = EvaluationSizes(len(split.bank) if split else 0, len(split.queries) if split else 0, images)
    until = built.recipe.grow_until
    costs = [(until, calibration["small"])] if calibration and until else growth(built)
    return _Evaluations(split, split, images, Pace(budget, 3.0 * seconds + comparison + 0.01 * left + 2.0, costs))


def _ranks(saved: Checkpoint, out: Path) -> str:
    """Return the number of ranks of a resumed run as text, if there are or were several."""
    now = distributed.world()
    before = (saved.run or report_of(out)).get("world", now)
    changed = f" ({before} before: the same images at every step, equal to rounding)" if before != now else ""
    return f" on {now} rank{'s' * (now > 1)}{changed}" if changed or now > 1 else ""


@dataclass
class _Loop:
    """The epochs of a run.

    Attributes:
        built: The run.
        progress: Its training state.
        parts: All components with state to checkpoint, including `progress`.
        out: Run directory.
        log: Log of the run.
        followers: Processes of its trackers.
        stopping: Answers signals.
        keeper: Monitor of the run's clock.
        threads: Number of threads, chosen again for every epoch.
        compared: Comparison with a reference; None without one.
        split: Images of the online evaluation; None without labels.
        stop_on_collapse: Stop if outputs are collapsed at two successive evaluations.
        unreadable: Number of unreadable images already reported.
    """

    built: RunComponents
    progress: TrainState
    parts: dict[str, Any]
    out: Path
    log: Log
    followers: Followers
    stopping: Stopping
    keeper: Keeper
    threads: Threads
    compared: Comparison | None
    split: EvaluationSplit | None
    stop_on_collapse: bool
    unreadable: int = 0

    def __post_init__(self) -> None:
        source = self.built.loader.source
        spaced = torch.linspace(0, len(source) - 1, min(256, len(source))).long()
        self.watched = Subset(source, spaced, "watched for collapse")
        self.evaluator = make_online_evaluator(self.built, self.split)

    def run(self) -> None:
        """Train from the current step to the last, and evaluate on the way."""
        built, progress, steps = self.built, self.progress, self.built.loader.steps
        self.unreadable = report_unreadable(built, self.out, self.log, self.unreadable)
        if progress.step == 0:
            check_collapse(built, self.watched, progress, 0, self.log)
            self.evaluate(0)
        elif progress.ended < progress.step // steps or progress.curve[-1]["step"] < progress.step == built.total:
            self.end_epoch()  # stopped by a signal at the last step of an epoch
        self.keeper.start(progress.step, built.total)
        while progress.step < built.total:
            if sentence := self.threads.decide():
                self.log.note(sentence)
            self.train_epoch()
            if progress.step % steps == 0 or progress.step >= built.total:
                ended = time.perf_counter()
                self.end_epoch()
                self.keeper.paused(time.perf_counter() - ended)

    def train_epoch(self) -> None:
        """Do the remaining steps of the current epoch."""
        built, progress, steps = self.built, self.progress, self.built.loader.steps
        epoch, first = divmod(progress.step, steps)
        began, used = time.perf_counter(), time.process_time()  # waiting for data counts, evaluation and saving do not
        if first == 0 and built.method.surveys(epoch) and (values := survey(built, epoch)):
            self.log.evaluation(progress.step, values)
        for batch in built.loader.epoch(epoch, start=first, stop=min(steps, built.total - epoch * steps)):
            self.stopping.begin()
            losses = self.train_step(batch)
            progress.step += 1
            now, cpu = time.perf_counter(), time.process_time()
            progress.seconds, began = progress.seconds + now - began, now
            progress.cpu_seconds, used = progress.cpu_seconds + cpu - used, cpu
            progress.images += built.recipe.batch_size
            progress.loss = progress.loss + losses["loss"]  # out of place: the sum moves to the loss's device
            state = {"lr": built.optimizer.param_groups[0]["lr"], "elapsed": progress.wall}
            self.log.step(progress.step, epoch, losses | state, built.recipe.batch_size)
            if self.answer_and_keep_time():
                self.save(best=False)
                self.keeper.paused(time.perf_counter() - now)
                began, used = time.perf_counter(), time.process_time()
            self.stopping.finished()
            if progress.step >= built.total:
                break

    def train_step(self, batch: Batch) -> dict[str, Tensor | float]:
        """Do one step; raise TrainingError, and keep the step, if the loss or the gradient is not finite."""
        try:
            return self.built.step(batch, self.progress.step)
        except NonFiniteError as error:
            kept = capture(self.out, self.built, error)
            raise TrainingError(f"{error}. The step is kept in {kept}: inbatch replay {self.out}") from error

    def answer_and_keep_time(self) -> bool:
        """Raise Preempted or Interrupted if any rank got a signal; return whether a checkpoint is due."""
        due = distributed.rank() == 0 and self.keeper.due()
        # One collective communicates a signal on any rank, and whether rank 0 must check its clock.
        signal, check = divmod(distributed.all_reduce_max(2 * (self.stopping.stop.requested or 0) + int(due)), 2)
        if signal:
            self.save(best=False)
            raise self.stopping.answer(signal)
        return bool(check) and self.keep_time()

    def end_epoch(self) -> None:
        """Check the features after an epoch, the last one possibly incomplete, and save."""
        built, progress, recipe = self.built, self.progress, self.built.recipe
        epoch = -(-progress.step // built.loader.steps)
        before = set(progress.collapsed)
        check_collapse(built, self.watched, progress, epoch, self.log)
        self.unreadable = report_unreadable(built, self.out, self.log, self.unreadable)
        stays: list[str] = []
        if self.stop_on_collapse:
            stays = distributed.broadcast_object(sorted(before & progress.collapsed.keys()))
        best, last = False, progress.step >= built.total
        if epoch % recipe.evaluate_every == 0 or last:
            best = self.evaluate(epoch)
        self.stopping.stop.hold()
        progress.ended = progress.step // built.loader.steps
        if best or epoch % recipe.checkpoint_every == 0 or last or stays:
            self.save(best)
        if stays:
            raise TrainingError(
                f"stopped at epoch {epoch} of {recipe.epochs}: {' and '.join(stays)} collapsed and did not recover by "
                f"the next evaluation; a checkpoint is saved, curves are in {self.out / 'metrics.jsonl'}"
            )
        self.stopping.finished()

    def evaluate(self, epoch: int) -> bool:
        """Evaluate the features, and compare them with the reference; return whether they are the best so far."""
        built, progress, split = self.built, self.progress, self.split
        began = time.perf_counter()
        self.followers.check()
        sizes: dict[str, float] = {"bank": len(split.bank), "queries": len(split.queries)} if split else {}
        self.log.record(progress.step, progress.cost() | sizes)
        figures = self.stopping.on_rank_0(self.evaluator)
        best = record_online(figures, progress, epoch, self.log, built.loader.steps)
        report_comparison(self.compared, self.out, self.log)
        if progress.step:
            check_leak(built, progress, epoch, self.log)
        self.keeper.evaluation_seconds = time.perf_counter() - began
        return best

    def keep_time(self) -> bool:
        """Change the length of the run if its budget requires it; return whether a checkpoint is due."""
        built, keeper, step, recipe = self.built, self.keeper, self.progress.step, self.built.recipe
        between = recipe.evaluate_every * built.loader.steps
        evaluations = -(-built.total // between) - step // between
        left, save_now = distributed.broadcast_object(
            keeper.check(step, built.timeline, evaluations) if distributed.rank() == 0 else None
        )
        if left is not None:
            built.timeline.change(step, left)
            built.recipe = replace(recipe, replans=tuple(built.timeline.changes))
            if distributed.rank() == 0:  # before the steps that follow: a resumed run repeats them
                write_json(self.out / "recipe.json", built.recipe.nested())
            self.log.length(built.total)
            if abs(built.total - keeper.reported_total) > 0.25 * keeper.reported_total:
                why = "longer" if built.total < keeper.reported_total else "less time"
                self.log.note(
                    f"Budget: steps take {why} than planned; the run now ends at step {built.total:,}, not "
                    f"{keeper.reported_total:,}, and its schedule is fitted to that."
                )
                keeper.reported_total = built.total
        return save_now

    def save(self, best: bool) -> None:
        """Write a checkpoint on rank 0; an error there ends every rank."""
        progress, problem = self.progress, None
        if distributed.rank() == 0:
            try:
                state = {name: part.state_dict() for name, part in self.parts.items()}
                save(self.out / "checkpoints", state, step=progress.step, best=best, run=self.built.facts())
            except InbatchError as error:
                problem = str(error)
        if problem := distributed.broadcast_object(problem):
            raise InbatchError(problem)
        progress.saved = progress.step, progress.ended
        self.keeper.saved()


def _finish(
    built: RunComponents, progress: TrainState, plan: _Evaluations, out: Path, where: dict[str, Any],
    compared: Comparison | None,
) -> dict[str, Any]:  # fmt: skip
    """Save the encoder and heads, evaluate by every protocol, draw the curves and write the result."""
    split = plan.final
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
        "earlier_environments": progress.machines[:-1],
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
    if built.source.label_note:
        result["label_note"] = built.source.label_note
    result |= compare_with_initial(built, split, out, plan.compared)
    if progress.calibration:
        result["calibration"] = progress.calibration
    result["wall_seconds"] = progress.wall
    try:
        write_json(out / "result.json", result)
    except InbatchError as error:
        raise Unwritten(str(error), {"run": str(out)} | result) from error
    return result
