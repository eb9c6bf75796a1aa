"""The loop: epochs, evaluation on the way, checkpoints, and what is written when it ends."""

import contextlib
import json
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inbatch import ranks
from inbatch.assign import HeadRows, judge_head, save_heads
from inbatch.build import Built
from inbatch.capture import FOLDER, capture
from inbatch.checkpoint import load, restore, save, set_aside
from inbatch.data import Subset, lost_workers
from inbatch.describe import describe
from inbatch.encoders import save_encoder
from inbatch.environment import environment
from inbatch.errors import DataError, InbatchError, Interrupted, Preempted, RankError, TrainingError
from inbatch.evaluate import embed, evaluate, feature_std, keep, knn, rankme, readable
from inbatch.files import out_of_room, replacing, write_json
from inbatch.inspect.collapse import SETTLED, signs, spread
from inbatch.inspect.curves import plot_curves
from inbatch.inspect.leak import leak, meets, sign
from inbatch.log import Log
from inbatch.products import fast_products
from inbatch.signals import Stop, end_on_signals, stop_on_signals
from inbatch.step import NotFinite

Judge = Callable[[], dict[str, float]]


@dataclass
class Progress:
    """What a run remembers besides its parts, saved with every checkpoint; nothing here decides what is learned.

    step: steps that are done. ended: epochs after which the features have been looked at.
    seconds, images: of training alone. before: seconds of wall time before this process.
    most: how different outputs have been at best. collapsed: what no longer is, in sentences.
    leak: how well an embedding told its context group at the last look.
    data: how many images it learns from, and the signature of their names and labels.
    """

    step: int = 0
    ended: int = 0
    best: float = -math.inf
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0
    before: float = 0.0
    most: dict[str, float] = field(default_factory=dict)
    collapsed: dict[str, str] = field(default_factory=dict)
    leak: dict[str, float] = field(default_factory=dict)
    data: str = ""
    began: float = field(default_factory=time.perf_counter)

    _KEPT = ("step", "ended", "best", "curve", "seconds", "images", "most", "collapsed", "leak", "data")

    @property
    def wall(self) -> float:
        """Seconds of wall time, everything included, over all processes that went on with the run."""
        return self.before + time.perf_counter() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._KEPT} | {"before": self.wall}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in (*self._KEPT, "before"):
            setattr(self, name, state[name])


