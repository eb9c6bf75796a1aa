"""Run the missing cells of a table, one process per run; interrupted runs are resumed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from inbatch.apps.papers.expected_time import expected_time
from inbatch.apps.papers.results import Record, find_record, read_records, shipped, write_record
from inbatch.apps.papers.run_records import counted_record, failed_record, record_of, without_paths
from inbatch.apps.papers.scales import WHERE
from inbatch.apps.papers.spec import Cell
from inbatch.errors import ConfigError, DataError, InbatchError, Preempted, TrainingError
from inbatch.runtime import child_processes
from inbatch.runtime.files import locked, read_json, write_json
from inbatch.runtime.resources import cores
from inbatch.runtime.signals import stop_on_signals, stopped

PRECISIONS = {"auto": None, "float32": "float32", "bf16": "bfloat16"}
"""Precision of runs -> name of it in results."""
ON = "on-"
"""Prefix of protocols that are a linear probe on the images of another data set."""
Notify = Callable[[str], None]
Show = Callable[[float, int, str, str], None]
_POLL, _REPORT = 0.3, 60.0  # seconds


@dataclass
class Runner:
    """Run cells of a table.

    Attributes:
        results: Folder of the records.
        work: Folder of the runs, kept for resuming.
        places: Name of a data set -> location of its images.
        jobs: Number of concurrent runs; None: one per core, on a GPU one.
        device: Name of the device, or "auto".
        precision: Precision of the runs, "float32" or "bf16"; a result in the other one is missing. "auto": that of the
            machine, and results in any precision are used.
        download: Download missing torchvision data sets.
        retry_failed: Repeat failed runs.
        notify: Receives sentences for the user.
        show: Displays progress: completed and total runs as text, and the remaining time. Without it, progress is
            reported by `notify` every minute.
    """

    results: Path
    work: Path
    places: Mapping[str, str] = field(default_factory=dict)
    jobs: int | None = None
    device: str = "auto"
    precision: str = "auto"
    download: bool = False
    retry_failed: bool = False
    notify: Notify = print
    show: Show | None = None

    def __post_init__(self) -> None:
        self.gpu = self.device not in ("auto", "cpu") or (self.device == "auto" and torch.cuda.is_available())
        self.jobs = self.jobs or (1 if self.gpu else cores())
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells without a record, each once, with every protocol that any of them requires."""
        known = read_records(self.results)
        lacking: dict[str, Cell] = {}
        for cell in cells:
            record = find_record(known, cell)
            if record is None or (self.retry_failed and record.failures) or not self._precise(record.precision):
                first = lacking.setdefault(cell.stem, cell)
                lacking[cell.stem] = replace(first, protocols=tuple(dict.fromkeys((*first.protocols, *cell.protocols))))
        return list(lacking.values())

    def _precise(self, name: str | None) -> bool:
        """Return whether a result of this precision is what was asked for; counted crops and failed runs have none."""
        return self.precision == "auto" or name in (None, PRECISIONS[self.precision])

    def collect(self, cells: Sequence[Cell]) -> None:
        """Store the results of runs that were made elsewhere and are finished in the work folder."""
        for cell in self.missing(cells):
            if not cell.counts and _read_result(self.work / cell.stem) is not None:
                write_record(self.results, cell, self._run_cell(cell))  # trains nothing, but runs missing evaluations

    def launch(self, cells: Sequence[Cell]) -> Iterator[str]:
        """Yield launcher commands for the missing cells; each resumes a stopped run."""
        for cell in self.missing(cells):
            if cell.counts:
                yield cell.command()
                continue
            name, folder = str(cell.settings["data"]), shlex.quote(str(self.work / cell.stem))
            place = shlex.quote(self.places.get(name, "PATH"))
            words = cell.command().replace(f"--data {name}", f"--data {place}", 1)
            words += "" if self.precision == "auto" else f" --precision {self.precision}"
            yield f"torchrun --nproc-per-node gpu -m {words} --out {folder} --resume auto"

    def place(self, name: str) -> str:
        """Return the location of a data set's images; raise DataError if it has no default."""
        place = self.places.get(name, WHERE.get(name, name))
        if place is None:
            raise DataError(f"the images of {name} have no default path: pass --data {name}=PATH")
        return place

    def run(self, cells: Sequence[Cell]) -> dict[str, InbatchError]:
        """Run the missing cells; return the errors of cells that could not be run, by name.

        Raises:
            Preempted: After a request to terminate, when the running processes have saved their state.
            Interrupted: The same after an interrupt from the keyboard.
        """
        todo, began = self.missing(cells), time.perf_counter()
        problems: dict[str, InbatchError] = {}
        if not todo:
            return problems
        self.results.mkdir(parents=True, exist_ok=True)
        known = [*read_records(shipped()).values(), *read_records(self.results).values()]
        if expected := expected_time(todo, known, self.jobs or 1):
            self.notify(expected)
        with locked(self.work) as stale, stop_on_signals() as stop, ThreadPoolExecutor(self.jobs) as pool:
            stop.hold()  # the running processes stop in time, and are waited for
            if stale:
                self.notify(stale)
            waiting: dict[Future[Record], Cell] = {
                pool.submit(copy_context().run, self._run_cell, cell): cell
                for cell in todo  # own parts are in the context
            }
            reported, done, kept = began, 0, 0
            while waiting:
                ended, _ = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell = waiting.pop(future)
                    try:
                        record = future.result()
                    except InbatchError as error:
                        problems[cell.stem] = error
                        outcome = f"not run: {error}"
                    else:
                        write_record(self.results, cell, record)
                        outcome, kept = _outcome(record), kept + 1
                    done += 1
                    self.notify(f"[{done}/{len(todo)}] {cell.row}, {cell.data}, seed {cell.seed}: {outcome}")
                if stop.requested and not self._stopping:
                    self._stop(stop.requested)
                    for future in list(waiting):
                        future.cancel()
                    waiting = {future: cell for future, cell in waiting.items() if not future.cancelled()}
                if time.perf_counter() - reported > (1.0 if self.show else _REPORT):
                    reported = time.perf_counter()
                    self._report(began, done, len(todo))
        if stop.requested:
            raise stopped(stop.requested, f"with {kept} of {len(todo)} runs done; run the same command to continue")
        return problems

    def _report(self, began: float, done: int, total: int) -> None:
        """Report progress and the remaining time, estimated from all runs so far."""
        share = done + sum(_progress(self.work / stem) for stem in list(self._children))
        left = (time.perf_counter() - began) * (total - share) / share if 0 < share < total else None
        ready, words = f"{done} of {total} runs", "" if left is None else f"about {timedelta(seconds=round(left))} left"
        if self.show is not None:
            self.show(share, total, ready, words)
        else:
            self.notify(", ".join([f"{ready} done", *([words] if words else [])]))

    def _stop(self, number: int) -> None:
        """Ask the running processes to save their state and stop."""
        self._stopping = True
        for child in list(self._children.values()):
            with suppress(ProcessLookupError):
                interrupt = number == signal.SIGINT and os.name == "posix"  # Windows sends a child no SIGINT
                child.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)

    def _run_cell(self, cell: Cell) -> Record:
        """Complete a cell's run, or the missing part of it."""
        if cell.counts:
            return counted_record(cell)
        began, place = time.perf_counter(), self.place(str(cell.settings["data"]))
        folder, log = self.work / cell.stem, self.work / f"{cell.stem}.log"
        folder.parent.mkdir(parents=True, exist_ok=True)
        result = _read_result(folder)
        if result is not None and not self._precise(result.get("precision")):
            raise ConfigError(
                f"the run {cell.stem} in {self.work} is of precision {result['precision']}: choose another --work-dir, "
                "or remove the run"
            )
        if result is None:
            settings = {"data": place} | ({} if self.precision == "auto" else {"precision": self.precision})
            write_json(recipe := self.work / f"{cell.stem}.json", cell.recipe().nested() | settings)
            words = ["pretrain", "--config", str(recipe), "--out", str(folder), "--resume", "auto", "--quiet"]
            result = self._call(cell, [*words, *(["--download"] if self.download else [])], log)
        if "exit_code" in result:
            return failed_record(cell, place, result, log, time.perf_counter() - began, self.gpu)
        result = self._complete_result(cell, result, log)
        for protocol in cell.protocols:
            other = protocol.removeprefix(ON) if protocol.startswith(ON) else None
            words = ["evaluate", str(folder), "--out", str(folder / f"{protocol}.json")]
            words += (
                ["--protocol", protocol] if other is None else ["--protocol", "linear", "--data", self.place(other)]
            )
            output = self._call(cell, words, log)
            if "exit_code" in output:  # the run is valid: its data are evaluated by the other protocols
                figures = {"failed": without_paths(output["error"])}
            else:
                figures = output[protocol] if other is None else {"linear": output["linear"]}
            result["evaluation"] = result["evaluation"] | {protocol: figures}
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record_of(cell, place, result)

    def _complete_result(self, cell: Cell, result: dict[str, Any], log: Path) -> dict[str, Any]:
        """Return the result of a finished run with everything that its record needs; for subclasses."""
        return result

    def _call(self, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
        """Return the JSON object of an inbatch command; it has an "exit_code" if the run diverged.

        Raises:
            ConfigError: If its settings are invalid on this machine.
            DataError: If the images are missing or invalid.
            InbatchError: If the process was stopped or crashed.
        """
        if self._stopping:
            raise Preempted("stopped")
        threads = {} if self.gpu else {"OMP_NUM_THREADS": str(max(1, cores() // (self.jobs or 1)))}
        words = [sys.executable, "-m", "inbatch", *words, "--json", "--device", self.device]
        with open(log, "a", encoding="utf-8") as file:
            child = child_processes.start(
                words, stdout=subprocess.PIPE, stderr=file, env=threads | os.environ,
                start_new_session=True,  # this process forwards a Ctrl-C
            )  # fmt: skip
            self._children[cell.stem] = child
            if self._stopping:  # requested while the process was started
                child.send_signal(signal.SIGTERM)
            try:
                out, _ = child.communicate()
            finally:
                del self._children[cell.stem]
        with suppress(ValueError):
            output: dict[str, Any] = json.loads(out)
            if child.returncode == TrainingError.exit_code:
                return output
            for kind in (ConfigError, DataError):
                if child.returncode == kind.exit_code:
                    raise kind(output["error"])
            if child.returncode == 0:
                return output
            raise InbatchError(f"{output['error']} (exit code {child.returncode}, log {log})")
        raise InbatchError(f"it ended with exit code {child.returncode}, log {log}")


def _outcome(record: Record) -> str:
    if record.failure is not None:
        return f"failed: {record.failure.sentence}"
    evaluation = record.evaluation or {}
    figures = [
        f"{name} {evaluation[part]['top1']:.1%}"
        for name, part in (("linear", "linear"), ("k-NN", "knn"))
        if part in evaluation
    ]
    return ", ".join([*figures, f"{record.wall_seconds:.0f} s"])


def _progress(folder: Path) -> float:
    """Return the completed share of a run, from its log."""
    try:
        steps = json.loads((folder / "run.json").read_bytes())["steps"]
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            last = file.read().splitlines()[-1]
        return float(min(1.0, json.loads(last)["step"] / steps))
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):  # only drawn
        return 0.0


def _read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a run, made here or elsewhere; None if there is none."""
    try:
        return read_json(folder / "result.json")
    except DataError:
        return None
