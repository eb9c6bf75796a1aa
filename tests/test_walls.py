"""Check the source against the ordered list of packages and the table of allowed imports."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import source_trees
from source_trees import written

import inbatch

FILES = {
    ".".join(("inbatch", *file.relative_to(source_trees.ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in source_trees.FILES
}
PACKAGES = {name for name, file in FILES.items() if file.name == "__init__.py"}

ROOMS: list[set[str]] = [
    {"batch", "errors", "rng"},
    {"nn", "context", "runtime"},
    {"methods", "data", "distributed"},
    {"losses", "models", "evaluation"},
    {"training"},
    {"api", "testing"},
    {"apps", "sklearn"},
    {"__main__"},
]
"""Layers from the bottom to the top. A package imports packages of lower layers only, none of its own layer."""

MAY: dict[str, set[str]] = {
    "nn": {"batch", "errors", "rng", "nn"},
    "context": {"batch", "errors", "rng", "context"},
    "methods": {"batch", "errors", "rng", "nn", "methods.base"},
    "losses": {"distributed", "nn", "methods"},
    "distributed": {"errors", "nn.logsumexp", "runtime.distributed", "runtime.ring"},
    "training.step": {"batch", "context", "errors", "methods", "models", "nn", "rng", "runtime"}
    | {"training.grad_cache", "training.mixing", "training.row_order"},
    "training.grad_cache": {"batch", "models"},
    "models": {"batch", "context", "data.pixels", "errors", "models", "nn", "rng", "runtime"},
    "__main__": {"apps.cli"},
}
"""Package or file -> everything in inbatch that it may import, if that is less than its layer allows."""

NEVER: dict[str, set[str]] = {"evaluation": {"methods", "models", "training"}}
"""Room -> rooms that it must not import."""

ONLY: dict[str, set[str]] = {
    "torch.distributed": {"distributed", "testing", "models.sharded_weights"}
    | {f"runtime.{name}" for name in ("distributed", "process_group", "ring", "sharding", "shard_files")},
    "torch.nn.parallel": {"runtime.distributed", "training.cached_step"},
    "pydantic": {"training.recipe", "training.registry", "apps.cli", "apps.papers"},
    "typer": {"apps.cli"},
    "numba": {"data.views"},
    "llvmlite": {"data.views"},
    "simplejpeg": {"data", "apps.bench"},
    "datasets": {"data.sources"},
    "huggingface_hub": {"data.sources", "models"},
    "tifffile": {"data.decoding"},
    "fsspec": {"runtime.remote"},
    "triton": {"nn.triton_kernels"},
    "faiss": {"evaluation.neighbour_index"},
    "torch.utils.tensorboard": {"training.trackers.tensorboard"},
    "wandb": {"training.trackers.wandb"},
    "mlflow": {"training.trackers.mlflow"},
    "trackio": {"training.trackers.trackio"},
    "onnx": {"models.export.to_onnx"},
    "onnxruntime": {"models.export.to_onnx"},
    "onnxscript": {"models.export.to_onnx"},
    "peft": {"models.lora"},
    "transformers": set(),
    "coremltools": set(),
}
"""Library -> the packages or files that may name it."""

FEW = {"torch", "jaxtyping"}
LIBRARIES: dict[str, set[str]] = dict.fromkeys(("nn", "context", "methods", "losses", "distributed"), FEW)
LIBRARIES |= {"nn.clustering": FEW | {"sklearn", "threadpoolctl"}, "nn.triton_kernels": {"triton"}}
LIBRARIES |= {"context.mixing": FEW | {"scipy"}}
LIBRARIES |= {f"training.{name}": FEW for name in ("step", "grad_cache")}
LIBRARIES |= {f"runtime.{name}": FEW for name in ("distributed", "process_group", "rank_store", "ring")}
LIBRARIES |= {f"runtime.{name}": FEW for name in ("sharding", "shard_files")}
LIBRARIES |= {f"models.{name}": FEW for name in ("network", "sync_batchnorm")}
"""Package or file -> the libraries that it may import in addition to the standard library."""

TORCHLESS = {"errors", "runtime.tuning", "apps.cli", "training.trackers"}
"""Modules that can be imported without torch, so that `--help` and the processes of trackers start without delay."""

LATE = {"matplotlib", "pandas", "scipy", "sklearn", "timm", "torchvision", "triton"}
"""Libraries whose import takes a second in all: only functions import them, so that a run starts without them."""
EARLY = {"data.views.numba_kernel", "nn.triton_kernels", "sklearn"}
"""Modules that are themselves imported in functions only, or by the user."""

DEVICES = {f"nn.{name}" for name in ("exponentials", "logsumexp", "tiles", "cpu_matmul", "slicing", "eval_mode")}
DEVICES |= {"nn.triton_logsumexp"}
"""Modules that choose an algorithm or the size of its parts by device; only they may read the type of the device."""


@functools.cache
def nodes(module: str) -> tuple[ast.Import | ast.ImportFrom | ast.Call | ast.keyword | ast.FunctionDef, ...]:
    """Return the nodes of the kinds that tests look at."""
    kinds = ast.Import | ast.ImportFrom | ast.Call | ast.keyword | ast.FunctionDef
    return tuple(node for node in source_trees.nodes(FILES[module]) if isinstance(node, kinds))


@functools.cache
def imports(module: str, lazy: bool = True, hints: bool = True) -> tuple[str, ...]:
    return tuple(_imports(module, lazy, hints))


def _imports(module: str, lazy: bool, hints: bool) -> Iterator[str]:
    """Yield the full dotted names a module imports; lazy: also inside functions, hints: also for type checkers only."""
    waiting: list[ast.AST] = [source_trees.tree(FILES[module])]
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
            yield written(node)  # torch.distributed.all_reduce, used without its own import
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typed = not hints and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if (lazy or not late) and (hints or not typed):
            waiting.extend(ast.iter_child_nodes(node))


def ours(module: str, lazy: bool = True, hints: bool = True) -> set[str]:
    """Return the modules of inbatch that a module imports."""
    modules = set()
    for name in imports(module, lazy, hints):
        if name.split(".")[0] == "inbatch":
            while name not in FILES:
                name = name.rpartition(".")[0]
            modules.add(name)
    return modules - {module}


def short(module: str) -> str:
    """Return the module name without the package name, "" for the package itself."""
    return module.removeprefix("inbatch").removeprefix(".")


def room(module: str) -> str:
    return short(module).split(".")[0]


def inside(module: str, places: set[str]) -> bool:
    """Return whether a module is one of the packages or files, or lies in one."""
    name = short(module)
    return any(name == place or name.startswith(f"{place}.") for place in places)


def where(module: str, table: dict[str, set[str]]) -> set[str] | None:
    """Return a module's entry in a table; an entry of the module precedes that of its package."""
    return next((table[place] for place in (short(module), room(module)) if place in table), None)


