"""Public functions in the process of a caller: independent of its modes, without traces, one run at a time."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from small_runs import assert_same_state, saved, tiny

import inbatch
from inbatch.api import prepare
from inbatch.apps.quickstart import quickstart
from inbatch.data import open_data
from inbatch.errors import ConfigError
from inbatch.evaluation import Embeddings, clustering, embed, evaluate, finetune, knn, linear_probe, raw_pixels
from inbatch.evaluation.finetune import Finetune
from inbatch.runtime import isolation

pytestmark = pytest.mark.filterwarnings("ignore:the run in")


def state() -> dict[str, Any]:
    """Return everything of this process that a caller could find changed."""
    backends = torch.backends
    numbers = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numbers["state"]["key"].tolist(), numbers["state"]["pos"]),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "threads": torch.get_num_threads(),
        "precision": (torch.get_float32_matmul_precision(), backends.mkldnn.matmul.fp32_precision),
        "flags": (backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()),
        "denormals": float(torch.tensor(1e-39) * 0.5),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "loggers": {name: (one.level, one.disabled, list(one.handlers), list(one.filters), one.propagate)
                    for name, one in [("", logging.getLogger()), *logging.root.manager.loggerDict.items()]
                    if isinstance(one, logging.Logger)},
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, sys.displayhook),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "drawing": (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)),
        "numpy errors": np.geterr(),
    }  # fmt: skip


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, list[Callable[[], Any]]] = {
    "none": [],
    "no_grad": [torch.no_grad],
    "autocast": [lambda: torch.autocast("cpu", torch.bfloat16)],
    "float64": [float64],
    "inference_mode, autocast and float64": [
        torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), float64
    ],
}  # fmt: skip


LONG = {"evaluate_run", "dry_run", "draw_views", "inspect_run", "evaluate", "finetune"}
"""Functions that are called in the nightly suite only."""


@contextmanager
def mode(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for enter in MODES[name]:
            stack.enter_context(enter())
        yield


@pytest.mark.parametrize(
    "modes", [list(MODES)[:: len(MODES) - 1], pytest.param(list(MODES)[:-1], marks=pytest.mark.slow)], ids=len
)
@pytest.mark.usefixtures("brief")
def test_public_functions_neither_depend_on_the_callers_state_nor_change_it(tmp_path: Path, modes: list[str]) -> None:
    run, images = tmp_path / "run", torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    digits = open_data("digits-canvas", subset=40)
    embeddings = Embeddings(torch.randn(40, 8), labels, tuple(map(str, range(40))), "some", "random")
    loaded: list[Any] = []
    calls: dict[str, Callable[[], Any]] = {
        "pretrain": lambda: tiny("simclr", run, subset=32, epochs=1, overwrite=True),
        "load": lambda: loaded.append(inbatch.load(run)),
        "load_run": lambda: inbatch.load_run(run).recipe,
        "Encoder.embed": lambda: torch.from_numpy(loaded[-1].embed(images)),
        "export_run": lambda: inbatch.export_run(run, tmp_path / "encoder")["width"],
        "embed_run": lambda: inbatch.embed_run(run, (images, labels), tmp_path / "features.npz"),
        "evaluate_run": lambda: inbatch.evaluate_run(run, protocols=["knn"], seed=1)["knn"],
        "dry_run": lambda: inbatch.dry_run(images, batch_size=20, epochs=1, encoder="tiny")["recipe"],
        "draw_views": lambda: inbatch.draw_views(images, tmp_path / "views.png", count=2).name,
        "survey_data": lambda: inbatch.survey_data((images, labels))["images"],
        "inspect_run": lambda: inbatch.inspect_run(run, count=2)["step"],
        "knn": lambda: knn(embeddings, embeddings, 5),
        "linear_probe": lambda: linear_probe(embeddings, embeddings),
        "clustering": lambda: clustering(embeddings, n_init=1),
        "evaluate": lambda: evaluate(None, embeddings, embeddings, protocols=["knn", "few"], k=5, draws=1),
        "embed": lambda: embed(loaded[-1], digits).vectors,
        "raw_pixels": lambda: raw_pixels(digits).vectors,
        "finetune": lambda: finetune(loaded[-1], digits, digits, Finetune(epochs=1, batch=20, steps=2))["top1"],
    }  # fmt: skip
    plain: dict[str, Any] = {}
    for name in modes:
        for what, call in calls.items():
            if len(modes) == 2 and what in LONG:
                continue
            with mode(name):
                random.seed(len(what)), np.random.seed(len(what)), torch.manual_seed(len(what))
                before = state()
                result = call()
                after = state()
            after["loggers"] = {key: after["loggers"].get(key) for key in before["loggers"]}  # without new modules'
            changed = [key for key in before if before[key] != after[key]]
            assert not changed, (name, what, changed)
            same = plain.setdefault(what, result)
            if isinstance(result, torch.Tensor):
                assert torch.equal(result, same), (name, what)
            elif what not in ("pretrain", "load"):
                assert result == same, (name, what)
        weights = {"whole": saved(run)}
        assert_same_state(weights, plain.setdefault("state", weights), name)
        assert not loaded[-1].training and next(loaded[-1].parameters()).requires_grad
        assert not next(loaded[-1].parameters()).is_inference()


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_in_bf16_use_the_present_weights_inside_of_autocast(enabled: bool) -> None:
    """torch keeps the casts of weights until the outermost context ends, even if that one is disabled."""
    weights = []
    for outer in (nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=enabled)):
        built = prepare(
            "digits-canvas", "simclr", subset=48, batch_size=16, settings={"precision": "bf16", "encoder.name": "tiny"}
        )
        with outer, isolation.usual_numerics():
            for step, batch in enumerate(built.loader.epoch(0)):
                built.step(batch, step)
        weights.append(torch.cat([p.detach().flatten() for p in built.network.parameters()]))
    assert torch.equal(*weights)


def test_all_public_functions_are_isolated() -> None:
    exempt = {"METHODS", "OPTIMIZERS", "Callback", "Encoder", "Moment", "Run", "__version__", "distributed", "losses",
        "testing", "grad_cache", "tune", "use_parts", "views"}  # fmt: skip
    """Names; contexts for the caller's own code; what makes a module; and what sets the process up."""
    functions = [getattr(inbatch, name) for name in inbatch.__all__ if name not in exempt]
    for function in (*functions, evaluate, quickstart):
        assert "_alone" in function.__code__.co_names, function.__name__  # the wrapper of `isolated`


