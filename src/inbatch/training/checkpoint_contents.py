"""Check the saved state of a run to its leaves: every entry is there, with its type, shape and range."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inbatch.runtime.sharding import local
from inbatch.training.train_state import TrainState


def problems_in(parts: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every entry of a saved state that these parts cannot be restored from.

    Args:
        parts: Parts of the run, as built, by name.
        state: Saved state of each of them.
    """
    problems: list[str] = []
    for name, part in parts.items():
        saved = state[name]
        if not isinstance(saved, dict):
            problems.append(f"in {name!r}: it is {_kind(saved)}, not a dict")
        elif isinstance(part, nn.Module):
            problems += (f"in {name!r}: {problem}" for problem in _module(part, saved))
        elif isinstance(part, TrainState):
            problems += (f"in {name!r}: {problem}" for problem in part.problems(saved))
    if problems:
        return problems
    for name, part in parts.items():
        if isinstance(part, Optimizer):
            problems += (f"in {name!r}: {problem}" for problem in _optimizer(part, parts, state, state[name]))
    return problems


def _module(module: nn.Module, saved: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a module's state; counters are never below their initial value."""
    own = module.state_dict()
    yield from (f"{key} is missing" for key in own if key not in saved)
    yield from (f"{key} is unexpected" for key in saved if key not in own)
    for key in (key for key in own if key in saved):
        if problem := _unlike(saved[key], own[key]):
            yield f"{key} {problem}"
        elif isinstance(own[key], Tensor) and not own[key].is_floating_point() and own[key].numel():
            lowest = min(0, int(own[key].min()))
            if int(saved[key].min()) < lowest:
                yield f"{key} is {int(saved[key].min()):,}, below {lowest}"


def _optimizer(
    optimizer: Optimizer, parts: Mapping[str, Any], state: Mapping[str, Any], saved: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the problems of an optimiser's state: its groups, and the state of every parameter that was trained."""
    own = optimizer.state_dict()
    if problems := list(_groups(optimizer, own["param_groups"], saved.get("param_groups"))):
        yield from problems
        return
    kept = saved.get("state")
    if not isinstance(kept, dict):
        yield "state is missing" if kept is None else f"state is {_kind(kept)}, not a dict"
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in own["param_groups"] for number in group["params"]]
    yield from (f"state.{number} is unexpected" for number in kept if number not in numbers)
    trained = _Trained(parts, state, bool(kept))
    templates = _templates(optimizer)
    for number, parameter in zip(numbers, parameters, strict=True):
        template, entry = templates[id(parameter)], kept.get(number)
        name = f"state.{number} ({trained.names.get(id(parameter), 'a parameter')})"
        if entry is None and template and trained.was(parameter):
            yield f"{name} is missing"
        elif entry is not None:
            yield from (f"{name}{problem}" for problem in _entry(entry, template, parameter, trained.steps))


def _groups(optimizer: Optimizer, own: list[dict[str, Any]], saved: Any) -> Iterator[str]:
    """Yield the problems of parameter groups; only the rates, which the schedule sets at every step, may differ."""
    if not isinstance(saved, list) or len(saved) != len(own) or not all(isinstance(group, dict) for group in saved):
        yield f"param_groups is not a list of {len(own)} groups"
        return
    for i, (group, there) in enumerate(zip(own, saved, strict=True)):
        if there.get("params") != group["params"]:
            yield f"param_groups.{i}.params are not the {len(group['params'])} parameters of the recipe"
            return
    probe = copy.copy(optimizer)  # an older version of torch saved fewer keys, to which torch adds the defaults
    probe.load_state_dict({"state": {}, "param_groups": saved})
    for i, (group, there) in enumerate(zip(own, probe.param_groups, strict=True)):
        for key, value in group.items():
            if key == "params":
                continue
            if key not in there:
                yield f"param_groups.{i}.{key} is missing"
            elif key in ("lr", "weight_decay"):
                if type(there[key]) not in (int, float) or not 0 <= there[key] < float("inf"):
                    yield f"param_groups.{i}.{key} is {there[key]!r}, not a number of at least 0"
            elif key not in ("foreach", "fused", "capturable") and there[key] != value:  # these depend on the device
                yield f"param_groups.{i}.{key} is {there[key]!r}, and the recipe's is {value!r}"


class _Trained:
    """Which parameters of a run have been trained: their saved values differ from the initial ones.

    A parameter without gradient keeps its initial value and has no state in the optimiser.
    """

    def __init__(self, parts: Mapping[str, Any], state: Mapping[str, Any], any_state: bool) -> None:
        self.names: dict[int, str] = {}
        self._saved: dict[int, Tensor] = {}
        self._any_state = any_state
        progress = state.get("progress")
        step = progress.get("step") if isinstance(progress, dict) else None
        self.steps: int | None = step if type(step) is int else None
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                for key, parameter in part.named_parameters():
                    self.names.setdefault(id(parameter), key)
                    self._saved.setdefault(id(parameter), state[name][key])

    def was(self, parameter: Tensor) -> bool:
        """Return whether a parameter was trained; after the first step, at least one was."""
        if not self._any_state and self.steps:
            return True
        saved = self._saved.get(id(parameter))
        return saved is not None and not torch.equal(local(saved).cpu(), local(parameter.detach()).cpu())


def _templates(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Return the state that the optimiser keeps for each parameter, by id, from one step of small parameters."""
    probe = copy.copy(optimizer)
    probe.state, probe.param_groups = defaultdict(dict), []
    small: dict[tuple[int, int], nn.Parameter] = {}
    for g, group in enumerate(optimizer.param_groups):
        first = {p.ndim: p for p in group["params"]}
        for ndim, p in first.items():
            small[g, ndim] = nn.Parameter(torch.zeros((2,) * ndim, dtype=p.dtype, device=p.device))
            small[g, ndim].grad = torch.zeros_like(small[g, ndim])
        probe.param_groups.append(group | {"params": [small[g, ndim] for ndim in first]})
    probe.step()
    return {
        id(p): probe.state.get(small[g, p.ndim], {})
        for g, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }


def _entry(entry: Any, template: Mapping[str, Any], parameter: Tensor, steps: int | None) -> Iterator[str]:
    """Yield the problems of the optimiser's state of one parameter."""
    if not isinstance(entry, dict):
        yield f" is {_kind(entry)}, not a dict"
        return
    yield from (f".{key} is missing" for key in template if key not in entry)
    yield from (f".{key} is unexpected" for key in entry if key not in template)
    for key in (key for key in template if key in entry):
        expected = template[key]
        if isinstance(expected, Tensor) and expected.ndim and expected.ndim == parameter.ndim:
            # as large as the parameter, but where the optimiser reduces a dimension to 1 (Adafactor)
            shape = [n if small > 1 else 1 for small, n in zip(expected.shape, parameter.shape, strict=True)]
            expected = torch.empty(shape, dtype=expected.dtype, device="meta")
        if problem := _unlike(entry[key], expected):
            yield f".{key} {problem}"
        elif key == "step" and not 0 <= float(entry[key]) <= (float("inf") if steps is None else steps):
            yield f".step is {float(entry[key]):g}, outside 0 to {steps}"


def _unlike(saved: Any, own: Any) -> str | None:
    """Return how a saved value differs from the run's in type, dtype or shape; None if it does not."""
    if isinstance(own, Tensor) and isinstance(saved, Tensor):
        if saved.shape == own.shape and saved.dtype == own.dtype:
            return None
        return f"is {_kind(saved)}, not {_kind(own)}"
    return None if type(saved) is type(own) else f"is {_kind(saved)}, not {_kind(own)}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
