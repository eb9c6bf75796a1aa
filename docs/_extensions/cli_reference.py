"""Write reference/cli.md from the help of the program, at every build."""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sphinx.application import Sphinx


class Parameter(NamedTuple):
    """One row of a table."""

    names: str
    value: str
    default: str
    help: str
    is_argument: bool
    required: bool


def cell(text: str) -> str:
    """Return text that fits into a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def example_lines(epilog: str) -> list[str]:
    """Return the command lines of an epilog; text after several spaces is a comment."""
    lines = [line.strip() for line in epilog.splitlines() if line.strip().startswith(("inbatch", "torchrun"))]
    return [re.sub(r"\s{2,}(?!#)", "  # ", line) for line in lines]


def type_name(hint: Any) -> str:
    """Return the type of a value as usage text writes it; "" for a flag."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    kinds = list(typing.get_args(kinds[0])) or kinds  # list[str] | None
    names = {bool: "", int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    return names.get(kinds[0], kinds[0].__name__.upper())


def parameters(callback: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the arguments and options of the function behind a command."""
    hints = typing.get_type_hints(callback, include_extras=True)
    for name, p in inspect.signature(callback).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        is_argument = type(info).__name__ == "ArgumentInfo"
        required = p.default is inspect.Parameter.empty
        if is_argument:
            names = info.metavar or name.upper()
        else:
            declared = [info.default, *(info.param_decls or ())]  # typer takes the first declaration for a default
            names = [n for n in declared if isinstance(n, str) and n.startswith("-")]
            names = ", ".join(names or [f"--{name.replace('_', '-')}"])
        default = "" if p.default in (None, False) else "required" if required else str(p.default)
        value = "" if is_argument else info.metavar or type_name(kind)
        yield Parameter(names, value, default, info.help or "", is_argument, required)


def page() -> str:
    """Return the page: the program, then every command."""
    from inbatch.apps.cli import app

    lines = ["# Command line", "", app.info.help, ""]
    lines += [part for part in (app.info.epilog or "").split("\n\n") if part.startswith("Exit codes")]
    commands = {info.name or info.callback.__name__.replace("_", "-"): info for info in app.registered_commands}
    for name, info in sorted(commands.items()):
        if info.hidden:
            continue
        rows = list(parameters(info.callback))
        words = [
            row.names if row.required or row.names[0] == "[" else f"[{row.names}]" for row in rows if row.is_argument
        ]
        lines += ["", f"## inbatch {name}", "", info.help or inspect.getdoc(info.callback) or "", ""]
        lines += ["```text", " ".join(["inbatch", name, *words, "[OPTIONS]"]), "```", ""]
        lines += ["| name | value | default | meaning |", "| --- | --- | --- | --- |"]
        for row in rows:
            value = f"`{cell(row.value)}`" if row.value else ""
            lines.append(f"| `{row.names}` | {value} | {cell(row.default)} | {cell(row.help)} |")
        if examples := example_lines(info.epilog or ""):
            lines += ["", "```bash", *examples, "```"]
    return "\n".join(lines) + "\n"


def write(app: Sphinx) -> None:
    target, text = Path(app.srcdir, "reference", "cli.md"), page()
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", lambda app, config: write(app))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
