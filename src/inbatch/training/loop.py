"""The training loop: epochs, steps, online evaluation and checkpoints."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsFloat

from torch import Tensor

from inbatch.batch import Batch
from inbatch.data import Subset
from inbatch.errors import InbatchError, TrainingError
from inbatch.runtime import distributed
from inbatch.runtime.files import write_json
from inbatch.runtime.spacing import spaced
from inbatch.runtime.threads import Threads
from inbatch.training.budget import RunClock
from inbatch.training.build import RunComponents
from inbatch.training.callbacks import Callback, Callbacks
from inbatch.training.checkpoint import save
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.metric_logger import Log
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.online_evaluation import (
    check_collapse,
    check_leak,
    make_online_evaluator,
    record_online,
    report_comparison,
)
from inbatch.training.rates import logged_rate
from inbatch.training.replay import capture
from inbatch.training.slow_ranks import SlowRanks
from inbatch.training.status import report_unreadable
from inbatch.training.step import NonFiniteError
from inbatch.training.stopping import Stopping
from inbatch.training.survey import survey, surveyed
from inbatch.training.trackers.followers import Followers
from inbatch.training.train_state import TrainState


@dataclass
class Loop:
    """The epochs of a run.

    Attributes:
        built: The run.
        progress: Its training state.
        parts: All components with state to checkpoint, including `progress`.
        out: Run directory.
        log: Log of the run.
        followers: Processes of its trackers.
        stopping: Answers signals.
        clock: Monitor of the run's clock.
        threads: Number of threads, chosen again for every epoch.
        compared: Comparison with a reference; None without one.
        split: Images of the online evaluation; None without labels.
        stop_on_collapse: Stop if outputs are collapsed at two successive evaluations.
        callbacks: Callbacks by name.
        unreadable: Number of unreadable images already reported.
        values: Losses of the last step.
    """

    built: RunComponents
    progress: TrainState
    parts: dict[str, Any]
    out: Path
    log: Log
    followers: Followers
    stopping: Stopping
    clock: RunClock
    threads: Threads
    compared: Comparison | None
    split: EvaluationSplit | None
    stop_on_collapse: bool
    callbacks: Mapping[str, Callback]
    unreadable: int = 0
    values: Mapping[str, SupportsFloat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source = self.built.loader.source
        self.watched = Subset(source, spaced(len(source), 256), "watched for collapse")
        self.call = Callbacks(self.callbacks, self.built, self.out, self.log, lambda: self.save(best=False))
        self.slow_ranks = SlowRanks(self.built.loader.device)
        self.evaluator = make_online_evaluator(self.built, self.split)

    def run(self) -> None:
        """Train from the current step to the last, and evaluate on the way."""
        built, progress, steps = self.built, self.progress, self.built.loader.steps
        self.unreadable = report_unreadable(built, self.out, self.log, self.unreadable)
        if progress.step == 0:
            check_collapse(built, self.watched, progress, 0, self.log)
            if not progress.curve:  # else a callback failed after it
                self.evaluate(0)
            if asked := self.call("on_evaluation", 0, 0, progress.curve[-1]):
                raise TrainingError(f"a callback asked to stop before the first step ({asked})")
        else:
            built.step.resize(progress.step - 1)  # as after the last step of the interrupted run
        if progress.ended < progress.step // steps or progress.curve[-1]["step"] < progress.step == built.total:
            self.end_epoch()  # stopped by a signal at the last step of an epoch
        self.clock.start(progress.step, built.total)
        while progress.step < built.total:
            if sentence := self.threads.decide():
                self.log.note(sentence)
            self.train_epoch()
            if progress.step % steps == 0 or progress.step >= built.total:
                ended = time.perf_counter()
                self.end_epoch()
                self.clock.paused(time.perf_counter() - ended)

    def train_epoch(self) -> None:
        """Do the remaining steps of the current epoch."""
        built, progress, steps = self.built, self.progress, self.built.loader.steps
        epoch, first = divmod(progress.step, steps)
        began, used = time.perf_counter(), time.process_time()  # waiting for data counts, evaluation and saving do not
        distributed.first_exchange()  # forget that of the evaluation
        if first == 0 and surveyed(built, epoch):
            built.step.resize(progress.step)
            if values := survey(built, epoch):
                self.log.evaluation(progress.step, values)
            self.clock.survey_seconds = time.perf_counter() - began
            self.clock.paused(self.clock.survey_seconds)
        for batch in built.loader.epoch(epoch, start=first, stop=min(steps, built.total - epoch * steps)):
            self.stopping.begin()
            losses = self.train_step(batch)
            progress.step += 1
            self.slow_ranks.add(began)
            now, cpu = time.perf_counter(), time.process_time()
            progress.seconds, began = progress.seconds + now - began, now
            progress.cpu_seconds, used = progress.cpu_seconds + cpu - used, cpu
            progress.images += built.recipe.batch_size
            progress.loss = progress.loss + losses["loss"]  # out of place: the sum moves to the loss's device
            self.values = losses
            state: dict[str, Tensor | float] = {"lr": logged_rate(built.optimizer, built.lr), "elapsed": progress.wall}
            self.log.step(progress.step, epoch, losses | state, built.recipe.batch_size)
            if asked := self.call("on_step", progress.step, epoch + 1, losses | state):
                self.end_run(asked)
            if self.check_signals_and_clock():
                self.save(best=False)
                self.clock.paused(time.perf_counter() - now)
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

    def check_signals_and_clock(self) -> bool:
        """Raise Preempted or Interrupted if any rank got a signal; return whether a checkpoint is due."""
        due = distributed.rank() == 0 and self.progress.stopped is None and self.clock.due()
        # One collective communicates a signal on any rank, and whether rank 0 must check its clock.
        signal, check = divmod(distributed.all_reduce_max(2 * (self.stopping.stop.requested or 0) + int(due)), 2)
        if signal:
            self.save(best=False)
            raise self.stopping.answer(signal)
        return bool(check) and self.check_clock()

    def end_epoch(self) -> None:
        """Check the features after an epoch, the last one possibly incomplete, and save."""
        built, progress, recipe = self.built, self.progress, self.built.recipe
        epoch = -(-progress.step // built.loader.steps)
        before = set(progress.collapsed)
        check_collapse(built, self.watched, progress, epoch, self.log)
        self.unreadable = report_unreadable(built, self.out, self.log, self.unreadable)
        if sentence := self.slow_ranks.new_sentence():
            self.log.note(f"epoch {epoch}: {sentence}")
            self.stopping.report.slow = None if self.slow_ranks.slow is None else sentence
            self.stopping.report.status("running")
        stays: list[str] = []
        if self.stop_on_collapse:
            stays = distributed.broadcast_object(sorted(before & progress.collapsed.keys()))
        best, last = False, progress.step >= built.total
        evaluated = epoch % recipe.evaluate_every == 0 or last
        if evaluated and progress.curve[-1]["step"] == progress.step:  # before a callback ended the run with an error
            best = progress.curve[-1].get("knn") == progress.best
        elif evaluated:
            best = self.evaluate(epoch)
        self.stopping.stop.hold()
        asked = self.call("on_evaluation", progress.step, epoch, progress.curve[-1]) if evaluated else None
        if asked := self.call("on_epoch", progress.step, epoch, self.values) or asked:
            self.end_run(asked)
            best, last = best if evaluated else self.evaluate(epoch), True
        progress.ended = progress.step // built.loader.steps
        if best or epoch % recipe.checkpoint_every == 0 or last or stays:
            self.save(best)
        if stays:
            raise TrainingError(
                f"stopped at epoch {epoch} of {recipe.epochs}: {' and '.join(stays)} collapsed and did not recover by "
                f"the next evaluation; a checkpoint is saved, curves are in {self.out / 'metrics.jsonl'}"
            )
        self.stopping.finished()

    def end_run(self, why: str) -> None:
        """Make the current step the last one of the run, as a callback asks."""
        step, built = self.progress.step, self.built
        if step < built.total:
            self.log.note(f"Stopped at step {step:,} of {built.total:,} by {why}")
            self.progress.stopped = why
            self._set_length(step, 0)

    def evaluate(self, epoch: int) -> bool:
        """Evaluate the features, and compare them with the reference; return whether they are the best so far."""
        built, progress, split = self.built, self.progress, self.split
        began = time.perf_counter()
        self.followers.check()
        sizes: dict[str, float] = {"bank": len(split.bank), "queries": len(split.queries)} if split else {}
        self.log.record(progress.step, progress.cost() | sizes)
        with built.gathered():
            figures = self.stopping.shared(self.evaluator)
        best = record_online(figures, progress, epoch, self.log, built.loader.steps)
        report_comparison(self.compared, self.out, self.log)
        if progress.step:
            check_leak(built, progress, epoch, self.log)
        self.clock.evaluation_seconds = time.perf_counter() - began
        return best

    def check_clock(self) -> bool:
        """Change the length of the run if its budget requires it; return whether a checkpoint is due."""
        built, clock, step, recipe = self.built, self.clock, self.progress.step, self.built.recipe
        between = recipe.evaluate_every * built.loader.steps
        evaluations = -(-built.total // between) - step // between

        def surveys(more: int) -> int:
            epochs = (-(-x // built.loader.steps) for x in (step, step + more))
            return sum(surveyed(built, epoch) for epoch in range(*epochs))

        events = evaluations, built.step.frozen, surveys
        left, save_now = distributed.broadcast_object(
            clock.check(step, built.timeline, *events) if distributed.rank() == 0 else None
        )
        if left is not None:
            self._set_length(step, left)
            if abs(built.total - clock.reported_total) > 0.25 * clock.reported_total:
                why = "longer" if built.total < clock.reported_total else "less time"
                self.log.note(
                    f"Budget: steps take {why} than planned; the run now ends at step {built.total:,}, not "
                    f"{clock.reported_total:,}, and its schedule is fitted to that."
                )
                clock.reported_total = built.total
        return save_now

    def _set_length(self, step: int, left: int) -> None:
        """Set the number of steps that remain from a step on, and write it to the recipe."""
        built = self.built
        built.timeline.change(step, left)
        built.recipe = replace(built.recipe, replans=tuple(built.timeline.changes))
        if distributed.rank() == 0:  # before the steps that follow: a resumed run repeats them
            write_json(self.out / "recipe.json", built.recipe.nested())
        self.log.length(built.total)

    def save(self, best: bool) -> None:
        """Write a checkpoint on rank 0, and the shards on every rank; an error there ends every rank."""
        progress, problem = self.progress, None
        if distributed.world() > 1:  # rank 0 saves what all ranks could not read
            self.unreadable = report_unreadable(self.built, self.out, self.log, self.unreadable)
        if distributed.rank() == 0 or self.built.whole is not None:
            try:
                state = {name: part.state_dict() for name, part in self.parts.items()}
                save(self.out / "checkpoints", state, step=progress.step, best=best, run=self.built.facts())
            except InbatchError as error:
                problem = str(error)
        if problem := distributed.broadcast_object(problem):
            raise InbatchError(problem)
        progress.saved = progress.step, progress.ended
        self.clock.saved()
