"""Parse the command line of a variant of a comparison with the options of `inbatch pretrain` itself."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from inbatch.apps.cli.app import usual_option, with_values
from inbatch.apps.cli.own_code import typed
from inbatch.apps.cli.pretrain_options import pretrain_settings
from inbatch.apps.cli.training import pretrain
from inbatch.errors import ConfigError
from inbatch.runtime.own_parts import OwnPart

_OF_COMPARISON = {
    "data": "--data of the comparison", "image_column": "--set image_column=NAME of the comparison",
    "label_column": "--set label_column=NAME of the comparison",
    "group_column": "--set group_column=NAME of the comparison", "seed": "--seeds of the comparison",
    "budget": "--budget of the comparison, which is divided over its runs", "out": "--out of the comparison",
    "device": "--device of the comparison", "download": "--download of the comparison",
}  # fmt: skip
"""Option that all variants share -> where it is set."""
_SETTINGS = (
    "method", "own_method", "preset", "encoder", "views", "init", "init_min_match", "image_size", "batch_size",
    "context", "epochs", "optimizer", "lr", "precision", "fuse", "attend", "curate", "mix", "crops",
    "shuffle_groups", "compile", "config", "set_", "teacher", "negatives", "sampler",
)  # fmt: skip
"""Options that a variant may set."""


@dataclass(frozen=True)
class ParsedVariant:
    """A command line of `inbatch pretrain` as its options.

    Attributes:
        config: The settings file.
        fields: Settings by name, with the method; parts are names.
        settings: Dotted settings.
        code: Parts that are code of the user, by part; imported, because they are typed.
    """

    config: Path | None
    fields: dict[str, Any]
    settings: dict[str, Any]
    code: dict[str, OwnPart]


def parse_variant(text: str) -> ParsedVariant:
    """Return the options of "pretrain simclr --fuse conv".

    Raises:
        ConfigError: If the text is not a command line of `inbatch pretrain`, or sets what all variants share.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"variant {text!r}: {error}") from None
    words = words[1:] if words[:1] == ["inbatch"] else words
    if words[:1] != ["pretrain"]:
        raise ConfigError(f'variant {text!r}: write the command of a run in quotes, such as "pretrain simclr"')
    single = typer.Typer(add_completion=False)
    single.command(context_settings={"help_option_names": []})(pretrain)
    try:
        context = typer.main.get_command(single).make_context("pretrain", with_values(words[1:]))
    except Exception as error:  # of typer's copy of click, or of click
        if not hasattr(error, "format_message"):
            raise
        option = getattr(error, "option_name", None) or ""
        usual = usual_option(error)
        problem = f"No such option: {option}; use {usual}" if usual else error.format_message()
        raise ConfigError(f"variant {text!r}: {problem}") from None
    options = context.params
    for name in options:
        source = context.get_parameter_source(name)
        if name not in _SETTINGS and source is not None and source.name == "COMMANDLINE":
            flag = next(p.opts[0] for p in context.command.params if p.name == name)
            where = _OF_COMPARISON.get(name)
            raise ConfigError(
                f"variant {text!r}: {flag} is not part of a variant; "
                + (f"use {where}" if where else "leave it out, it does not change what is learned")
            )
    if options["method"] is not None and options["own_method"] is not None:
        raise ConfigError(f"variant {text!r}: it names two methods; leave out one of them")
    try:
        names, more, code = _own_code(options | {"method": options["own_method"] or options["method"]})
        fields, settings = pretrain_settings(options | names)
    except ConfigError as error:
        raise ConfigError(f"variant {text!r}: {error}") from None
    if names["method"] is not None:
        fields["method"] = names["method"]
    return ParsedVariant(options["config"], fields, more | settings, code)


def _own_code(options: Mapping[str, Any]) -> tuple[dict[str, str | None], dict[str, Any], dict[str, OwnPart]]:
    """Return the names of the parts, the settings that follow from parts that are code of the user, and these parts."""
    from inbatch.training.own_requests import PASSED, requested_part

    names, settings, code = dict[str, str | None](), dict[str, Any](), dict[str, OwnPart]()
    for part in PASSED:
        value = typed(part, options[part])
        names[part] = value
        if value is not None:
            names[part], more, own = requested_part(part, value)
            settings |= {f"{part}.{key}": option for key, option in more.items()}
            code |= {} if own is None else {part: own}
    return names, settings, code
