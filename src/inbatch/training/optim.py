"""Optimisers (LARS and those of torch), parameter groups, and learning-rate scaling."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError, closest
from inbatch.models.layers import layer_numbers
from inbatch.runtime import own_parts
from inbatch.runtime.sharding import is_shard, local, norms


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, 2017).

    The form of BYOL, Barlow Twins, VICReg and MoCo v3: d = g + wd p; d *= eta |p| / |d|; buffer = momentum buffer + d;
    p -= lr buffer. Parameters of one dimension or none (biases, norms) use d = g: no decay, no scaling. If a norm is 0,
    the factor is 1.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum of the buffer.
        weight_decay: Weight decay, wd.
        eta: Trust coefficient.
        lr_in_buffer: buffer = momentum buffer + lr d; p -= buffer, as in SimCLR's TensorFlow code; identical only if
            lr is constant.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 0.001,
        lr_in_buffer: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} = {value:g} is below 0")
        super().__init__(params, defaults | {"lr_in_buffer": lr_in_buffer})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one update; no value is read back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in params if p.ndim > 1]
            vectors = [p for p in params if p.ndim <= 1]
            params = matrices + vectors
            if not params:
                continue
            update = self._scaled(matrices, group["weight_decay"], group["eta"]) + _gradients(vectors)
            for p in params:
                if not self.state[p]:
                    self.state[p]["buffer"] = torch.zeros_like(p)
            buffers = [local(self.state[p]["buffer"]) for p in params]
            inner, outer = (group["lr"], 1.0) if group["lr_in_buffer"] else (1.0, group["lr"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, update, alpha=inner)
            torch._foreach_add_([local(p) for p in params], buffers, alpha=-outer)
        return loss

    @staticmethod
    def _scaled(matrices: list[Tensor], weight_decay: float, eta: float) -> list[Tensor]:
        """Return this rank's gradients with weight decay, each multiplied by the trust ratio of the whole tensor."""
        if not matrices:
            return []
        update = torch._foreach_add(_gradients(matrices), [local(p) for p in matrices], alpha=weight_decay)
        size, change = norms(matrices, matrices), norms(update, matrices)
        ratio = torch.where((size > 0) & (change > 0), eta * size / change, 1.0)
        torch._foreach_mul_(update, ratio.unbind())
        return list(update)


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in params if p.grad is not None]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lars": LARS,
    # All published recipes use a momentum of 0.9; torch's default is 0.
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def parameter_groups(
    modules: Mapping[str, nn.Module],
    *,
    lr: float,
    weight_decay: float,
    exclude_norm_and_bias: bool = True,
    vector_lr: float | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of named modules in as few groups as their settings allow.

    A group holds no parameters that are divided over ranks together with others (`runtime.sharding`).

    A group's "base_lr" and "base_weight_decay" are what `set_learning_rate` multiplies. A parameter shared by two
    modules belongs to the first.

    Args:
        modules: Modules by name.
        lr: Learning rate.
        weight_decay: Weight decay.
        exclude_norm_and_bias: Do not decay parameters of one dimension or none.
        vector_lr: Another learning rate for those parameters (Barlow Twins); None uses `lr`.
        own: Settings of a module by its name: "lr", "weight_decay", or "constant": True for a learning rate that no
            schedule changes (the predictor of SimSiam).
        scales: Factors of the learning rates of single parameters; 1 for the others (`layer_scales`).

    Raises:
        ConfigError: If a module or setting is unknown, or no parameter is trainable.
    """
    own, scales = own or {}, scales or {}
    settings = {"lr", "weight_decay", "constant"}
    if unknown := [name for name in own if name not in modules]:
        raise ConfigError(f"No part is called {', '.join(unknown)}: the parts are {', '.join(modules)}.")
    if unknown := sorted({key for chosen in own.values() for key in chosen} - settings):
        raise ConfigError(f"Unknown setting {', '.join(unknown)} of a part: use {', '.join(sorted(settings))}.")

    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, module in modules.items():
        chosen = own.get(name, {})
        for p in module.parameters():
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            vector = p.ndim <= 1
            rate = chosen.get("lr", vector_lr if vector and vector_lr is not None else lr)
            rate *= scales.get(p, 1.0)
            decay = 0.0 if vector and exclude_norm_and_bias else chosen.get("weight_decay", weight_decay)
            groups.setdefault((rate, decay, chosen.get("constant", False), is_shard(p)), []).append(p)
    if not groups:
        raise ConfigError(f"Nothing to train: no parameter of {', '.join(modules)} requires a gradient.")
    return [
        {
            "params": params,
            "lr": rate,
            "base_lr": rate,
            "weight_decay": decay,
            "base_weight_decay": decay,
            "constant": constant,
        }
        for (rate, decay, constant, _), params in groups.items()
    ]


def layer_scales(backbone: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of every parameter of a backbone: layer-wise learning-rate decay.

    The layer before the heads, which have the factor 1, has `decay`, the one before it decay^2 (Clark et al. 2020,
    arXiv 2003.10555; Bao et al. 2022, arXiv 2106.08254).

    Args:
        backbone: The backbone; `models.layers.layer_numbers` defines its layers.
        decay: Ratio of the learning rates of successive layers, from 0 to 1.
    """
    numbers = layer_numbers(backbone)
    count = max(numbers.values(), default=-1) + 1
    return {p: decay ** (count - numbers[name]) for name, p in backbone.named_parameters()}


def build_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return the named optimiser over the groups of `parameter_groups`; options are those of its constructor.

    Raises:
        ConfigError: If the name or an option is unknown; with a suggestion.
    """
    if name not in OPTIMIZERS:
        if (own := own_parts.find("optimizer", name)) is not None:
            return _own_optimizer(name, own.maker, groups, options)
        if own_parts.is_own(name):
            raise own_parts.demand("optimizer", name)
        raise ConfigError(f"Unknown optimiser {name!r}.{_suggest(name, OPTIMIZERS)}")
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params", "lr", "weight_decay"}
    for option in options:
        if option not in known:
            raise ConfigError(f"The optimiser {name} has no option {option!r}.{_suggest(option, known)}")
    others = {"fused", "foreach", "differentiable"} & set(options)
    if "fused" in known and not others and groups[0]["params"][0].is_cuda:
        options["fused"] = True  # one kernel for all parameters; no gain on a CPU
    # The groups contain the rates; torch requires a default nevertheless, which no group uses.
    return OPTIMIZERS[name](groups, lr=groups[0]["lr"], **options)


def _own_optimizer(
    name: str, maker: Callable[..., Any], groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimiser of the user's class or function over the groups of `parameter_groups`.

    A maker without a parameter `lr` (`weight_decay`) sets it itself; the schedule multiplies what it sets.

    Raises:
        ConfigError: If it makes something else than an optimiser of these parameters.
    """
    known = inspect.signature(maker).parameters
    own = [key for key in ("lr", "weight_decay") if key not in known]
    passed = [{key: value for key, value in group.items() if key not in own} for group in groups]
    rate = {} if "lr" in own else {"lr": groups[0]["lr"]}
    optimizer = maker(passed, **rate, **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"the optimizer {name} must make a torch.optim.Optimizer, not {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"the optimizer {name} needs a closure in its step, which a run does not have: choose another"
        )
    wanted = [[id(p) for p in group["params"]] for group in groups]
    if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != wanted:
        raise ConfigError(f"the optimizer {name} must keep the parameter groups that it gets, in their order")
    for group in optimizer.param_groups:
        for key in own:
            group.setdefault(key, 0.0)
            group[f"base_{key}"] = group[key]
    return optimizer


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = closest(word, known)
    return f" Did you mean {close[0]!r}?" if close else f" Choose from {', '.join(sorted(known))}."


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, decay_factor: float = 1.0) -> None:
    """Set every group to its base learning rate and base weight decay times the factors of this step.

    `optimizer` has the groups of `parameter_groups`; earlier calls have no effect on the result.
    """
    for group in optimizer.param_groups:
        if not group["constant"]:
            group["lr"] = group["base_lr"] * factor
        group["weight_decay"] = group["base_weight_decay"] * decay_factor


def scaled_lr(base: float, batch: int, rule: Literal["linear", "sqrt", "none"]) -> float:
    """Return the learning rate for a global batch.

    The rules are base * batch / 256 (Goyal et al., 2017), base * sqrt(batch) (Chen et al., 2020, appendix B.1), and
    base.

    Raises:
        ConfigError: For another rule.
    """
    rules = {"linear": base * batch / 256, "sqrt": base * math.sqrt(batch), "none": base}
    if rule not in rules:
        raise ConfigError(f"Unknown learning-rate rule {rule!r}.{_suggest(rule, rules)}")
    return rules[rule]