def train(
    built: Built, out: Path, held: tuple[Any, Any, str] | None, *, resume: bool, quiet: bool,
    notes: Sequence[str] = (), stop_on_collapse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train to the end, or to a checkpoint where a signal asks for it; returns the result it wrote.

    out: the run's folder, locked by the caller. held: bank, queries and their description, from `held_out`.
    notes: sentences for the user, printed at the start.
    stop_on_collapse: end where outputs have collapsed at two looks in a row, after a checkpoint.
    Raises Preempted or Interrupted after a signal, TrainingError where the loss or gradient is not finite (that step is
    kept, see `capture`) or where it ends on collapse.
    """
    progress, main = Progress(), ranks.rank() == 0
    parts, data = built.parts() | {"progress": progress}, _signature(built)
    if resume:
        found = load(out / "checkpoints")
        _same_data(found.state.get("progress", {}).get("data", data), data)
        restore(parts, found.state)
        notes = [*notes, found.note or f"Going on from step {progress.step:,} of {built.total:,}{_ranks(out)}."]
    ranks.agree({"checkpoint": f"step {progress.step}", "images that can be read": data, "context": built.context})
    if resume and main:  # every rank has read it
        set_aside(found)
    progress.data = data

    where = environment(built.loader.device)  # as it is now: a checkout may move on while the run goes on
    report = _Report(out, built, progress, main)
    report.status("running")
    with Log(out if main else None, total_steps=built.total, quiet=quiet or not main, resume_step=progress.step) as log:
        log.note(describe(built))
        for note in notes:
            log.note(note)
        with report.verdict():
            if held is not None and main:  # looked at again and again
                held = (keep(held[0]), keep(held[1]), held[2])
            products = fast_products() if built.loader.device.type == "cpu" else contextlib.nullcontext()
            with products, contextlib.closing(built.loader):
                with stop_on_signals() as stop, report.verdict():  # torchrun ends the others when a rank has died
                    _epochs(built, progress, parts, log, stop, held, out, stop_on_collapse)
                with end_on_signals(lambda number: _stopped(number, built, progress, out)):
                    result = ranks.share(_finish(built, progress, held, out, where) if main else None)
    report.status("finished")
    return result


def _signature(built: Built) -> str:
    """Which images a run learns from: another number, name, order or label is another permutation."""
    source = built.loader.source
    return f"{len(source):,} images {source.signature()}"


def _ranks(out: Path) -> str:
    """On how many ranks a resumed run goes on, where they are several or were."""
    now, path = ranks.world(), out / "run.json"
    before = json.loads(path.read_text()).get("world", now) if path.exists() else now
    changed = f" ({before} before: the same images at every step, equal to rounding)" if before != now else ""
    return f" on {now} rank{'s' * (now > 1)}{changed}" if changed or now > 1 else ""


def _same_data(then: str, now: str) -> None:
    if then != now:
        raise DataError(
            f"the images have changed since the run began ({then[:-56]}... then, {now[:-56]}... now): names, number or "
            "labels. Put them back as they were, or begin a new run with what was learned: --init RUN/encoder"
        )


def _epochs(
    built: Built, progress: Progress, parts: dict[str, Any], log: Log, stop: Stop, held: Any, out: Path,
    stop_on_collapse: bool,
) -> None:  # fmt: skip
    """Every epoch from `progress.step` on."""
    recipe, steps = built.recipe, built.loader.steps
    judge = _judge(built, held)
    source = built.loader.source
    few = torch.linspace(0, len(source) - 1, min(256, len(source))).long()
    watched = Subset(source, few, "watched for collapse")
    told = _tell_bad(built, out, log, 0)

    def end(epoch: int) -> None:
        """Look at the features after so many epochs, and save."""
        nonlocal told
        before = set(progress.collapsed)
        _watch(built, watched, progress, epoch, log)
        told = _tell_bad(built, out, log, told)
        stays = ranks.share(sorted(before & progress.collapsed.keys())) if stop_on_collapse else []
        best = False
        if epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs:
            best = _judged(judge, progress, epoch, log)
            _guard(built, progress, epoch, log)
        progress.ended = epoch
        if best or epoch % recipe.checkpoint_every == 0 or epoch == recipe.epochs or stays:
            _save(parts, progress, out, best)
        if stays:
            raise TrainingError(
                f"stopped at epoch {epoch} of {recipe.epochs}: {' and '.join(stays)} collapsed and did not recover by "
                f"the next look; a checkpoint is saved, curves are in {out / 'metrics.jsonl'}"
            )

    if progress.step == 0:
        _watch(built, watched, progress, 0, log)
        _judged(judge, progress, 0, log)
    elif progress.ended < progress.step // steps:  # stopped by a signal at an epoch's last step
        end(progress.step // steps)
    for epoch in range(progress.step // steps, recipe.epochs):
        began = time.perf_counter()  # waiting for data counts, judging and saving do not
        if progress.step % steps == 0 and built.method.surveys(epoch):
            found = survey(built, epoch)
            if found:
                log.evaluation(progress.step, found)
        for batch in built.loader.epoch(epoch, start=progress.step % steps):
            try:
                losses = built.step(batch, progress.step)
            except NotFinite as error:
                kept = capture(out, built, error)
                raise TrainingError(f"{error}. The step is kept in {kept}: inbatch replay {out}") from error
            progress.step = step = progress.step + 1
            now = time.perf_counter()
            progress.seconds, began = progress.seconds + now - began, now
            progress.images += recipe.batch
            log.step(step, epoch, losses | {"lr": built.optimizer.param_groups[0]["lr"]}, recipe.batch)
            asked = ranks.largest(stop.requested or 0)
            if asked and step < built.total:
                _save(parts, progress, out, best=False)
                raise _stopped(asked, built, progress, out)
        end(epoch + 1)


def _stopped(number: int, built: Built, progress: Progress, out: Path) -> InbatchError:
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(
        f"stopped by {signal.Signals(number).name} at step {progress.step} of {built.total}, checkpoint saved: "
        f"inbatch pretrain --resume {out}"
    )


def _tell_bad(built: Built, out: Path, log: Log, told: int) -> int:
    """Make known on every rank which images could not be read so far, list them all, and say what is new after the
    first `told`; how many there are now."""
    loader = built.loader
    for bad in ranks.spread(lambda _: loader.bad, ranks.world()):
        loader.note(bad)
    found = loader.unreadable()
    if ranks.rank() or len(found) == told:
        return len(found)
    new = found[told:]
    with replacing(out / "bad_images.txt") as file:
        file.write("".join(f"{sentence}\n" for sentence in found).encode(errors="backslashreplace"))
    log.note(
        f"{len(new):,} images cannot be read and are left out"
        + ("" if loader.held else " (each gave its place to the image that stands there in the next batch)")
        + f": {new[0]}. All of them are in {out / 'bad_images.txt'}"
    )
    return len(found)


def _watch(built: Built, watched: Subset, progress: Progress, epoch: int, log: Log) -> None:
    """See on rank 0 how different the outputs of some images are; say when they collapse, and when no longer."""
    if ranks.rank():
        return
    images = built.encoder.prepare(readable(watched, range(len(watched))))
    now = spread(built.tower, images.to(built.loader.device))
    log.record(progress.step, now)
    progress.most = {measure: max(value, progress.most.get(measure, 0.0)) for measure, value in now.items()}
    if progress.step < SETTLED:
        return
    found = signs(now, progress.most, classes=built.method.labels)
    for measure, sentence in found.items():
        if measure not in progress.collapsed:
            log.note(f"epoch {epoch}: {sentence}")
    for measure in progress.collapsed.keys() - found:
        log.note(f"epoch {epoch}: {measure} has recovered: {now[measure]:.2g}.")
    progress.collapsed = found


def _guard(built: Built, progress: Progress, epoch: int, log: Log) -> None:
    """Where samples meet before the loss: log whether an embedding tells its group."""
    found = leak(built, epoch) if meets(built) else {}
    if found:
        progress.leak = found
        log.record(progress.step, found)
        if sentence := sign(found, built.recipe.shuffle_groups):
            log.note(f"epoch {epoch}: {sentence}")


def survey(built: Built, epoch: int) -> dict[str, float]:
    """Show the method the rows of the whole data set: clean images, in evaluation mode, each rank a share of them."""
    tower, source, world = built.target or built.tower, built.loader.source, ranks.world()
    label, n = source.labels, len(source)
    mine = torch.arange(ranks.rank(), n + -n % world, world) % n  # the same number on every rank
    seen = Subset(source, mine, "this rank's share")
    rows = {}
    for name in tower.reads:
        found = embed(HeadRows(tower, built.encoder, name), seen, workers=built.loader.workers)
        # An image that cannot be read is never learned from: its row may be any, here that of the one behind it.
        share = found.vectors[torch.searchsorted(found.index, torch.arange(len(seen))).clamp(max=len(found) - 1)]
        whole = ranks.gather(share.to(built.loader.device)[:, None], dim=1).flatten(0, 1)
        rows[name] = whole[:n].cpu()
    return built.method.survey(rows, label.cpu(), epoch, ranks.spread)


def _save(parts: dict[str, Any], progress: Progress, out: Path, best: bool) -> None:
    """Write a checkpoint from rank 0; an error there ends every rank."""
    problem = None
    if ranks.rank() == 0:
        try:
            state = {name: part.state_dict() for name, part in parts.items()}
            save(out / "checkpoints", state, step=progress.step, best=best)
        except InbatchError as error:
            problem = str(error)
    if problem := ranks.share(problem):
        raise InbatchError(problem)


def _judge(built: Built, held: Any) -> Judge:
    """Look at the features of clean images: k-NN where there are labels, and whether they collapse."""

    def look() -> dict[str, float]:
        options: dict[str, Any] = {"precision": built.tower.precision, "workers": built.loader.workers}
        if held is None:
            few = torch.arange(min(2048, len(built.loader.source)))
            watched = Subset(built.loader.source, few, "to watch the features")
            vectors = embed(built.encoder, watched, **options).vectors
            return {"feature_std": float(feature_std(vectors)), "rankme": float(rankme(vectors))}
        bank, queries = (embed(built.encoder, source, **options) for source in held[:2])
        found = {"feature_std": float(feature_std(queries.vectors)), "rankme": float(rankme(queries.vectors[:2048]))}
        bank, queries = bank.labelled(), queries.labelled()
        near = knn(bank, queries, k=min(built.recipe.k, len(bank)), device=built.loader.device)
        return {"knn": near["top1"]} | found

    return look


def _judged(judge: Judge, progress: Progress, epoch: int, log: Log) -> bool:
    """Judge the features on rank 0, remember and log it; whether they are the best so far."""
    found = ranks.share(judge() if ranks.rank() == 0 else None)
    progress.curve.append({"step": progress.step, "epoch": epoch} | found)
    log.evaluation(progress.step, found)
    best = found.get("knn", -math.inf) > progress.best
    progress.best = max(progress.best, found.get("knn", -math.inf))
    return best


def _finish(built: Built, progress: Progress, held: Any, out: Path, where: dict[str, Any]) -> dict[str, Any]:
    """Hand out the encoder, judge it by every protocol, draw the curves and write the result."""
    save_encoder(built.encoder, out / "encoder")
    save_heads(built, out / "heads")
    plot_curves(out / "metrics.jsonl", out / "curves.png")
    result = {
        "command": built.recipe.command(),
        "recipe": built.recipe.nested(),
        "context": built.context,
        "world": ranks.world(),
        "precision": str(built.tower.precision).removeprefix("torch."),
        "environment": where,
        "images": len(built.source),
        "unreadable": len(built.loader.unreadable()),
        "steps": built.total,
        "training_seconds": progress.seconds,
        "images_per_second": progress.images / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(built.loader.device),
        "curve": progress.curve,
        "collapsed": list(progress.collapsed.values()),
        "leak": progress.leak or None,
        "held_out": held and held[2],
        "evaluation": None if held is None else _evaluation(built, held, out),
    }
    result["wall_seconds"] = progress.wall
    write_json(out / "result.json", result)
    return result


def _evaluation(built: Built, held: Any, out: Path) -> dict[str, Any]:
    """The figures of every protocol, and of the head that assigns clusters where the method has one."""
    bank, queries, _ = held
    options: dict[str, Any] = {"k": built.recipe.k, "seed": built.recipe.seed, "workers": built.loader.workers}
    found = evaluate(built.encoder, bank, queries, **options)
    if built.method.assigns:
        found["head"] = judge_head(out, built.encoder, queries, workers=built.loader.workers)
    return found


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU where it trained on one, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Report:
    """run.json: whether the run goes on, ended or failed, and why."""

    def __init__(self, out: Path, built: Built, progress: Progress, main: bool) -> None:
        self.path, self.progress, self.main = out / "run.json", progress, main
        self.fixed = {"command": built.recipe.command(), "steps": built.total}
        self.fixed |= {"context": built.context, "world": ranks.world()}

    def status(self, status: str, reason: str | None = None) -> None:
        if self.main:
            (self.path.parent / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"status": status, "reason": reason, "last_step": self.progress.step} | self.fixed)

    @contextlib.contextmanager
    def verdict(self) -> Iterator[None]:
        """What ends the run in here is written down: by rank 0, or the first of those left where that is lost."""
        try:
            with ranks.shared_errors(), lost_workers(), out_of_room(self.path.parent):
                yield
        except InbatchError as error:
            self.main |= isinstance(error, RankError) and error.speaks
            kinds = {Preempted: "preempted", Interrupted: "interrupted"}
            self._ended(kinds.get(type(error), "failed"), str(error))
            raise
        except BaseException as error:
            self._ended("crashed", f"{type(error).__name__}: {error}")
            raise

    def _ended(self, status: str, reason: str) -> None:
        with contextlib.suppress(InbatchError):  # the reason itself matters more than that the disk is full
            self.status(status, reason)


def clear(out: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else."""
    for name in ("checkpoints", "encoder", "heads", "tensorboard", "inspect", FOLDER):
        shutil.rmtree(out / name, ignore_errors=True)
    files = ("recipe.json", "run.json", "metrics.jsonl", "curves.png", "result.json", "bad_images.txt")
    for name in (*files, "evaluation.json", "quickstart.json", "neighbours.png"):
        (out / name).unlink(missing_ok=True)
