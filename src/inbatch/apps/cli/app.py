"""The Typer application: shared options, error reporting and exit codes."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from typer import Argument, Option

from inbatch.apps.console import first, note, print_error, print_json, say, warn
from inbatch.errors import DataError, InbatchError, Interrupted, RankError, Unwritten
from inbatch.runtime import child_processes, signals, tuning
from inbatch.runtime.files import check_writable
from inbatch.runtime.paths import path_of

USUAL = {
    "--fp16": "--precision", "--fp32": "--precision", "--mixed-precision": "--precision", "--optim": "--optimizer",
    "--arch": "--encoder", "--weight-decay": "--set optimizer.weight_decay=", "--wd": "--set optimizer.weight_decay=",
    "--temperature": "--set method.temperature=", "--max-epochs": "--epochs", "--num-epochs": "--epochs",
    "--gpus": "--device", "--gpu": "--device", "--pretrained": "--init", "--momentum": "--set optimizer.momentum=",
    "--warmup": "--set schedule.warmup_epochs=", "--warmup-epochs": "--set schedule.warmup_epochs=",
    "--scheduler": "--set schedule.name=", "--lr-scheduler": "--set schedule.name=", "--bs": "--batch-size",
    "--queue-size": "--set method.queue_size=", "--root": "--data", "--data-dir": "--data", "--dataset": "--data",
    "--img-size": "--image-size", "--input-size": "--image-size", "--crop-size": "--image-size",
    "--checkpoint": "--resume", "--ckpt": "--resume", "--eval-every": "--set evaluate_every=",
    "--save-every": "--set checkpoint_every=", "--proj-dim": "--set method.out_dim=", "--wandb": "--track",
    "--log-dir": "--output-dir", "--save-dir": "--output-dir",
}  # fmt: skip
"""Options of other programs -> what to write here, if the command has that option."""


class Program(typer.core.TyperGroup):
    """The commands in the order of a project; for an option of other programs, the error names the one to use."""

    ORDER = (
        "quickstart", "data", "views", "pretrain", "adapt", "evaluate", "embed", "export", "compare", "choose", "runs",
        "explore", "search", "duplicates", "outliers", "select", "labels", "train-classifier", "predict", "methods",
        "plugins", "check-method", "inspect", "crops", "replay", "table", "bench", "doctor", "slurm",
    )  # fmt: skip

    def _place(self, name: str) -> int:
        return self.ORDER.index(name) if name in self.ORDER else len(self.ORDER)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands as the help lists them."""
        return sorted(super().list_commands(ctx), key=self._place)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or raise its usage error with a suggestion."""
        try:
            return super().invoke(ctx)
        except Exception as error:  # of typer's copy of click, or of click: both have the attribute
            if usual := usual_option(error):
                error.possibilities = [usual]  # type: ignore[attr-defined]
            raise


def usual_option(error: Exception) -> str | None:
    """Return what to write instead of an unknown option; None if the command has no such option either."""
    usual = USUAL.get(getattr(error, "option_name", None) or "", "")
    command = getattr(getattr(error, "ctx", None), "command", None)
    has = {name for parameter in getattr(command, "params", ()) for name in parameter.opts}
    return usual if usual.partition(" ")[0] in has else None


app = typer.Typer(
    cls=Program,
    name="inbatch",
    help="Self-supervised and supervised learning of image features, with interaction of the samples of a batch.",
    epilog="Start here:\n\n  inbatch quickstart\n\n  inbatch pretrain --data ~/photos\n\n"
    "  inbatch pretrain --help\n\n"
    "Exit codes: 0 success, 1 crash, 2 usage or settings, 3 data, 4 diverged or not learned, "
    "75 stopped by a signal, 130 by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the program `inbatch`."""
    child_processes.end_with_parent()  # if another inbatch command started this process
    tuning.program_begins()
    tuning.begin()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs warnings if there is no home directory
    try:
        with guard_streams(), signals.answered_in_time(_report_error, _acknowledge_signal) as stop:
            _run(stop)
    finally:
        signals.complete()


def _run(stop: signals.Stop) -> None:
    """Run the command of the command line; after a signal, end without the regular exit of Python."""
    try:
        stop.release()
        app(with_values(sys.argv[1:]))
    except (SystemExit, signals.StopRequested) as end:
        if stop.requested is None or getattr(end, "code", 1) == 0:
            raise
        error = signals.without_result(stop.requested)
        if not signals.watchdog.reported:  # before a command began
            _report_error(error)
        signals.leave(error.exit_code)


def with_values(words: list[str]) -> list[str]:
    """Return the words of a command line with the values of `--resume` and `--amp`, which may be left out."""
    values = {"--resume": "auto", "--amp": "bf16"}
    follows = [*words, "-"][1:]
    pairs = (
        [word, values[word]] if word in values and following.startswith("-") else [word]
        for word, following in zip(words, follows, strict=True)
    )
    return [word for pair in pairs for word in pair]


