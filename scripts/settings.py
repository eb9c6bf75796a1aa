"""Write docs/settings.md: every setting of a recipe with its meaning, default and source, read from the code.

    python scripts/settings.py            write the page
    python scripts/settings.py --check    exit with 1 if the page is not current

Names, types and defaults are those of the dataclass `Recipe` and of the constructors of its parts. Meanings are read
from their docstrings: entries "name: text" or "first, second: text", also below "Args:".
"""

import dataclasses
import functools
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from inbatch.apps.cli import app
from inbatch.apps.docstring_entries import split_entries
from inbatch.models import create_encoder
from inbatch.training.presets import SHARED_PRESETS
from inbatch.training.recipe import Recipe, Schedule
from inbatch.training.registry import OPTIONAL, PARTS, _model
from inbatch.training.renamed_keys import RENAMED

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "settings.md"

VIEW_MEANINGS = {
    "size": "side of the view in pixels; by default the recipe's `image_size`",
    "small_size": "side of the small views in pixels",
    "num_views": "number of views",
    "num_large_crops": "number of large views",
    "num_small_crops": "number of small views",
    "min_scale": "smallest area of a crop, as a share of the image",
    "cut": "area that separates large views from small ones, as a share of the image",
    "strength": "factor of the colour jitter",
    "blur": "probability of the Gaussian blur",
    "blur_second": "probability of the Gaussian blur in the second view",
    "grey": "probability of greyscale",
    "solarise": "probability of solarisation in the first view",
    "solarise_second": "probability of solarisation in the second view",
    "centre": "side of the centred square, as a share of the shorter side of the image",
}
"""Options that several presets of views share, for those whose docstring does not explain them."""
OPTIMIZER_MEANINGS = {
    "lr": "learning rate, scaled by `schedule.scaling`",
    "weight_decay": "weight decay; biases and norm parameters have none",
    "vector_lr": "learning rate of biases and norm parameters; null: `lr`",
    "layer_decay": "ratio of the learning rates of successive layers of the encoder, from its output to its input; the "
    "heads have the full rate",
    "momentum": "momentum of the gradient's running mean",
    "eta": "trust coefficient: the norm of an update is at most this share of the norm of the weights",
}
"""Options of the optimisers that their docstrings do not explain."""
ATTENTION_MEANINGS = {"stages": "residual stages that get a block, counted from 1; null: all of them"}
"""Options of every attention block."""
TITLES = {
    "method": "Methods",
    "views": "Views",
    "encoder": "Encoder",
    "optimizer": "Optimisers",
    "schedule": "Schedule",
    "fuse": "Batch fusion",
    "curate": "Batch curation",
    "attend": "Attention",
    "negatives": "Negatives",
    "mix": "Mixing",
    "sampler": "Sampler",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a table."""

    key: str
    default: str
    type: str
    meaning: str


def read_meanings(doc: str, names: Iterable[str]) -> dict[str, str]:
    """Return the text of each name that a docstring explains."""
    _, entries = split_entries(doc, names)
    return {name: text.rstrip(".;") for keys, text in entries.items() for name in keys.split(", ")}


def describe_type(hint: Any) -> str:
    """Return a type for readers of recipes, with its bounds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe_type(arguments[0]) + "".join(describe_bounds(arguments[1:]))
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is tuple:
        kinds = [describe_type(kind) for kind in arguments if kind is not Ellipsis]
        return f"list of {kinds[0]}" if Ellipsis in arguments else f"[{', '.join(kinds)}]"
    words = {type(None): "null", str: "text", int: "integer", float: "number", bool: "true or false"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def describe_bounds(metadata: Iterable[Any]) -> Iterator[str]:
    """Yield the bounds that pydantic checks; the bound that only refuses absurd numbers is left out."""
    for field in metadata:
        for bound in getattr(field, "metadata", ()):
            for sign, name in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
                value = getattr(bound, name, None)
                if value is not None and value < 2**31 - 1:
                    yield f", {sign} {value}"


def show(value: Any) -> str:
    """Return a value as `--set` takes it."""
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:g}"
    return json.dumps(value) if not isinstance(value, str) else value


def settings_of(maker: Callable[..., Any], part: str, name: str, fallback: dict[str, str]) -> list[Setting]:
    """Return the settings of one method, plug-in, optimiser or preset of views."""
    fields = _model(part, name, maker).model_fields
    target = maker.func if isinstance(maker, functools.partial) else maker
    if target.__module__.startswith("torch."):  # whose options differ from version to version
        fields = {key: fields[key] for key in ("lr", "weight_decay", "vector_lr")}
        meanings: dict[str, str] = {}
    else:
        meanings = read_meanings(inspect.getdoc(target) or "", fields)
    rows = []
    for key, field in fields.items():
        default = "required" if field.is_required() else f"`{show(field.default)}`"
        kind = describe_type(field.annotation) + "".join(describe_bounds([field]))
        rows.append(Setting(f"{part}.{key}", default, kind, meanings.get(key, fallback.get(key, ""))))
    return rows


def dataclass_settings(cls: type, prefix: str = "") -> list[Setting]:
    """Return the settings that the fields of a dataclass are."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    meanings = read_meanings(cls.__doc__ or "", fields)
    rows = []
    for name, field in fields.items():
        if name not in (*PARTS, "schedule"):
            makes = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if makes else field.default
            default = "required" if value is dataclasses.MISSING else f"`{show(value)}`"
            rows.append(Setting(prefix + name, default, describe_type(hints[name]), meanings.get(name, "")))
    return rows


def encoder_settings() -> list[Setting]:
    """Return the settings of the encoder, without those that the recipe states elsewhere."""
    signature = inspect.signature(create_encoder)
    hints = typing.get_type_hints(create_encoder)
    own = [key for key in signature.parameters if key not in ("name", "size", "channels", "check", "kwargs")]
    meanings = read_meanings(inspect.getdoc(create_encoder) or "", own)
    rows = []
    for key in own:
        if not key.startswith("attend"):
            kind = describe_type(hints[key]).replace("Sequence", "list of number").replace(" or Encoder", "")
            default = f"`{show(signature.parameters[key].default)}`"
            rows.append(Setting(f"encoder.{key}", default, kind.replace("Path", "path"), meanings.get(key, "")))
    lora = "rank of [LoRA](adapt.md#lora) in frozen linear layers; null: all weights are trained"
    return [*rows, Setting("encoder.lora", "`null`", "integer or null, ≥ 1", lora)]


def table(rows: list[Setting]) -> list[str]:
    """Return the rows as a Markdown table."""
    lines = ["| setting | default | type | meaning |", "| --- | --- | --- | --- |"]
    for row in rows:
        first, rest = row.meaning[:1], row.meaning[1:]
        meaning = row.meaning if re.match(r"[\w]*[._]\w", row.meaning) else first.upper() + rest
        cells = (f"`{row.key}`", row.default, row.type, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, ""]


def summary(maker: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring, up to the first explained setting."""
    target = maker.func if isinstance(maker, functools.partial) else maker
    if target.__module__.startswith("torch."):
        return f"PyTorch's `torch.optim.{target.__name__}`. Its other arguments can be set by their names, too."
    paragraph = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=\w+(?:, \w+)*: )", paragraph)[0]


