"""Test of the gradient of a loss against differences of its value."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inbatch.testing.report import Finding
from inbatch.testing.trial import Trial


class Constants(TorchFunctionMode):
    """Record what the loss detaches or computes under no_grad, or return the recorded values.

    Attributes:
        values: The recorded values.
        narrow: A float64 value was rounded to fewer bits.
    """

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        super().__init__()
        self.values = recorded or []
        self.narrow = False
        self._replay, self._next, self._no_grad = recorded is not None, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch._C._set_grad_enabled:
            self._no_grad = not args[0]
        floats = {x.dtype for x in _tensors(result) if x.is_floating_point()}
        self.narrow |= any(x.dtype == torch.float64 for x in inputs) and bool(floats - {torch.float64})
        hidden = torch.is_inference_mode_enabled() or (self._no_grad and not torch.is_grad_enabled())
        constant = func in (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
        if constant or (hidden and any(x.requires_grad for x in inputs)):
            return self._constant(result)
        return result

    def _constant(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._constant, value))
        if not isinstance(value, Tensor):
            return value
        if self._replay:
            self._next += 1
            kept = self.values[self._next - 1]
            return kept.clone().requires_grad_(kept.requires_grad)  # so that the same operations are recognised
        self.values.append(value.detach().clone().requires_grad_(value.requires_grad))
        return value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for one in value for x in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []


def derivative(trial: Trial) -> Finding:
    """Compare the gradient with differences of the loss, in float64; what the loss detaches is constant.

    A loss that rounds to float32 is moved further, and compared less exactly. In float64 the distances decrease: the
    derivative of a loss of sorted rows changes in many places.
    """
    method, online, target, batch = trial.rows()
    base = Constants()
    leaves = {name: x.clone().requires_grad_() for name, x in online.items()}
    again = [copy.deepcopy(method) for _ in range(7)]
    with base:
        value = again[0].loss(leaves, target, batch)["loss"]
    value.backward()
    gaps, (width, tolerance) = [], (1e-3, 1e-2) if base.narrow else (1e-6, 1e-4)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        along = {
            name: torch.randn(x.shape, generator=g, dtype=x.dtype) * x.std().clamp(min=1e-6)
            for name, x in online.items()
        }
        ends, step = [], width if base.narrow else width / 10**seed
        for h in (step, -step):
            moved = {name: (x + h * along[name]).requires_grad_() for name, x in online.items()}
            with Constants(base.values):
                end = again.pop().loss(moved, target, batch)["loss"]
            ends.append(float(end.detach()))
        slope = (ends[0] - ends[1]) / (2 * step)
        exact = sum(float((x.grad * along[name]).sum()) for name, x in leaves.items() if x.grad is not None)
        gaps.append(abs(slope - exact) / max(abs(slope), abs(exact), 1e-3))
    if min(gaps) > tolerance:
        return Finding("gradient", False, f"the gradient is not the derivative of the loss (it differs by "
                       f"{min(gaps):.1%}): look for item(), numpy(), or a wrong backward of an autograd function; use "
                       "detach() for what is constant by intention")  # fmt: skip
    return Finding("gradient", True, "the gradient equals differences of the loss")
