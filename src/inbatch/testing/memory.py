"""What a method holds: buffers that are saved, and everything else that could hold state."""

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inbatch.methods.base import Method

_MODULE = set(vars(nn.Module())) | {"training"}
_DEEP = 6


def buffers(method: Method) -> dict[str, Tensor]:
    """Return a copy of the state that is saved."""
    return {name: x.detach().clone() for name, x in method.state_dict().items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of values that differ."""
    return sorted(name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name)))


def attributes(method: nn.Module) -> dict[str, Any]:
    """Return a copy of everything that is not saved: plain attributes, those of the class, and unsaved buffers."""
    held: dict[str, Any] = {}
    for path, module in method.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name not in _MODULE:
                held[f"{prefix}{name}"] = _copied(value)
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                held[f"{prefix}{name}"] = _copied(buffer)
    for owner in type(method).__mro__:
        if owner in (Method, nn.Module):
            break
        for name, value in vars(owner).items():
            if not name.startswith("__") and isinstance(value, list | dict | set | deque | Tensor | np.ndarray | int):
                held.setdefault(f"{owner.__name__}.{name}", _copied(value))
    return held


def _copied(value: Any, depth: int = 0) -> Any:
    """Return a value that changes only if the contents change, made of tuples, tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if depth == _DEEP:
        return id(value)
    if isinstance(value, dict):
        return tuple((repr(key), _copied(x, depth + 1)) for key, x in value.items())
    if isinstance(value, list | tuple | deque):
        return tuple(_copied(x, depth + 1) for x in value)
    if isinstance(value, set | frozenset):
        return repr(sorted(map(repr, value)))
    if isinstance(value, nn.Module):  # in a list or dict, where torch does not see it
        return tuple(_copied(x, depth + 1) for x in value.state_dict().values())
    own = getattr(value, "__dict__", None)
    if own and not callable(value):
        return tuple((name, _copied(x, depth + 1)) for name, x in own.items())
    return repr(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def trainable(method: Method) -> list[str]:
    """Return the names of trainable tensors of a method, also of those in plain attributes."""
    names = [name for name, _ in method.named_parameters()]
    for path, module in method.named_modules():
        for name, value in vars(module).items():
            if name not in _MODULE and any(_is_trainable(x) for x in _values(value)):
                names.append(f"{path}.{name}".lstrip("."))
    return names


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_trainable(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(p.requires_grad for p in value.parameters())
    return isinstance(value, Tensor) and value.requires_grad