def problems(check: Callable[[str], Iterator[str]]) -> list[str]:
    return [problem for module in sorted(FILES) for problem in check(module)]


def test_rooms_import_only_rooms_below() -> None:
    line = {name: number for number, names in enumerate(ROOMS) for name in names}
    assert {room(name) for name in FILES} == {*line, ""}, "add a new room to ROOMS"

    def check(module: str) -> Iterator[str]:
        for other in ours(module) if module != "inbatch" else ():
            here, there = room(module), room(other)
            if other == "inbatch":
                yield f"{module} imports the package itself"
            elif there != here and line[there] >= line[here]:
                yield f"{module} imports {other}, which is not below it"

    assert not problems(check)


def test_walls_inside_and_between_rooms() -> None:
    def check(module: str) -> Iterator[str]:
        may, never = where(module, MAY), NEVER.get(room(module), set())
        for other in ours(module):
            if may is not None and not inside(other, may) and module != "inbatch.methods":
                yield f"{module} imports {other}, but may import only {sorted(may)}"
            if inside(other, never):
                yield f"{module} imports {other}, which {room(module)} must not know"

    assert not problems(check)


def test_slow_libraries_are_imported_where_they_are_used() -> None:
    def check(module: str) -> Iterator[str]:
        for name in imports(module, lazy=False, hints=False) if short(module) not in EARLY else ():
            if name.split(".")[0] in LATE:
                yield f"{module} imports {name} at its top; import it in the function that uses it"

    assert not problems(check)


def test_imports_go_in_no_circle() -> None:
    graph = {name: ours(name) for name in FILES if name != "inbatch"}
    list(graphlib.TopologicalSorter(graph).static_order())


@functools.cache
def outside(name: str) -> list[str]:
    """Return the libraries of ONLY that a dotted name is part of."""
    parts = name.split(".")
    return [library for n in range(1, len(parts) + 1) if (library := ".".join(parts[:n])) in ONLY]


def test_libraries_stay_where_they_belong() -> None:
    def check(module: str) -> Iterator[str]:
        for name in set(imports(module)):
            for library in outside(name):
                if not inside(module, ONLY[library]):
                    yield f"{module} names {library}"
        known = where(module, LIBRARIES)
        roots = {name.split(".")[0] for node in nodes(module) for name in _roots(node)}
        if known is not None and (more := roots - sys.stdlib_module_names - known - {"inbatch"}):
            yield f"{module} imports {sorted(more)}"

    assert not problems(check)


