"""Shared fixtures: shapes in signatures are checked, torch uses one thread, the network is blocked."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

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

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _nightly(config: pytest.Config) -> bool:
    """Return whether the slow tests are selected."""
    return "slow" in config.option.markexpr.replace("not slow", "")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare the process that runs tests; the one that only distributes them to others need not import torch."""
    if getattr(session.config.option, "dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    gc.disable()  # until all tests are collected: each collection would scan everything imported so far
    import torch
    from jaxtyping import install_import_hook

    # Before inbatch is imported: signatures are checked in tests only.
    rooms = CHECKED + (CHECKED_NIGHTLY if _nightly(session.config) else ())
    install_import_hook([f"inbatch.{room}" for room in rooms], "beartype.beartype")
    torch.set_num_threads(1)  # the tensors are tiny, and two ranks share two cores
    for accelerator in (torch.cuda, torch.xpu):
        if not accelerator.is_available():
            accelerator.manual_seed_all = lambda seed: None  # torch.manual_seed would format a stack trace for each


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
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the user's cache in this process and in the processes that a test starts."""
    monkeypatch.setenv("INBATCH_CACHE", "off")


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def digits_made_once() -> None:
    """Keep the canvases of the embedded digits, which every small run would make twice."""
    from inbatch.data.sources import digits

    for name, make in digits._MAKERS.items():
        digits._MAKERS[name] = cache(make)


@pytest.fixture(autouse=True, scope="session")
def few_views_for_lidar() -> None:
    """Let every run of the tests compute LiDAR from few views: it takes most of the time of a small evaluation."""
    from inbatch.training.monitors import label_free

    label_free.LIDAR_IMAGES, label_free.LIDAR_VIEWS = 6, 2


@pytest.fixture(autouse=True, scope="session")
def recent_garbage_collected_only(pytestconfig: pytest.Config) -> None:
    """Collect only recent objects before memory is measured: scanning all those of the tests takes 0.1 s per run.

    The slow tests collect all, as the package does.
    """
    from inbatch.runtime import memory

    if not _nightly(pytestconfig):
        memory.gc = SimpleNamespace(collect=partial(gc.collect, 1))


@pytest.fixture(autouse=True, scope="session")
def no_look_at_the_load() -> None:
    """Spare every run the tenth of a second in which it looks for other busy processes, to advise fewer threads."""
    from inbatch.training import advice

    advice.others_busy = lambda: None


@pytest.fixture(autouse=True, scope="session")
def commands_built_once() -> None:
    """Keep the commands that typer builds from all signatures; it would build them anew for every command line."""
    import typer.testing

    typer.testing._get_command = cache(typer.testing._get_command)


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


LATE = ("matplotlib.pyplot", "sklearn.cluster", "sklearn.datasets", "timm", "torch._dynamo")
"""Libraries that the package imports when it needs them."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector skip everything imported: each small run collects once, for 0.3 s with these libraries.

    A selection of few tests does not import them here, because it may not need them.
    """
    many = len(session.items) > 500 and "torch" in sys.modules
    if many:
        for name in LATE:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # 700 by default: thousands of small collections take seconds
    gc.enable()
    if many and sys.platform == "linux":  # elsewhere it is not safe to fork a process with these libraries
        import rank_pool

        rank_pool.start_server()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all but some cases of a test with the marker `grid(n)`.

    The n cases that stay are chosen greedily: each next one has the most values of parameters that none before has.
    """
    grids: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("grid"):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in grids.values():
        marker = cases[0].get_closest_marker("grid")
        assert marker is not None
        for case in set(cases) - set(_spread(cases, *marker.args)):
            case.add_marker(pytest.mark.slow)


def _spread(cases: list[pytest.Item], count: int) -> list[pytest.Item]:
    """Return as many cases, which together cover as many values of the parameters as possible."""
    values = {case: {(name, repr(v)) for name, v in case.callspec.params.items()} for case in cases}  # type: ignore[attr-defined]
    seen: set[tuple[str, str]] = set()
    chosen: list[pytest.Item] = []
    left = list(cases)
    while left and len(chosen) < count:
        best = max(left, key=lambda case: len(values[case] - seen))  # the first of equals
        if not values[best] - seen:  # all values are covered: spread over the rest
            step = max(1, len(left) // (count - len(chosen)))
            return [*chosen, *left[::step][: count - len(chosen)]]
        chosen.append(best)
        seen |= values[best]
        left.remove(best)
    return chosen
