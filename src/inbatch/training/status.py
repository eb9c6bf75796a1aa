"""Record the status of a run: run.json, and the list of unreadable images."""

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inbatch.data import lost_workers
from inbatch.errors import InbatchError, Interrupted, Preempted, RankError, unreadable
from inbatch.runtime import distributed
from inbatch.runtime.files import out_of_room, replacing, write_json
from inbatch.runtime.process_group import shared_errors
from inbatch.runtime.resources import launch_id
from inbatch.runtime.signals import StopRequested
from inbatch.training.build import RunComponents
from inbatch.training.data_places import save_places
from inbatch.training.metric_logger import Log
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import save_initial
from inbatch.training.side_files import FILES, FOLDERS, damaged, move_aside
from inbatch.training.teacher import save_teacher
from inbatch.training.train_state import TrainState


class Report:
    """Write run.json: whether the run is running, finished or failed, and the reason."""

    def __init__(self, out: Path, built: RunComponents, progress: TrainState, main: bool) -> None:
        self.path, self.built, self.progress, self.main = out / "run.json", built, progress, main
        self.fixed: dict[str, Any] = {"command": built.recipe.command()}
        self.fixed |= {"context": built.context, "world": distributed.world()}
        self.fixed |= {"launch": launch} if (launch := launch_id()) else {}
        self.slow: str | None = None
        self.untracked: dict[str, str] = {}  # trackers that failed, with the reason

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Write that the run is running and, after the context without an exception, that it is finished."""
        self.status("running")
        yield
        self.status("finished")

    def status(self, status: str, reason: str | None = None) -> None:
        """Write the status, its reason, and the current step to run.json."""
        if self.main:
            (self.path.parent / "checkpoints").mkdir(parents=True, exist_ok=True)
            now = {
                "status": status,
                "reason": reason,
                "last_step": self.progress.step,
                "threads": self.progress.threads,
                "steps": self.built.total,  # a budget may change the length
            }
            more = {"untracked": self.untracked, "slow_rank": self.slow}
            write_json(self.path, now | self.fixed | {name: value for name, value in more.items() if value})

    @contextlib.contextmanager
    def record_exit_status(self) -> Iterator[None]:
        """Record the reason if the run ends inside the context: on rank 0 or, without it, the first remaining rank."""
        try:
            with shared_errors(), lost_workers(), out_of_room(self.path.parent):
                yield
        except InbatchError as error:
            self.main |= isinstance(error, RankError) and error.reports_for_all
            self.ended(error)
            raise
        except StopRequested as error:
            self._ended("interrupted" if error.number == signal.SIGINT else "preempted", str(error))
            raise
        except BaseException as error:
            self._ended("crashed", f"{type(error).__name__}: {error}")
            raise

    def ended(self, error: InbatchError) -> None:
        """Record that the run ended by an expected error."""
        kinds = {Preempted: "preempted", Interrupted: "interrupted"}
        self._ended(kinds.get(type(error), "failed"), str(error))

    def _ended(self, status: str, reason: str) -> None:
        with contextlib.suppress(InbatchError):  # the reason itself matters more than a full disk
            self.status(status, reason)


def report_unreadable(built: RunComponents, out: Path, log: Log, reported: int) -> int:
    """Collect the unreadable images of all ranks, list them in a file, and report new ones; return their number.

    Remarks about images that were read, such as warnings of Pillow, are reported once.

    Args:
        built: The run.
        out: Run directory; the list is bad_images.txt.
        log: Log of the run.
        reported: Number of images already reported.
    """
    loader = built.loader
    for bad, remarks in distributed.distribute_tasks(lambda _: (loader.bad, loader.remarks), distributed.world()):
        loader.note(bad)
        loader.add_remarks(remarks)
    for sentence in loader.new_remarks():
        if not distributed.rank():
            log.note(sentence)
    sentences = loader.unreadable()
    if distributed.rank() or len(sentences) == reported:
        return len(sentences)
    new = sentences[reported:]
    with replacing(out / "bad_images.txt") as file:
        file.write("".join(f"{sentence}\n" for sentence in sentences).encode(errors="backslashreplace"))
    log.note(
        f"{unreadable(len(new))} left out"
        + ("" if loader.held else " (replaced by the images at the same positions of the next batch)")
        + f": {'; '.join(new[:3])}. All of them are in {out / 'bad_images.txt'}"
    )
    return len(sentences)


def begin_run(out: Path, built: RunComponents, here: Recipe, resumed: bool) -> list[str]:
    """Write the files of a run that it has before its first step; return sentences for the user.

    Args:
        out: Run directory, locked by the caller; a new run replaces the files of an earlier one.
        built: The run.
        here: Its recipe with the paths at which its data are now.
        resumed: Whether the run continues.
    """
    sentences = [*(damaged(out) if resumed else ()), *move_aside(out)]
    if not resumed:
        clear(out)
        write_json(out / "recipe.json", built.recipe.nested())
        save_initial(built.recipe, built.encoder, out)
        save_teacher(built.target, out)
    save_places(out, built.recipe, here)
    return sentences


def clear(out: Path) -> None:
    """Remove the files of a run from its directory, and no others."""
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
