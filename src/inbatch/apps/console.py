"""What people see in a terminal, from the first process only: sentences, tables, one JSON object."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from inbatch.runtime.text import one_line, printable


def first() -> bool:
    """Whether this is the process that speaks, of those that a launcher has started."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not rank.isdecimal() or int(rank) == 0  # what is no number is refused where processes meet


def say(*lines: str) -> None:
    """Lines of a result, on stdout."""
    if first():
        for line in lines:
            print(one_line(line))


def warn(message: str) -> None:
    """What a user should know of a command that succeeds, on stderr."""
    if first():
        with suppress(OSError):
            print("warning:", one_line(message), file=sys.stderr)


def complain(message: str) -> None:
    """An error, on stderr."""
    whose = "" if first() else f" (rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))})"
    with suppress(OSError):  # the exit code says it, too
        print(f"error{whose}:", printable(message).replace("\n", "\n  "), file=sys.stderr)


def print_json(value: Any) -> None:
    """The one JSON object of --json."""
    if first():
        from inbatch.runtime.files import to_json

        print(json.dumps(json.loads(to_json(value)), indent=2))  # ASCII: whatever a name is made of, it prints


def width(numbers: bool = False) -> int:
    """How many characters a line of a table may have. In a file or a pipe rows stay whole, but for sentences."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 100_000 if numbers else 160


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """A table on stdout; numbers: every column but the first is flush right."""
    if not first():
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, width=width(numbers))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if numbers and i else "left")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)