def test_a_second_run_in_another_thread_is_refused(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    @isolation.isolated
    def pretrain() -> None:
        inside.set()
        assert leave.wait(30)

    thread = threading.Thread(target=pretrain, name="notebook cell")
    thread.start()
    assert inside.wait(30)
    try:
        for call in (
            lambda: inbatch.pretrain("digits-canvas", out=tmp_path / "run"),
            lambda: inbatch.load(tmp_path / "run"),
            lambda: inbatch.survey_data("digits-canvas"),
        ):
            with pytest.raises(ConfigError, match=r"while pretrain runs in the thread 'notebook cell' of this process"):
                call()
        assert not (tmp_path / "run").exists()
    finally:
        leave.set()
        thread.join()
    with pytest.raises(ConfigError, match=r"run.* is not the folder of a run"):  # the turn is free again
        inbatch.load_run(tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    inside, leave = threading.Event(), threading.Event()

    @isolation.isolated
    def pretrain() -> None:
        inside.set()
        assert leave.wait(30)

    thread = threading.Thread(target=pretrain)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if not child:
        code = 1
        try:
            isolation.briefly_isolated(lambda: None)()
            code = 0
        finally:
            os._exit(code)
    leave.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_short_calls_of_several_threads_wait_for_each_other() -> None:
    results: list[int] = []

    @isolation.briefly_isolated
    def load(number: int) -> None:
        torch.manual_seed(number)
        first = torch.rand(3)
        threading.Event().wait(0.01)
        torch.manual_seed(number)
        results.extend([number] * int(torch.equal(first, torch.rand(3))))

    before = torch.get_rng_state()
    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3] and torch.equal(torch.get_rng_state(), before)


def test_every_public_function_is_isolated() -> None:
    functions = {name: value for name in inbatch.__all__ if callable(value := getattr(inbatch, name))}
    computing = {name: value for name, value in functions.items() if not isinstance(value, type)}
    bare = {name for name, value in computing.items() if not hasattr(value, "__wrapped__")}
    assert bare == {"tune", "views"}, "tune sets the process up for the caller, views makes a module"
