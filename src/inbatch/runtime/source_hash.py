"""The source of a class or function: its file, and a hash of everything in the file that it uses."""

import ast
import hashlib
import inspect
import linecache
import sys
from collections.abc import Iterator
from typing import Any


def source_file(definition: Any) -> str | None:
    """Return the file of a class or function; a cell of a notebook has the name under which Python knows it.

    The file is that of the user's function, not of its decorator, and not "<string>", as of a dataclass's constructor.
    """
    functions = [definition] if inspect.isfunction(definition) else list(vars(definition).values())
    for function in functions:
        if inspect.isfunction(function) and function.__module__ == definition.__module__:
            file = inspect.unwrap(function).__code__.co_filename
            if linecache.getlines(file):
                return file
    return getattr(sys.modules.get(definition.__module__), "__file__", None)


def hash_in(file: str | None, name: str) -> str | None:
    """Return the hash of a definition in a file (`source_hash`); None if the file cannot be read."""
    text = "".join(linecache.getlines(file)) if file else ""
    return source_hash(text, name) if text else None


def source_hash(text: str, name: str) -> str:
    """Return the SHA-256 of a definition and of everything in its file that it uses, directly or not.

    Other lines can change: a script can be edited between the start and the resume of a run. Modules that the file
    imports are not part of it.

    Args:
        text: Contents of the file.
        name: Name defined at the top level of the file; the hash is that of the whole text if there is none.
    """
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):  # a notebook's own commands
        statements = []
    places: dict[str, list[ast.stmt]] = {}
    for statement in statements:
        for defined in _defined(statement):
            places.setdefault(defined, []).append(statement)
    used, waiting, seen = list[ast.stmt](), [name], set[str]()
    while waiting:
        for statement in places.get(waiting.pop(), ()):
            if statement not in used:
                used.append(statement)
                names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - seen
                seen |= names
                waiting += sorted(names)
    lines = text.splitlines(keepends=True)
    parts = [_lines(statement, lines) for statement in sorted(used, key=lambda one: one.lineno)]
    return hashlib.sha256("".join(parts or [text]).encode(errors="surrogatepass")).hexdigest()


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in statement.names)
    elif not (isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
                target: ast.expr = node
                while isinstance(target, ast.Attribute | ast.Subscript):  # MyMethod.loss = ..., OPTIONS["depth"] = ...
                    target = target.value
                if isinstance(target, ast.Name):
                    yield target.id
            elif node is not statement and isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ImportFrom):
                yield from _defined(node)


def _lines(statement: ast.stmt, lines: list[str]) -> str:
    decorators = [one.lineno for one in getattr(statement, "decorator_list", ())]
    return "".join(lines[min([statement.lineno, *decorators]) - 1 : statement.end_lineno])