def location(maker: Callable[..., Any]) -> str:
    """Return the file and the name of the function or class that makes a part."""
    target = maker.func if isinstance(maker, functools.partial) else maker
    return f"`{target.__module__.replace('.', '/')}.py`, `{target.__name__}`"


def preset_lines(presets: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a list item for each preset: its source and its settings."""
    for name, preset in presets.items():
        values = ", ".join(f"`{key}={show(value)}`" for key, value in preset.items() if key != "source")
        if values:
            source = f" ({preset['source']})" if "source" in preset else ""
            yield f"- Preset `{name}`{source}: {values}"


def options() -> dict[str, str]:
    """Return the command-line options of `inbatch pretrain` by the setting that they set."""
    callback = next(info.callback for info in app.registered_commands if info.callback.__name__ == "pretrain")
    hints = typing.get_type_hints(callback, include_extras=True)
    flags = {"optimizer.lr": "--lr"}
    for field in dataclasses.fields(Recipe):
        information = typing.get_args(hints[field.name])[1] if field.name in hints else None
        if information is not None and type(information).__name__ == "OptionInfo":
            declared = [information.default, *(information.param_decls or ())]  # typer's default is the first one
            names = [name for name in declared if isinstance(name, str) and name.startswith("--")]
            option = next(iter(names), f"--{field.name.replace('_', '-')}")
            flags[f"{field.name}.name" if field.name in PARTS else field.name] = option
    return flags


def page() -> str:
    """Return the whole page."""
    lines = [
        "# Settings of a recipe",
        "",
        "<!-- Written by scripts/settings.py from the code; do not edit. -->",
        "",
        "A recipe is the complete configuration of a run. Every setting below can be set by",
        "`--set KEY=VALUE`, by a file (`--config`), or in Python",
        "(`inbatch.pretrain(..., settings={KEY: VALUE})`). The order of precedence, from the lowest: the",
        "defaults of this page, the preset, the file, the command line.",
        "`inbatch pretrain ... --dry-run` prints the resolved recipe. `null` (in a meaning: None) means that a",
        "setting is not set.",
        "",
        "## The run",
        "",
        "Source: `inbatch/training/recipe.py`, `Recipe`.",
        "",
        *table(dataclass_settings(Recipe)),
        "These settings have their own option on the command line:",
        "",
        *textwrap.wrap(
            ", ".join(f"`{option}` (`{key}`)" for key, option in options().items()) + ".", 100, break_on_hyphens=False
        ),
        "",
        "The parts below are chosen by name: `method.name`, `views.name`, `encoder.name`, `optimizer.name`,",
        "`schedule.name`, and, if they are used, the plug-ins `fuse.name`, `curate.name`, `attend.name`,",
        "`negatives.name`, `mix.name` and `sampler.name`.",
        "",
        "Presets for every method:",
        "",
        *preset_lines(SHARED_PRESETS),
        "",
        "## Schedule",
        "",
        "Source: `inbatch/training/recipe.py`, `Schedule`.",
        "",
        *table(dataclass_settings(Schedule, "schedule.")),
        "## Encoder",
        "",
        "Source: `inbatch/models/factory.py`, `create_encoder`. Any other key is an argument of the model.",
        "",
        *table(encoder_settings()),
    ]
    fallbacks = {"views": VIEW_MEANINGS, "optimizer": OPTIMIZER_MEANINGS, "attend": ATTENTION_MEANINGS}
    for part, makers in PARTS.items():
        if makers is None:
            continue
        lines += [f"## {TITLES[part]}", ""]
        if part in OPTIONAL:
            lines += [f"Optional: `{part}.name` is null by default.", ""]
        for name, maker in makers.items():
            lines += [f"### `{part}.name={name}`", "", summary(maker), "", f"Source: {location(maker)}.", ""]
            rows = settings_of(maker, part, name, fallbacks.get(part, {}))
            lines += table(rows) if rows else []
            if presets := list(preset_lines(getattr(maker, "presets", {}))):
                lines += [*presets, ""]
    lines += [
        "## Renamed settings",
        "",
        "An old name is an error that gives the present one. In the repository,",
        "`python scripts/migrate_recipes.py FILE-OR-RUN ...` renames them in settings files, run directories",
        "and records.",
        "",
        "| old name | present name |",
        "| --- | --- |",
        *(f"| `{old}` | `{new}` |" for old, new in RENAMED.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        sys.exit(0 if current else f"{PAGE.relative_to(ROOT)} is not current; run: python scripts/settings.py")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
