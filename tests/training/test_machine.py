"""What decides the rounding of a run apart from its recipe is recorded, and compared on a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inbatch.api import prepare
from inbatch.apps.papers.spec import key
from inbatch.runtime import environment
from inbatch.training.machine import machine, record
from inbatch.training.recipe import make


def test_cache_on_device_is_part_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory decides it once; crops of streamed images are resized by other code than those of resident ones."""
    settings: dict[str, Any] = {"data": "digits-canvas", "subset": 40, "batch_size": 20, "encoder.name": "tiny"}
    settings |= {"preset": "digits"}
    recipes = []
    for free in (0, 10**12):
        monkeypatch.setattr("inbatch.data.loader.free_bytes", lambda *_, free=free: free)
        recipes.append(prepare(None, settings=settings, workers=0).recipe)
    assert [recipe.cache_on_device for recipe in recipes] == [False, True]
    again = prepare(None, settings=recipes[0].flat(), workers=0)
    assert again.loader.held is None and again.recipe == recipes[0]
    assert "cache_on_device=false" in recipes[0].command()
    undecided = make(recipes[0].flat() | {"cache_on_device": None})
    assert key(recipes[0]) == key(recipes[1]) == key(undecided), "it does not make another cell of a table"


def test_the_environment_names_all_that_changes_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("INBATCH_SECRET", "x")
    monkeypatch.setattr(environment, "OPTIONAL", ("simplejpeg", "no-such-library"))
    here = machine(torch.device("cpu"), torch.bfloat16)
    assert here["precision"] == "bfloat16" and here["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert here["variables"].keys() <= set(environment.VARIABLES) and here["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert here["versions"]["no-such-library"] is None and here["versions"]["pillow"]
    assert here["views"] in ("compiled kernel", "torch") and "pillow" in here["decoders"]
    assert here["flags"]["mkldnn.matmul.fp32_precision"] and here["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(here)) == here, "it is written to files"


def test_a_change_of_the_machine_is_recorded_and_reported(tmp_path: Path) -> None:
    first = {"threads": 2, "versions": {"torch": "2.14", "numba": "0.6"}, "commit": "a", "cores": 4}
    machines: list[dict[str, Any]] = []
    assert not record(machines, first) and not record(machines, dict(first)) and machines == [first]
    assert not record(machines, first | {"commit": "b", "cores": 8}) and len(machines) == 2
    sentence = record(machines, {"threads": 1, "versions": {"torch": "2.14", "numba": None}, "views": "torch"})
    assert (
        "threads (2 before, 1 now), versions numba (0.6 before, none now), views (none before, torch now)" in sentence
    )
    assert "commit" not in sentence and len(machines) == 3
