"""Turn docstrings into reStructuredText that autodoc can read.

They are written for readers of the source: `name` is code, and *, | and a trailing _ stand for themselves. Docstrings
without sections of Google's style explain parameters as "name: text"; these become "Args:".
"""

import contextlib
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

from inbatch.apps.docstring_entries import split_entries

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Note|Example|Examples):$", re.M)
CODE = re.compile(r"(``?)([^`]+)\1")


def escape(line: str) -> str:
    """Return a line whose only markup is code."""
    pieces = CODE.split(line)
    text = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", re.sub(r"([*|\\])", r"\\\1", piece)) for piece in pieces[::3]]
    code = [f"``{inner}``" for inner in pieces[2::3]]
    return "".join(part for pair in zip(text, [*code, ""], strict=True) for part in pair)


def parameter_names(obj: Any) -> set[str]:
    """Return the names that a docstring may explain: parameters, and the attributes of a class."""
    names = set(getattr(obj, "__annotations__", ()))
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(obj).parameters)
    return names


def adapt(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the docstring of one object in place, before napoleon reads it."""
    text = "\n".join(lines)
    if SECTION.search(text):
        lines[:] = map(escape, lines)
        return
    rest, entries = split_entries(text, parameter_names(obj))
    adapted: list[str] = []
    code = False
    for line in rest:
        if line.startswith(" ") and (code or not (adapted and adapted[-1])):  # an indented paragraph is code
            adapted += [line] if code else ["::", "", line]
            code = True
        else:
            code = code and not line
            adapted.append(escape(line.strip()))
    if entries:
        section = "Attributes:" if what == "class" else "Args:"
        adapted += ["", section, *(f"    {names}: {escape(meaning)}" for names, meaning in entries.items()), ""]
    lines[:] = adapted


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", adapt, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
