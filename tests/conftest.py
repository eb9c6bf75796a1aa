"""Shared fixtures: shapes in signatures are checked, torch uses one thread, the network is blocked."""

import atexit
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Before any other import: no connection may leave this machine, neither from this process nor from its children.
OFFLINE = str(Path(__file__).parent / "offline")
if OFFLINE not in sys.path:
    sys.path.insert(0, OFFLINE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (OFFLINE, os.environ.get("PYTHONPATH"))))
    sys.modules.pop("sitecustomize", None)  # of another package
    import sitecustomize  # noqa: F401

if sys.dont_write_bytecode:
    # Bytecode may not be written beside the sources: it goes to pytest's cache. Without any, both workers and each
    # process of a test compile torch and all other libraries again, which takes 3 s of processor time for torch alone.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

CHECKED = ("nn.functional", "nn.memory_bank", "nn.clustering", "methods", "context")
"""Packages and files whose signatures are checked in every run of the tests."""
CHECKED_NIGHTLY = ("rng", "data.views", "evaluation")
"""Those that are called so often that the checks take a sixth of the fast suite: checked with `-m slow` only."""
EVERY_CASE_CHECKED = ("test_methods.py", "test_plugins.py")
"""Files of tests whose cases go through all methods and plug-ins: their signatures are checked in every case."""

os.environ["INBATCH_CACHE"] = "off"  # of the user

