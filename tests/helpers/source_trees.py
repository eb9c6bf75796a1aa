"""The source of the package as syntax trees: parsed once per process, for all tests that read it."""

import ast
from functools import cache
from pathlib import Path

import inbatch

ROOT = Path(inbatch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file."""
    return tuple(ast.walk(tree(file)))


def written(node: ast.AST) -> str:
    """Return an expression as text: names and attributes, of which there are most, without the slow `ast.unparse`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{written(node.value)}.{node.attr}"
    return ast.unparse(node)