def _roots(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "inbatch"] if isinstance(node, ast.ImportFrom) else []


def test_nothing_is_unpickled() -> None:
    def check(module: str) -> Iterator[str]:
        used = {name for name in imports(module) if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")}
        # Files of CIFAR and the index of torch's checkpoints are pickles; these unpicklers resolve no names of code.
        restricted = ("inbatch.data.sources.cifar", "inbatch.models.sharded_weights")
        inert = {"pickle.Unpickler"} if module in restricted else set()
        yield from (f"{module} names {name}" for name in used - {"pickle", "pickle.UnpicklingError"} - inert)
        for node in nodes(module):
            if isinstance(node, ast.Call) and written(node.func) == "torch.load":
                if "weights_only=True" not in ast.unparse(node):
                    yield f"{module}: torch.load without weights_only=True"
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"{module}: allow_pickle"

    assert not problems(check)


def test_the_library_never_prints() -> None:
    """The library returns values or passes them to `runtime.terminal`; only programs in `apps` print."""

    def check(module: str) -> Iterator[str]:
        if room(module) not in ("apps", "__main__"):
            calls = (node for node in nodes(module) if isinstance(node, ast.Call))
            yield from (f"{module}: print" for call in calls if written(call.func) == "print")

    assert not problems(check)


def test_a_loss_names_no_device() -> None:
    def check(module: str) -> Iterator[str]:
        if inside(module, {"nn", "methods", "losses"}) and not inside(module, DEVICES):
            every = source_trees.nodes(FILES[module])
            words = {node.attr for node in every if isinstance(node, ast.Attribute)}
            words |= {node.value for node in every if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            yield from (f"{module} names {word}" for word in words & {"cuda", "cpu", "mps", "xpu"})

    assert not problems(check)


def python(script: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_WITHOUT = """
import importlib, sys
libraries, names = sys.argv[1].split(","), sys.argv[2:]
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in libraries:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Wall())
for name in names:
    importlib.import_module(name)
"""


def what_reads_recipes() -> set[str]:
    """Return the modules that need typer or pydantic where they are imported."""
    needs = {"inbatch.training.recipe", "inbatch.training.registry"}
    needs |= {name for name in FILES if inside(name, {"apps.cli"})}
    while more := {name for name in FILES.keys() - needs if ours(name, lazy=False, hints=False) & needs}:
        needs |= more
    return needs


def test_recipes_are_read_in_the_upper_rooms_only() -> None:
    assert {room(name) for name in what_reads_recipes()} <= {"training", "api", "apps", "sklearn", "__main__"}


@pytest.mark.slow
def test_only_what_reads_recipes_needs_typer_and_pydantic() -> None:
    python(_WITHOUT, "typer,pydantic", *sorted(FILES.keys() - what_reads_recipes() - {"inbatch.__main__"}))


LONG = {"data.views.numba_kernel._draw", "nn.triton_kernels.logistic"}
"""Functions of more than 60 lines: each is compiled as one."""


def test_functions_have_at_most_60_lines() -> None:
    """Lines of the body are counted, without signature and docstring; `build` has at most 40."""

    def check(module: str) -> Iterator[str]:
        for node in nodes(module):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                name = f"{short(module)}.{node.name}"
                if lines > (40 if name == "training.build.build" else 60) and name not in LONG:
                    yield f"{name} has {lines} lines"

    assert not problems(check)


EMPTY_NAMES = {"found", "told", "made", "given", "said", "some", "tell", "meet"}
"""Names that do not say what a value is or what a function does; see docs/contributing/style.md."""
NAMED_BY_CHECKPOINTS = {("nn/clustering.py", "made")}


def test_names_say_what_they_hold() -> None:
    wrong = []
    for file in source_trees.FILES:
        for node in source_trees.nodes(file):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                    place = file.relative_to(source_trees.ROOT).as_posix()
                    if name in EMPTY_NAMES and (place, name) not in NAMED_BY_CHECKPOINTS:
                        wrong.append(f"{place}, line {node.lineno}: {name}")
    assert not wrong, f"name these by what they hold (docs/contributing/style.md): {wrong}"


def test_help_needs_no_torch() -> None:
    python(_WITHOUT, "torch", *sorted(name for name in FILES if inside(name, TORCHLESS)))


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """An imported module becomes an attribute of the package and would hide a function of the same name."""
    modules = {name.removeprefix("inbatch.") for name in FILES if name.count(".") == 1}
    assert modules & set(inbatch.__all__) == {"distributed", "losses", "testing"}, "public as modules"


def test_importing_the_package_costs_nothing() -> None:
    python("import inbatch, sys; assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()")
