"""Variants of a comparison: command lines of `inbatch pretrain` as settings, and their product with a grid."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inbatch.apps.cli.variant import parse_variant
from inbatch.errors import ConfigError
from inbatch.runtime import own_parts
from inbatch.runtime.own_parts import OwnPart
from inbatch.training.recipe import Settings
from inbatch.training.requested_settings import merged_settings
from inbatch.training.settings_file import parse_assignment

SHARED = frozenset({
    "data", "test", "split", "subset", "channels", "classes", "levels", "image_column", "label_column", "group_column",
    "seed", "knn_k", "max_unreadable", "budget", "replans",
})  # fmt: skip
"""Settings that all variants share: images, evaluation, seeds, time."""
MOST = 200
"""Largest number of variants, with those of a grid."""


@dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    Attributes:
        name: The command line without "pretrain", followed by the values of the grid.
        settings: Requested settings, without those that all variants share.
        code: Parts that are code of the user, by part.
    """

    name: str
    settings: Settings
    code: Mapping[str, OwnPart] = field(default_factory=dict)


def variants_of(texts: Sequence[str], grid: Mapping[str, Sequence[Any]] | None = None) -> list[Variant]:
    """Return the variants of command lines, each with every combination of the values of a grid.

    Args:
        texts: Command lines such as "pretrain simclr --fuse conv".
        grid: Setting -> its values, {"method.temperature": [0.1, 0.2]}.

    Raises:
        ConfigError: For a command line that is invalid, a shared setting, or too many combinations.
    """
    grid = {} if grid is None else grid
    if not isinstance(grid, Mapping):
        raise ConfigError(f'grid is a dict of lists, such as {{"method.temperature": [0.1, 0.2]}}, not {grid!r:.60}')
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ConfigError('variants are a list of command lines, such as ["pretrain simclr", "pretrain byol"]')
    if not texts:
        raise ConfigError('a comparison needs variants: "pretrain simclr" "pretrain simclr --fuse conv"')
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"--grid {key} has no values: write {key}=0.1,0.2,0.5")
        _check_own({key: None}, f"--grid {key}")
    rows = [
        Variant(f"{variant.name} {_text(values)}".strip(), variant.settings | values, variant.code)
        for variant in map(_variant, texts)
        for values in (dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values()))
    ]
    if len(rows) > MOST:
        raise ConfigError(f"{len(rows):,} variants are more than {MOST}: use fewer values in --grid")
    if len(rows) < 2:
        raise ConfigError("a comparison needs at least two variants: add a command line, or a --grid")
    return rows


def _variant(text: str) -> Variant:
    parsed = parse_variant(text)
    try:
        with own_parts.using(parsed.code):
            own = merged_settings(None, None, parsed.settings, parsed.fields)
            _check_own(own, f"variant {text!r}")
            merged = merged_settings(None, parsed.config, parsed.settings, parsed.fields)
    except ConfigError as error:
        raise ConfigError(named(text, error)) from None
    name = re.sub(r"^\s*(inbatch\s+)?pretrain\b\s*", "", text).strip() or "pretrain"
    return Variant(name, {key: value for key, value in merged.items() if key not in SHARED}, parsed.code)


def code_of(variants: Sequence[Variant]) -> dict[str, OwnPart]:
    """Return the code of the user in variants, for `own_parts.using`: by part and name."""
    return {f"{part} {own.name}": own for variant in variants for part, own in variant.code.items()}


def _check_own(settings: Mapping[str, Any], name: str) -> None:
    for key in sorted(SHARED & settings.keys()):
        raise ConfigError(
            f"{name} sets {key}, which all variants share: "
            + ("use --seeds" if key == "seed" else "use --budget" if key == "budget" else f"use --set {key}=VALUE")
        )


def named(text: str, error: Exception) -> str:
    """Return the message of an error that names the variant, once."""
    message = str(error)
    return message if repr(text) in message else f"variant {text!r}: {message}"


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return "method.temperature=0.1,0.2" as a setting and its values, which are parsed as those of --set."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not (equals and key and values.strip()):
            raise ConfigError(f"--grid takes KEY=VALUE,VALUE, for example method.temperature=0.1,0.2, not {text!r}")
        if key in grid:
            raise ConfigError(f"--grid {key} is there twice: list all its values in one")
        parts = [part for part in re.split(r",(?![^\[]*\])", values)]
        parsed = [parse_assignment(f"{key}={part}")[key] for part in parts]
        double = next((part for part, value in zip(parts, parsed, strict=True) if parsed.count(value) > 1), None)
        if double is not None:
            raise ConfigError(f"--grid {key} holds {double.strip()} twice")
        grid[key] = parsed
    return grid


def _text(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())
