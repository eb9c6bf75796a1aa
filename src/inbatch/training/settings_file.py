"""Read settings from YAML and JSON files, and from assignments on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from inbatch.errors import ConfigError
from inbatch.runtime.paths import path_of
from inbatch.training.registry import PARTS, Settings, shown


def read_file(path: str | Path) -> Settings:
    """Return settings from a YAML or JSON file, nested or dotted; raise ConfigError if it cannot be read."""
    try:
        with open(path_of(path, "config"), encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read the recipe {path}: {getattr(e, 'strerror', None) or e}") from None
    try:
        content = _plain(text)
    except ValueError as e:
        raise ConfigError(f"the recipe {path} is not valid YAML: {e}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"the recipe {path} is not a mapping of settings: write KEY: VALUE on each line")
    return read_settings(content)


def read_settings(content: Mapping[str, Any]) -> Settings:
    """Return a nested recipe as settings."""
    settings: Settings = {}
    for key, value in content.items():
        if isinstance(value, dict) and key != "own":
            settings |= {f"{key}.{name}": option for name, option in value.items()}
        elif key in (*PARTS, "schedule"):
            settings[f"{key}.name"] = value  # short for `method: {name: moco}`
        else:
            settings[str(key)] = value
    return settings


def parse_assignment(text: str) -> Settings:
    """Return "part.key=value" as a setting, with the value parsed as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, for example method.temperature=0.2, not {text!r}")
    try:
        parsed = _plain(value)
    except ValueError as e:
        raise ConfigError(
            f"--set {shown(text)}: the value cannot be read ({e}); put a text with special characters into quotes that "
            """the shell keeps: --set 'KEY="TEXT"'"""
        ) from None
    return {key.strip(): None if parsed == "None" else parsed}


_LONGEST, _DEEPEST = 2**17, 20  # characters, levels: above those of any real recipe
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster; PyYAML may be built without it


def _plain(text: str) -> Any:
    """Return the plain values of a YAML text; raise ValueError with the problem and its line otherwise.

    A few lines of aliases can expand to gigabytes, and the parser recurses as deep as a nested list: both are refused.
    """
    if len(text) > _LONGEST:
        raise ValueError("it is too long")
    depth = 0
    try:
        for event in yaml.parse(text, _LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
                raise ValueError(f"line {event.start_mark.line + 1}: no aliases, and no more than {_DEEPEST} levels")
        return yaml.load(text, _LOADER)
    except yaml.MarkedYAMLError as e:
        where = "" if e.problem_mark is None else f"line {e.problem_mark.line + 1}: "
        raise ValueError(f"{where}{e.problem}") from None
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as e:  # `!!int x`, `!!timestamp x`, ...
        raise ValueError(str(e)) from None
