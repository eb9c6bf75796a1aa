"""Presets: named settings of a method, and those for every method."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from inbatch.errors import ConfigError
from inbatch.methods.base import Method
from inbatch.runtime import own_parts
from inbatch.training.registry import PARTS, Settings, check_known, maker_of, without_rates

_CANVAS = {
    "encoder.name": "tiny", "optimizer.name": "adamw", "optimizer.lr": 2e-3, "optimizer.weight_decay": 1e-4,
    "schedule.scaling": "none", "schedule.warmup_epochs": 2, "batch_size": 128, "epochs": 60, "knn_k": 20,
}  # fmt: skip
SHARED_PRESETS: dict[str, Settings] = {
    "none": {},
    "fast": {
        "source": "inbatch: the highest accuracy in an hour on a laptop's CPU (docs/fast.md)",
        "encoder.name": "fast",
        "encoder.whiten": True,
        "encoder.whiten_patches": True,
        "views.name": "simclr_cifar",
        "views.min_scale": 0.2,
        "optimizer.name": "adamw",
        "optimizer.lr": 3e-3,
        "optimizer.weight_decay": 1e-4,
        "schedule.scaling": "none",
        "schedule.warmup_epochs": 1,
        "batch_size": 128,
        "epochs": 30,
        "grow_from": 0.5,
        "grow_until": 0.66,
    },
    "digits": _CANVAS | {"views.name": "digits"},
    "digits-colour": _CANVAS | {"views.name": "digits_colour"},
}
"""Presets of every method: none, the one for a time budget, and those of the embedded data.

A method's own "digits" overrides them. knn_k is 20 there, because 130 images per class are fewer than 200 neighbours.
"""


def method_named(name: str) -> type[Method]:
    """Return a method by name; raise ConfigError with a suggestion if it is unknown."""
    method: type[Method] = maker_of("method", name, "method")
    return method


def presets_of(method: Any) -> dict[str, dict[str, Any]]:
    """Return the presets of a method; none for a user's own one that is not in use, whose recipe is complete."""
    return {} if _is_absent(method) else method_named(method).presets


def _is_absent(method: Any) -> bool:
    """Return whether a method is code of the user that is not in use."""
    return own_parts.is_own(method) and own_parts.find("method", method) is None


def default_method(settings: Mapping[str, Any]) -> Any:
    """Return the name of the method of these settings; without one, that for a teacher if there is a teacher."""
    return settings.get("method.name", "simclr" if settings.get("teacher") is None else "relation")


def natural_preset(data: str, size: float) -> str:
    """Return the default preset: by the name of an embedded data set, else by the size of the images."""
    embedded = {"digits-canvas": "digits", "digits-canvas-colour": "digits-colour"}
    return embedded.get(data) or ("cifar" if size <= 64 else "imagenet")


WRITTEN = {"encoder.name", "method.name", "optimizer.name", "seed", "epochs", "checkpoint_every", "sync_norm", "knn_k"}
"""Some of the settings that the file of every run holds, and no user writes all of."""


def with_preset(settings: Mapping[str, Any]) -> Settings:
    """Return the settings, completed by those of their preset and by the names of the parts."""
    method = default_method(settings)
    own = presets_of(method)
    size = finite_number(settings.get("image_size", 224))
    natural = natural_preset(str(settings.get("data")), size)
    preset = settings.get("preset", natural if natural in SHARED_PRESETS | own else "none")
    if not _is_absent(method):  # the preset can be the method's own
        check_known("preset", preset, SHARED_PRESETS | own)
    base = {"method.name": method, "views.name": "simclr_cifar" if size <= 64 else "simclr", "encoder.name": "resnet18"}
    base |= {"optimizer.name": "sgd", "optimizer.lr": 0.03, "optimizer.weight_decay": 1e-4}
    for rate in without_rates(settings.get("optimizer.name")):
        del base[f"optimizer.{rate}"]
    values = SHARED_PRESETS.get(preset, {}) | own.get("digits" if preset.startswith("digits") else preset, {})
    values.pop("source", None)  # for the user only
    if preset == "fast" and "fast" not in own:  # the method's own options are those for small images
        values |= {key: value for key, value in own.get("cifar", {}).items() if key.startswith("method.")}
    # The preset's options of a part do not apply to another part.
    for part in PARTS:
        name = settings.get(f"{part}.name")
        if name is not None and name != values.get(f"{part}.name", base.get(f"{part}.name")):
            values = {key: value for key, value in values.items() if not key.startswith(f"{part}.")}
    if settings.keys() >= WRITTEN:  # the recipe of a run is complete: a later preset adds no option to its encoder
        values = {key: value for key, value in values.items() if not key.startswith("encoder.")}
    if own_parts.is_own(method) and not _is_absent(method):
        _check_options(method, preset, values.keys() - settings.keys())
    return base | values | {"preset": preset} | dict(settings)


def _check_options(method: str, preset: str, keys: Iterable[str]) -> None:
    """Raise ConfigError if a preset that a user's own method inherits sets options that its constructor lacks."""
    arguments = inspect.signature(method_named(method)).parameters
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return
    for key in sorted(keys):
        if key.startswith("method.") and key not in ("method.name", *(f"method.{name}" for name in arguments)):
            raise ConfigError(
                f"preset {preset}, which {method} inherits, sets {key}, and its constructor has no such argument: "
                "define `presets` in the class (presets = {} for none), or choose preset none"
            )


def finite_number(value: Any) -> float:
    """Return a finite number for computations; invalid values become 100 and are left to validation."""
    try:
        return number if math.isfinite(number := float(value)) else 100.0
    except (TypeError, ValueError, OverflowError):
        return 100.0
