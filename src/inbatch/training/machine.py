"""What decides the rounding of a run apart from its recipe: recorded with the run, and compared when it is resumed."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from inbatch.data.decoding.image_file import decoders
from inbatch.data.views import numba_backend
from inbatch.nn.cpu_matmul import onednn
from inbatch.runtime.environment import environment

STEP_RULES = 2
"""Incremented if a step of the same recipe gives other weights than before.

2: right gradients of the convolutions of batch fusion in the memory layout channels-last.
"""

_IRRELEVANT = ("allocator", "commit", "cores", "platform")
"""Entries that do not change a number, or belong to the version of inbatch."""


def machine(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """Return the environment of this process, and by what it decodes images, draws views and computes products.

    Args:
        device: Device of the networks.
        precision: Precision of the networks, which `precision: auto` chooses by the hardware.
    """
    on_cpu = device.type == "cpu"
    return environment(device) | {
        "precision": str(precision).removeprefix("torch."),
        "decoders": decoders(),
        "step rules": STEP_RULES,
        "views": "compiled kernel" if on_cpu and numba_backend.available() else "torch",
        "float32 products": "oneDNN" if on_cpu and onednn() else "torch",
    }


def record(machines: list[dict[str, Any]], now: dict[str, Any]) -> str:
    """Add the environment of this process to those of a run; return what differs from the one before, if anything."""
    before = machines[-1] if machines else now
    if not machines or before != now:
        machines.append(now)
    changes = list(_changes(before, now))
    if not changes:
        return ""
    return (
        f"This process differs from the one before in {', '.join(changes)}. The run has the same images and views, and "
        "results equal to rounding, not to the bit."
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], name: str = "") -> Iterator[str]:
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if old == new or (not name and key in _IRRELEVANT):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{key} ")
        else:
            yield f"{name}{key} ({_shown(old)} before, {_shown(new)} now)"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