@contextmanager
def guard_streams() -> Iterator[None]:
    """Make the standard streams accept any character, and discard output to closed streams.

    Exits with 1 if a result could not be written, without a message if the reader has closed the pipe (`| head`).
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number, and receive what a library prints
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r+" if number == 0 else "w", closefd=False))  # noqa: SIM115
        if number:
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            raise  # an error of a file; errors of a stream have no file name
        if error.errno != errno.EPIPE:
            print_error(f"the result cannot be written to stdout: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the rest of the buffer
        sys.exit(1)
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


Json = Annotated[bool, Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
DistTimeout = Annotated[
    float, Option(metavar="SECONDS", min=1, help="Time after which a process that hangs is an error.")
]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Print only results and errors.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Set = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any setting of the recipe; repeatable.")]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="Run directory, finished or stopped.")]
KINDS = "A folder, a Parquet file, a list of paths, an .npz, torchvision/STL10, digits-canvas, ...; or several paths."
Data = Annotated[list[str], Argument(metavar="DATA...", help=KINDS)]
Features = Annotated[
    Path, Argument(metavar="RUN|FEATURES", help="A run, an encoder's folder, or a file of inbatch embed.")
]
Images = Annotated[list[str] | None, Argument(metavar="[DATA]...", help=f"{KINDS} Default: the images of the run.")]
Split = Annotated[str | None, Option(help="Only this split: train, val or test; default: all of them.")]
Index = Annotated[str, Option(metavar="exact|approximate", help="Compare with all images, or by an index.")]
ImageColumn = Annotated[
    str | None, Option("--image-column", metavar="NAME", help="Column of the images; in tar files their extension.")
]
LabelColumn = Annotated[
    str | None, Option("--label-column", metavar="NAME|none", help="Column of the labels; none: use no labels.")
]
GroupColumn = Annotated[
    str | None, Option("--group-column", metavar="NAME", help="Column of known groups, such as the video of a frame.")
]

SEEDS = 2**32 - 1
"""Largest seed; scikit-learn accepts no larger one."""


def print_version(wanted: bool) -> None:
    """Print the version and exit if it is requested."""
    if wanted:
        from importlib.metadata import version

        say(version("inbatch"))
        raise typer.Exit


COLLECTION = ("duplicates", "explore", "labels", "outliers", "search", "select")
"""Commands that need each part of their memory once: freed memory is returned to the system."""


@app.callback()
def program(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", "-V", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before a command."""
    if context.invoked_subcommand not in COLLECTION:
        tuning.keep_memory()


@contextmanager
def report_errors(as_json: bool) -> Iterator[None]:
    """Report errors as a sentence on stderr, with --json also as an object on stdout, and exit with their code."""
    message, code = "interrupted", Interrupted.exit_code
    _json_errors[0] = as_json
    try:
        yield
        return
    except signals.StopRequested as request:
        error = signals.without_result(request.number)
        message, code, every_rank = str(error), error.exit_code, False
    except KeyboardInterrupt:
        every_rank = False
    except InbatchError as error:
        message, code = str(error), error.exit_code
        every_rank = _every_rank_reports(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, compared by name to avoid its import
            raise
        message, code = f"out of GPU memory ({error}): set a smaller --context, or auto; the batch size can stay", 1
        every_rank = True
    signals.watchdog.reported = True
    if first() or every_rank:
        print_error(message)
    if as_json:
        print_json({"error": message, "exit_code": code})
    raise typer.Exit(code)


def emit_result(
    compute: Callable[[], dict[str, Any]],
    as_json: bool,
    show: Callable[[dict[str, Any]], None],
    write: Callable[[dict[str, Any]], object] = lambda result: None,
) -> None:
    """Compute a result, print it, and write it to its file, in this order.

    A result that cannot be written is printed all the same, and the command exits with the error that names the file.
    With --json, there is one object, which then also holds the error: it is printed after writing.

    Args:
        compute: Returns the result, or raises `Unwritten` with it.
        as_json: Whether --json is given.
        show: Prints the result as text.
        write: Writes the result, or the rest of it.
    """
    failure: InbatchError | None = None
    try:
        result = compute()
    except Unwritten as error:
        result, failure = error.result, error
    try:
        if not as_json:
            show(result)
            sys.stdout.flush()
    finally:  # also if nobody reads stdout
        if failure is None:
            try:
                write(result)
            except InbatchError as error:
                failure = error
    if as_json:
        print_json(result | ({} if failure is None else {"error": str(failure), "exit_code": failure.exit_code}))
    if failure is not None:
        signals.watchdog.reported = True
        print_error(str(failure))
        raise typer.Exit(failure.exit_code)


def requested_output(out: Path) -> Path:
    """Return the file to write, with `~` expanded; raise InbatchError, before any work, if it cannot be written."""
    check_writable(path := path_of(out, "--out"))
    return path


def default_output(path: Path) -> Path:
    """Return the file that a command writes in a run by default, and warn, before any work, if it cannot be written.

    The result is printed even so, and the command fails at the end.
    """
    if path.parent.is_dir():  # a missing run is another error
        try:
            check_writable(path)
        except InbatchError as error:
            warn(f"{error} The result will only be printed; --out names another place.")
    return path


def _every_rank_reports(error: InbatchError) -> bool:
    """Return whether every rank prints an error: one that all share is printed once, other ones by their rank."""
    reports = error.alone or (isinstance(error, RankError) and error.reports_for_all)
    return reports or type(error) in (InbatchError, DataError)


_json_errors = [False]
"""Whether the command also prints its errors as JSON."""


def _report_error(error: InbatchError) -> None:
    """Print the error of a process that cannot return from its command."""
    if first() or _every_rank_reports(error):
        print_error(str(error))
    if _json_errors[0]:
        print_json({"error": str(error), "exit_code": error.exit_code})


def _acknowledge_signal(number: int) -> None:
    """Report a signal whose handling takes a moment."""
    if first() and not signals.watchdog.reported:
        note(f"{signal.Signals(number).name} received: stopping")


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """Return the values of --set as settings."""
    from inbatch.training.settings_file import parse_assignment

    return {key: value for text in texts or () for key, value in parse_assignment(text).items()}
