"""A saved state is checked to its leaves before any part of a run is changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_methods import small_settings
from small_runs import TINY

from inbatch.api import prepare
from inbatch.errors import InbatchError
from inbatch.methods import METHODS
from inbatch.training import checkpoint
from inbatch.training.build import RunComponents
from inbatch.training.train_state import TrainState

FIELDS = {key: value for key, value in TINY.items() if key != "quiet"} | {"subset": 80, "batch_size": 16, "context": 8}


def built(method: str, optimizer: Any = "adamw", **settings: Any) -> RunComponents:
    options = small_settings(method)
    return prepare("digits-canvas", method, optimizer=optimizer, settings=options | settings, **FIELDS)


def trained(components: RunComponents) -> dict[str, Any]:
    """Return the state after one step, whose learning rate of the warm-up is 0, and a second one."""
    for step, batch in enumerate(components.loader.epoch(0, start=0, stop=2)):
        components.step(batch, step)
    progress = TrainState(step=2, curve=[{"step": 0, "epoch": 0, "knn": 0.5}], images=32, data="80 images")
    parts = components.parts() | {"progress": progress}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def restored(components: RunComponents, state: dict[str, Any]) -> None:
    checkpoint.restore(components.parts() | {"progress": TrainState()}, state)


FAST = [("moco", "sgd"), ("swav", "lars"), ("pcl", "adam"), ("simclr", torch.optim.Adafactor)]


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*FAST, *(pytest.param(m, "adamw", marks=pytest.mark.slow) for m in METHODS)],
)
def test_the_state_of_every_method_is_complete(method: str, optimizer: Any) -> None:
    state, other = trained(built(method, optimizer)), built(method, optimizer)
    restored(other, state)
    for name, part in other.parts().items():
        if isinstance(part, torch.nn.Module):
            assert all(torch.equal(x, state[name][key]) for key, x in part.state_dict().items()), name


def moments(state: dict[str, Any]) -> dict[int, Any]:
    return state["optimizer"]["state"]


def group(state: dict[str, Any]) -> dict[str, Any]:
    return state["optimizer"]["param_groups"][0]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    # the optimiser
    r"'optimizer': state\.0 \(encoder.*\) is missing": lambda s: s["optimizer"].update(state={}),
    r"'optimizer': state\.3 \(.*\) is missing": lambda s: moments(s).pop(3),
    r"'optimizer': state\.0 \(.*\)\.exp_avg_sq is missing": lambda s: moments(s)[0].pop("exp_avg_sq"),
    r"'optimizer': state\.1 \(.*\)\.exp_avg is float32 \[1\], not float32": lambda s: moments(s)[1].update(
        exp_avg=torch.zeros(1)
    ),
    r"'optimizer': state\.1 \(.*\)\.exp_avg is NoneType, not float32": lambda s: moments(s)[1].update(exp_avg=None),
    r"'optimizer': state\.0 \(.*\)\.step is -3, outside 0 to 2": lambda s: moments(s)[0].update(
        step=torch.tensor(-3.0)
    ),
    r"'optimizer': state\.0 \(.*\)\.step is 9, outside 0 to 2": lambda s: moments(s)[0].update(step=torch.tensor(9.0)),
    r"'optimizer': state\.99 is unexpected": lambda s: moments(s).update({99: {}}),
    r"'optimizer': state is missing": lambda s: s["optimizer"].pop("state"),
    r"'optimizer': param_groups is not a list of 2 groups": lambda s: s["optimizer"].update(param_groups=[]),
    r"'optimizer': param_groups\.0\.base_lr is missing": lambda s: group(s).pop("base_lr"),
    r"'optimizer': param_groups\.0\.betas is \(0.5, 0.5\), and the recipe's is": lambda s: group(s).update(
        betas=(0.5, 0.5)
    ),
    r"'optimizer': param_groups\.0\.lr is -1, not a number": lambda s: group(s).update(lr=-1),
    r"'optimizer': param_groups\.0\.params are not": lambda s: group(s)["params"].pop(),
    # modules
    r"'network': encoder\.\S+ is missing": lambda s: s["network"].pop(next(iter(s["network"]))),
    r"'target': more is unexpected": lambda s: s["target"].update(more=torch.zeros(1)),
    r"'target': encoder\.\S+ is float64 \[.*\], not float32": lambda s: s["target"].update(
        {(key := next(iter(s["target"]))): s["target"][key].double()}
    ),
    r"'network': \S+num_batches_tracked is -1, below 0": lambda s: s["network"].update(
        {next(key for key in s["network"] if "num_batches" in key): torch.tensor(-1)}
    ),
    r"'method'(?s:.*)pointer is 1000000": lambda s: s["method"].update(
        {next(key for key in s["method"] if "pointer" in key): torch.tensor(1_000_000)}
    ),
    r"'network': it is list, not a dict": lambda s: s.update(network=[]),
    # the training state
    r"'progress': step is -3, not a number of steps": lambda s: s["progress"].update(step=-3),
    r"'progress': step is 2\.0, not": lambda s: s["progress"].update(step=2.0),
    r"'progress': best is missing": lambda s: s["progress"].pop("best"),
    r"'progress': best is 7": lambda s: s["progress"].update(best=7.0),
    r"'progress': curve is \[\{'step': 'x'\}\]": lambda s: s["progress"].update(curve=[{"step": "x"}]),
    r"'progress': loss is None": lambda s: s["progress"].update(loss=None),
    r"'progress': seconds is -1": lambda s: s["progress"].update(seconds=-1.0),
    r"'progress': before is nan": lambda s: s["progress"].update(before=float("nan")),
    r"'progress': threads is \[0\]": lambda s: s["progress"].update(threads=[0]),
    r"'progress': machines is \[1\]": lambda s: s["progress"].update(machines=[1]),
    r"'progress': calibration is \{\}": lambda s: s["progress"].update(calibration={}),
    r"'progress': judged is \[1\]": lambda s: s["progress"].update(judged=[1]),
}
"""What is said of a state -> how the state was changed."""


def test_every_missing_or_wrong_entry_is_named() -> None:
    state, components = trained(built("moco")), built("moco")
    for words, change in CHANGES.items():
        changed = copy.deepcopy(state)
        change(changed)
        with pytest.raises(InbatchError, match=f"The checkpoint does not fit this run.*{words}"):
            restored(components, changed)
    restored(components, state)


def test_incomplete_state_restores_no_part() -> None:
    state, components = trained(built("simclr")), built("simclr")
    before = copy.deepcopy(components.network.state_dict())
    state["progress"]["step"] = -1
    with pytest.raises(InbatchError, match="progress"):
        restored(components, state)
    assert all(torch.equal(x, before[key]) for key, x in components.network.state_dict().items())


def test_clusters_outside_their_number_are_named() -> None:
    state, components = trained(built("pcl")), built("pcl")
    key = next(key for key in state["method"] if "assignment" in key)
    state["method"][key] += 1000
    with pytest.raises(InbatchError, match=r"'method'(?s:.*)assignment is not a number of 0 to"):
        restored(components, state)


def test_a_parameter_without_gradient_needs_no_state() -> None:
    components, other = built("simclr"), built("simclr")
    for one in (components, other):
        one.encoder.register_parameter("unused", torch.nn.Parameter(torch.ones(2, 2)))
        one.optimizer.param_groups[0]["params"].append(one.encoder.unused)
    restored(other, trained(components))
