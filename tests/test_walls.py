"""Who imports whom: the table of walls, read from the source, and what the package does without some libraries."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inbatch

ROOT = Path(inbatch.__file__).parent
TREES = {
    ".".join(("inbatch", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        file.read_text()
    )
    for file in ROOT.rglob("*.py")
}
PACKAGES = {name for name in TREES if (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file()}
EVERYONE = pytest.mark.parametrize("module", sorted(TREES))

FREE = {"errors", "budget", "busy", "children", "draws", "files", "limits", "modes", "machine", "process", "pixels"}
GROUND = {"batch", "functional", "tiled", "kernels", "products", "heads", "memory", "schedules", "clusters"}
TOP = {"__main__", "cli", "papers"}
MAY: dict[str, set[str]] = {room: GROUND for room in GROUND} | {
    "methods": GROUND | {"methods.base"},
    "context": {"batch"},
    "encoders": {"context.attend", "context.grouped"},
    "views": {"batch"},
    "data": {"batch"},
    "roll": set(),
    "ranks": {"roll"},
    "norm": {"ranks"},
    "tower": GROUND | {"context.fuse", "context.grouped"},
    "seam": {"batch", "tower"},
    "step": {"batch", "functional", "tiled", "tower", "seam", "ranks", "methods.base", "context.curate"},
    "optim": {"schedules"},
    "evaluate": {"ranks", "products", "batch", "views"},
    "papers": {"api", "config", "parts", "train", "evaluate", "inspect", "environment", "signals"},
    "cli": {"api", "bench", "config", "train", "evaluate", "inspect", "survey", "show", "log", "describe"}
    | {"doctor", "forecast", "quickstart", "papers", "signals"},
    "__main__": {"cli"},
} | {room: set() for room in FREE}  # fmt: skip
"""Room -> the rooms (or single files) of ours that it may import, beside itself and what is free for all."""
ABOVE = {"config", "build", "capture", "checkpoint", "signals", "environment", "log", "inspect", "train", "describe"}
ABOVE |= {
    "bench",
    "calibrate",
    "timing",
    "doctor",
    "fit",
    "forecast",
    "parts",
    "plug",
    "assign",
    "api",
    "quickstart",
    "losses",
    "looks",
    "report",
    "runs",
    "run_encoder",
    "judgement",
    "show",
    "stopping",
    "survey",
    "threads",
    "",
}
"""What stands above the step, and the faces: only what is true of everyone is asked of them."""

SMALL_WORLD = {
    room: {"torch", "jaxtyping"}
    for room in (*GROUND, "methods", "context", "seam", "tower", "step", "ranks", "roll", "norm")
}
SMALL_WORLD["clusters"] |= {"sklearn", "threadpoolctl"}
SMALL_WORLD["kernels"] |= {"triton"}
"""Rooms that know few libraries, the standard one aside."""
ONLY = {
    "torch.distributed": {"ranks"},
    "torch.nn.parallel": {"ranks"},
    "pydantic": {"config", "parts", "cli", "papers"},
    "typer": {"cli"},
    "numba": {"views"},
    "llvmlite": {"views"},
    "simplejpeg": {"data", "bench"},
    "datasets": {"data"},
    "huggingface_hub": {"data", "encoders"},
    "tifffile": {"data"},
}
"""Libraries that only some rooms know."""


def imports(module: str, lazy: bool = True, hints: bool = True) -> Iterator[str]:
    """The full dotted names a module imports; lazy: also inside functions, hints: also for type checkers only."""
    waiting: list[ast.AST] = [TREES[module]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)  # torch.distributed.all_reduce, without an import of its own
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if (lazy or not late) and (hints or not typed):
            waiting.extend(ast.iter_child_nodes(node))


def ours(module: str, lazy: bool = True, hints: bool = True) -> set[str]:
    """Which of our modules a module imports."""
    found = set()
    for name in imports(module, lazy, hints):
        if name.split(".")[0] == "inbatch":
            while name not in TREES:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@EVERYONE
def test_walls(module: str) -> None:
    here = room(module)
    assert here in MAY or here in ABOVE, f"say in this file what the new room {here!r} may import"
    for other in ours(module):
        there = room(other)
        assert there, f"{module} imports the package's face"
        assert there not in TOP or here in ("__main__", there) or (here, there) == ("cli", "papers"), (
            f"{module} imports {other}, which nobody may"
        )
        if here in MAY and there not in FREE:
            file = other.removeprefix("inbatch.")
            inside = there == here and (here != "methods" or module == "inbatch.methods")
            assert inside or {there, file} & MAY[here], f"{module} imports {other}"


@EVERYONE
def test_libraries(module: str) -> None:
    here = room(module)
    for name in imports(module):
        for library, rooms in ONLY.items():
            if name == library or name.startswith(f"{library}."):
                assert here in rooms, f"{module} names {library}"
    roots = {name.split(".")[0] for node in ast.walk(TREES[module]) for name in _roots(node)}
    if here in SMALL_WORLD:
        assert roots - sys.stdlib_module_names <= SMALL_WORLD[here] | {"inbatch"}


def _roots(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "inbatch"] if isinstance(node, ast.ImportFrom) else []


@EVERYONE
def test_nothing_is_unpickled(module: str) -> None:
    used = {name for name in imports(module) if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")}
    # CIFAR's files are pickles; the names that one may ask for stand for nothing that runs (tests/test_data_cifar.py).
    inert = {"pickle.Unpickler"} if module == "inbatch.data.cifar" else set()
    assert used <= {"pickle", "pickle.UnpicklingError"} | inert
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False")


FAST = {"tiled", "kernels", "products"}
"""How a loss's sums are computed fast is what these are for."""


@pytest.mark.parametrize("module", [name for name in sorted(TREES) if room(name) in (GROUND | {"methods"}) - FAST])
def test_a_loss_names_no_device(module: str) -> None:
    nodes = list(ast.walk(TREES[module]))
    words = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not words & {"cuda", "cpu", "mps", "xpu"}


def test_imports_go_one_way() -> None:
    graph = {name: ours(name, hints=False) for name in TREES if name != "inbatch"}
    list(graphlib.TopologicalSorter(graph).static_order())


def python(script: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_what_reads_recipes_needs_typer_and_pydantic() -> None:
    needs = {"inbatch.config", "inbatch.parts"} | {name for name in TREES if room(name) == "cli"}
    while more := {name for name in TREES.keys() - needs if ours(name, lazy=False, hints=False) & needs}:
        needs |= more
    assert {room(name) for name in needs} <= ABOVE | TOP
    script = """
import importlib, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "pydantic"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Wall())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    python(script, *sorted(TREES.keys() - needs - {"inbatch.__main__"}))


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """An imported module becomes an attribute of the package, and would hide a function of its name."""
    modules = {name.removeprefix("inbatch.") for name in TREES if name.count(".") == 1}
    assert modules & set(inbatch.__all__) == {"losses"}, "which is public as a module"


def test_importing_the_package_costs_nothing() -> None:
    python("import inbatch, sys; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()")