KERNEL = Path(__file__).resolve().parents[1] / "src" / "inbatch" / "data" / "views" / "numba_kernel.py"
"""It is compiled in 15 s, once for a checkout."""

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _nightly(config: pytest.Config) -> bool:
    """Return whether the slow tests are selected."""
    return "slow" in config.option.markexpr.replace("not slow", "")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare the process that runs tests; the one that only distributes them to others need not import torch."""
    if getattr(session.config.option, "dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ:
        if not list(KERNEL.parent.glob("__pycache__/numba_kernel._draw*.nbi")):  # both workers would wait for it
            subprocess.Popen([sys.executable, "-c", "import inbatch.data.views.numba_kernel"], cwd=KERNEL.parents[3])
        return
    gc.disable()  # until all tests are collected: each collection would scan everything imported so far
    if "PYTEST_XDIST_WORKER" in os.environ:
        atexit.register(os._exit, 0)  # runs last; an interpreter with all these objects takes seconds to take down
    import torch
    from jaxtyping import install_import_hook

    # Before inbatch is imported: signatures are checked in tests only.
    rooms = CHECKED + (CHECKED_NIGHTLY if _nightly(session.config) else ())
    install_import_hook([f"inbatch.{room}" for room in rooms], "signatures.checked")
    torch.set_num_threads(1)  # the tensors are tiny, and two ranks share two cores
    for accelerator in (torch.cuda, torch.xpu, torch.mtia):
        if not accelerator.is_available():
            accelerator.manual_seed_all = lambda seed: None  # torch.manual_seed would format a stack trace for each


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the last collection see all objects: the bindings of triton report those that it would leave as leaks."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        gc.freeze()  # a worker ends without one
    else:
        gc.unfreeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the directory of the conformance vectors."""
    return Path(os.environ.get("INBATCH_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def cifar() -> Path:
    """Return the directory of real photographs next to the checkout; skip if it does not exist."""
    folder = SHARED / "data" / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip("needs shared/data/cifar10-jpeg beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch, and check signatures in one case of each test: in all of them, it takes a fifth of their time.

    The slow tests check all.
    """
    import jaxtyping
    import torch

    case = getattr(request.node, "callspec", None)
    first = case is None or not any(case.indices.values())
    every = _nightly(request.config) or request.path.name in EVERY_CASE_CHECKED
    jaxtyping.config.update("jaxtyping_disable", not (first or every))
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Let the runs of a module, also those of its fixtures, learn with a narrow encoder."""
    from small_runs import use_narrow_encoder

    with pytest.MonkeyPatch.context() as patch:
        use_narrow_encoder(patch)
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of this test learn from few images, with a narrow encoder, and be evaluated on few."""
    from small_runs import use_few_images, use_narrow_encoder

    use_few_images(monkeypatch)
    use_narrow_encoder(monkeypatch)


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """End the narrow runs of this test without protocols, pictures and the comparison with the untrained encoder."""
    from small_runs import leave_out_evaluation, use_narrow_encoder

    leave_out_evaluation(monkeypatch)
    use_narrow_encoder(monkeypatch)


@pytest.fixture
def brief(few: None, unjudged: None) -> None:
    """As `few` and `unjudged`: for tests that compare the states of runs."""


LATE = ("matplotlib.pyplot", "sklearn.cluster", "timm", "torch._dynamo", "inbatch.data.views.numba_kernel")
"""Libraries that the package imports when it needs them, and its compiled kernel."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare what all tests use, also those that run in forks of this process.

    The garbage collector skips everything imported: each small run collects once, for 0.3 s with these libraries. A
    selection of few tests does not import them here, because it may not need them.
    """
    if "torch" not in sys.modules:  # the process that only distributes the tests
        return
    _spare_work(session.config)
    many = len(session.items) > 500
    if many:
        from inbatch.data.sources import digits

        for name in LATE:
            importlib.import_module(name)
        for make in digits._MAKERS.values():
            make()
    gc.freeze()
    gc.set_threshold(50_000)  # 700 by default: thousands of small collections take seconds
    gc.enable()
    if many and sys.platform == "linux":  # elsewhere it is not safe to fork a process with these libraries
        import rank_pool

        rank_pool.start_server()


def _spare_work(config: pytest.Config) -> None:
    """Spare the small runs work whose result is the same each time, or that serves larger ones only."""
    import typer.testing

    from inbatch.data.sources import digits
    from inbatch.runtime import memory
    from inbatch.training import advice
    from inbatch.training.monitors import label_free

    for name, make in digits._MAKERS.items():
        digits._MAKERS[name] = cache(make)  # the canvases of the embedded digits, which every run would make twice
    label_free.LIDAR_IMAGES, label_free.LIDAR_VIEWS = 6, 2  # LiDAR takes most of the time of a small evaluation
    advice.others_busy = lambda: None  # a tenth of a second per run, to advise fewer threads
    typer.testing._get_command = cache(typer.testing._get_command)  # typer would build all commands for each line
    if not _nightly(config):
        # Memory is measured after a collection of recent objects only: one of all objects takes 0.1 s per run.
        memory.gc = SimpleNamespace(collect=partial(gc.collect, 1))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create only the cases that the fast tests run: creating the others just to deselect them takes seconds.

    Of a test with the marker `grid(n)`, n cases are chosen, and of a slow one, which is deselected whole, one is left.
    """
    if metafunc.config.option.markexpr == "not slow" and metafunc._calls:
        grid = metafunc.definition.get_closest_marker("grid")
        if metafunc.definition.get_closest_marker("slow"):
            metafunc._calls = metafunc._calls[:1]
        elif grid:
            metafunc._calls = _spread(metafunc._calls, *grid.args)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow all cases of a grid that the fast tests leave out, if they were created."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items if config.option.markexpr != "not slow" else ():
        if isinstance(item, pytest.Function) and item.get_closest_marker("grid"):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in grids.values():
        marker = cases[0].get_closest_marker("grid")
        assert marker is not None
        chosen = {id(call) for call in _spread([case.callspec for case in cases], *marker.args)}
        for case in cases:
            if id(case.callspec) not in chosen:
                case.add_marker(pytest.mark.slow)


def _spread(cases: list[Any], count: int) -> list[Any]:
    """Return as many cases, which together cover as many values of the parameters as possible.

    They are chosen greedily: each next one has the most values that none before has.
    """
    values = [{(name, repr(value)) for name, value in case.params.items()} for case in cases]
    seen: set[tuple[str, str]] = set()
    chosen: list[int] = []
    left = list(range(len(cases)))
    while left and len(chosen) < count:
        best = max(left, key=lambda case: len(values[case] - seen))  # the first of equals
        if not values[best] - seen:  # all values are covered: spread over the rest
            step = max(1, len(left) // (count - len(chosen)))
            chosen += left[::step][: count - len(chosen)]
            break
        chosen.append(best)
        seen |= values[best]
        left.remove(best)
    return [cases[place] for place in sorted(chosen)]
