"""The state of a run whose tensors are divided over ranks: what goes into a checkpoint's shards, and back.

In the checkpoint itself, a divided tensor is replaced by its name in the shards, its shape and its type. The optimiser
is saved as it would be without division, so that a run can be resumed on one rank or on several.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inbatch.runtime.sharding import is_shard, is_sharded, part_of

_MARK = "tensor in shards"
Path = tuple[Any, ...]


def divide(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a state without its divided tensors, and these by name; the state itself if there is none."""
    shards: dict[str, Tensor] = {}

    def taken(path: Path, x: Any) -> Any:
        if not is_shard(x):
            return x
        name = "/".join(map(str, path))
        shards[name] = x
        return {_MARK: name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}

    plain: dict[str, Any] = _mapped(state, taken)
    return (_with_merged_groups(plain), shards) if shards else (dict(state), {})


def assemble(
    state: Mapping[str, Any], parts: Mapping[str, Any] | None, read: Callable[[dict[str, Tensor]], None]
) -> dict[str, Any]:
    """Return a saved state with its tensors, divided as those of the parts; whole on the CPU where these are not.

    Args:
        state: The state in a checkpoint, of a run with or without division.
        parts: Parts of the run that is to be restored, by name; None for none.
        read: Fills tensors by their names in the shards.

    Raises:
        ValueError: If the state describes no tensor of the shards.
    """
    like, wanted = dict(_templates(parts or {})), dict[str, Tensor]()

    def placed(path: Path, x: Any) -> Any:
        template = like.get(path, like.get(path[:3]))
        if isinstance(x, dict):
            shape, dtype = _described(x)
            if template is not None and template.shape == shape:
                wanted[x[_MARK]] = torch.empty_like(template, dtype=dtype)
            else:
                wanted[x[_MARK]] = torch.empty(shape, dtype=dtype)
            return wanted[x[_MARK]]
        if isinstance(x, Tensor) and template is not None and template.shape == x.shape:
            return part_of(x, template)
        return x

    whole: dict[str, Any] = _mapped(state, placed)
    if wanted:
        read(wanted)
    for name, part in (parts or {}).items():
        if isinstance(part, Optimizer) and _divided(part) and _is_optimizer(whole.get(name)):
            whole[name] = _split(whole[name], part)
    return whole


def _mapped(x: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return a nested state with every leaf changed; the description of a divided tensor is a leaf."""
    if isinstance(x, Mapping) and _MARK not in x:
        return {key: _mapped(value, change, (*path, key)) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_mapped(value, change, (*path, i)) for i, value in enumerate(x))
    return change(path, x)


def _described(x: Mapping[str, Any]) -> tuple[torch.Size, torch.dtype]:
    shape, dtype = x.get("shape"), getattr(torch, str(x.get("dtype")), None)
    if not (isinstance(shape, list) and isinstance(dtype, torch.dtype) and isinstance(x[_MARK], str)) or any(
        type(n) is not int or n < 0 for n in shape
    ):
        raise ValueError(f"describes no tensor of its shards: {dict(x)!r:.80}")
    return torch.Size(shape), dtype


def _templates(parts: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the divided tensors of parts by their place in a saved state; an optimiser's are like its parameters."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield from (((name, key), x) for key, x in part.state_dict().items() if is_shard(x))
        elif isinstance(part, Optimizer):
            parameters = [p for group in part.param_groups for p in group["params"]]
            order = _order(part.state_dict()["param_groups"])
            yield from (((name, "state", order[i]), p) for i, p in enumerate(parameters) if is_shard(p))


def is_divided(parts: Mapping[str, Any]) -> bool:
    """Return whether parts of a run have tensors that are divided over ranks."""
    return any(is_sharded(part) for part in parts.values() if isinstance(part, nn.Module))


def _divided(optimizer: Optimizer) -> bool:
    return any(is_shard(p) for group in optimizer.param_groups for p in group["params"])


def _is_optimizer(state: Any) -> bool:
    return isinstance(state, dict) and isinstance(state.get("state"), dict) and "param_groups" in state


def _alike(groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the groups of equal settings together, in the order of the first of each."""
    together: list[list[dict[str, Any]]] = []
    for group in groups:
        for same in together:
            if same[0] | {"params": None} == group | {"params": None}:
                same.append(group)
                break
        else:
            together.append([group])
    return together


def _order(groups: list[dict[str, Any]]) -> dict[int, int]:
    """Return the number of every parameter without division by its number with it (`optim.parameter_groups`)."""
    numbers = [number for same in _alike(groups) for group in same for number in group["params"]]
    return {number: i for i, number in enumerate(numbers)}


def _with_merged_groups(state: Any) -> Any:
    """Return a nested state in which those of optimisers are merged."""
    if _is_optimizer(state):
        return _merged(state)
    return {key: _with_merged_groups(x) for key, x in state.items()} if isinstance(state, dict) else state


def _merged(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimiser with the groups that it has without division."""
    groups = state["param_groups"]
    order = _order(groups)
    merged = [same[0] | {"params": [order[n] for group in same for n in group["params"]]} for same in _alike(groups)]
    entries = sorted(((order[n], x) for n, x in state["state"].items()), key=lambda entry: entry[0])
    return state | {"state": dict(entries), "param_groups": merged}


def _split(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a saved state without division with the groups of an optimiser that has it."""
    own = optimizer.state_dict()["param_groups"]
    back = {new: old for old, new in _order(own).items()}
    saved = state["param_groups"]
    same = _alike(own)
    if not isinstance(saved, list) or len(saved) != len(same):
        return state  # the check of the contents says so
    settings = {id(group): there for there, groups in zip(saved, same, strict=True) for group in groups}
    groups = [settings[id(group)] | {"params": group["params"]} for group in own]
    return state | {"state": {back.get(n, n): x for n, x in state["state"].items()}, "param_groups": groups}
