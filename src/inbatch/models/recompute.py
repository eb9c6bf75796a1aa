"""Activation checkpointing: the backward pass computes the blocks of an encoder again instead of keeping their output.

The blocks are also the units of a sharded encoder (`runtime.sharding`).
"""

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from inbatch.errors import ConfigError
from inbatch.models.encoder import Encoder
from inbatch.models.layers import weighted_parts


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a module, in its order; its parts with weights if none is repeated.

    Blocks are the elements of a list of at least two modules of one class that consist of others.
    """
    return _repeated(module) or [unit for _, part in weighted_parts(module) for unit in _elements(part)]


def _elements(module: nn.Module) -> list[nn.Module]:
    """Return the modules with weights in a list, which models may call one by one; a module that is none, alone."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return [module] if any(True for _ in module.parameters()) else []
    return [unit for part in module for unit in _elements(part)]


def _repeated(module: nn.Module) -> list[nn.Module]:
    inner = [block for child in module.children() for block in _repeated(child)]
    if inner or not isinstance(module, nn.ModuleList | nn.Sequential):
        return inner
    parts = [part for part in module if any(True for _ in part.parameters())]
    alike = len({type(part) for part in parts}) == 1 and all(any(True for _ in part.children()) for part in parts)
    return parts if len(parts) > 1 and alike else []


def recompute_activations(encoder: Encoder) -> None:
    """Let the encoder keep only the input of each block, and compute the block again in the backward pass.

    Models of timm do so themselves. Random numbers of the second pass are those of the first.

    Raises:
        ConfigError: If the encoder has no blocks.
    """
    backbone: Any = encoder.backbone
    setter = getattr(backbone, "set_grad_checkpointing", None)
    if setter is not None:
        try:
            setter(True)
        except AssertionError as error:
            raise ConfigError(
                f"checkpoint_activations: timm does not offer it for {encoder.name} ({error}): leave it out"
            ) from None
        return
    units = [unit for unit in blocks(backbone) if not isinstance(unit, nn.modules.batchnorm._BatchNorm)]
    if len(units) < 2:
        raise ConfigError(
            f"checkpoint_activations: {encoder.name} is one block, so that nothing would be saved: leave it out"
        )
    for unit in units:
        unit.__class__ = _recomputed(type(unit))


def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose forward pass is computed again in the backward pass; a copy of a module is one, too."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(kind.forward, self), *args, use_reentrant=False, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})
