"""Terminal output of the first process: sentences, tables and JSON."""

import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO, Any

from inbatch.runtime.text import one_line, printable


def first() -> bool:
    """Return whether this process prints, among those that a launcher has started."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not rank.isdecimal() or int(rank) == 0  # other values are refused when the process group is created


def say(*lines: str) -> None:
    """Print the lines of a result to stdout."""
    if first():
        for line in lines:
            print(one_line(line))


def warn(message: str) -> None:
    """Print a warning to stderr; the command still succeeds."""
    if first():
        with suppress(OSError):
            print("warning:", one_line(message), file=sys.stderr)


def note(message: str) -> None:
    """Print a sentence to stderr that is neither a warning nor an error."""
    if first():
        with suppress(OSError):
            print(one_line(message), file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    """Print an error to stderr."""
    origin = "" if first() else f" (rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))})"
    with suppress(OSError):  # the exit code reports the error as well
        print(f"error{origin}:", printable(message).replace("\n", "\n  "), file=sys.stderr)


def print_json(value: Any) -> None:
    """Print the JSON object of --json."""
    if first():
        from inbatch.runtime.files import to_json

        print(json.dumps(json.loads(to_json(value)), indent=2))  # ASCII can be printed with any encoding


def width(numbers: bool = False) -> int:
    """Return the width of a table in characters; in a file or a pipe only rows with sentences are wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 100_000 if numbers else 160


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """Print a table to stdout; if `numbers`, align every column except the first to the right."""
    if first():
        _draw_table(sys.stdout, width(numbers), headings, rows, numbers)


def table_text(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of numbers as text, as `print_table` prints it to a file."""
    text = io.StringIO()
    _draw_table(text, 100_000, headings, rows, True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _draw_table(
    file: IO[str], columns: int, headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, width=columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if numbers and i else "left")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)
