"""Describe and print methods and plug-ins, with their options (`inbatch methods`, `inbatch plugins`)."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inbatch.apps.console import print_table, say
from inbatch.apps.docstring_entries import split_entries

if TYPE_CHECKING:  # at run time, every --help would import torch
    from inbatch.methods.base import Method
    from inbatch.runtime.own_parts import OwnPart


def explain_method(named: Any) -> dict[str, Any]:
    """Return one method for --json and the tables: by name, or the user's own part."""
    from inbatch.methods import METHODS
    from inbatch.runtime.own_parts import OwnPart, find
    from inbatch.training.presets import method_named

    own = named if isinstance(named, OwnPart) else None if named in METHODS else find("method", named)
    if own is None:
        return explain(named, method_named(named))
    return explain(own.name, own.maker, _origin(own))


def _origin(own: "OwnPart") -> str:
    return f"{own.file or 'memory'}{f', version {own.version}' if own.version else ''}"


def explain_methods() -> tuple[list[dict[str, Any]], list[dict[str, str]], dict[str, str]]:
    """Return every method, the encoders and sources of installed packages, and sentences on parts that are left out."""
    from inbatch.methods import METHODS
    from inbatch.runtime.own_parts import every_installed

    every = [explain(name, kind) for name, kind in METHODS.items()]
    installed, broken = every_installed("method")
    for name, own in installed.items():
        if name in METHODS:
            broken[name] = f"a method {name} of a package ({own.file}) is not used: the name is one of inbatch"
        else:
            every.append(explain_method(own))
    others = list[dict[str, str]]()
    for part in ("encoder", "source"):
        installed, unusable = every_installed(part)
        others += [{"part": part, "name": name, "origin": _origin(own)} for name, own in installed.items()]
        broken |= unusable
    return every, others, broken


def explain(name: str, kind: "type[Method]", origin: str = "inbatch") -> dict[str, Any]:
    """Return a method for --json and the tables, with default and description of each option by name."""
    doc, parameters = inspect.cleandoc(kind.__doc__ or ""), inspect.signature(kind).parameters
    options = _descriptions(doc, parameters)
    least, most = kind.views
    return {
        "name": name,
        "what": doc.partition("\n")[0],
        "views": f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}",
        "labels": kind.labels,
        "target_network": bool(kind.target),
        "options": {
            p.name: {"default": _default(p.default), "what": options.get(p.name, "")} for p in parameters.values()
        },
        "presets": kind.presets,
        "origin": origin,
    }


def _default(value: Any) -> Any:
    """Return the default of an option for JSON; a user's own method may have one that is not a plain value."""
    from inbatch.training.registry import is_plain

    if value is inspect.Parameter.empty:
        return "required"
    return value if is_plain(value) else str(value)


def print_methods(every: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, str]]) -> None:
    """Print a row per method, and the origin of every part that is not of inbatch."""
    rows = [
        (m["name"], m["what"], m["views"], _yes(m["target_network"]), _yes(m["labels"]), ", ".join(m["presets"]))
        for m in every
    ]
    print_table(("method", "what it is", "views", "target network", "labels", "presets"), rows)
    installed = [("method", m["name"], m["origin"]) for m in every if m["origin"] != "inbatch"]
    installed += [(part["part"], part["name"], part["origin"]) for part in others]
    if installed:
        say("", "Of installed packages:", "")
        print_table(("part", "name", "origin"), installed)
    say("", "Every method also has the preset fast, for a budget of time, and for the embedded data the presets digits")
    say("and digits-colour.")
    say("One method in detail: inbatch methods NAME")


def print_method(m: Mapping[str, Any]) -> None:
    """Print a method's options, and its presets with their sources."""
    say(f"{m['name']}: {m['what']}")
    if m["origin"] != "inbatch":
        say(f"from {m['origin']}")
    say(f"{m['views']} views; target network: {_yes(m['target_network'])}; learns from labels: {_yes(m['labels'])}", "")
    rows = ((f"method.{o}", str(option["default"]), option["what"]) for o, option in m["options"].items())
    print_table(("--set", "default", "what it is"), rows)
    for name, settings in m["presets"].items():
        say("", f"--preset {name}   {settings.get('source', '')}")
        say(*(f"    {key}: {value}" for key, value in settings.items() if key != "source"))
    say("", f"Every other setting: inbatch pretrain {m['name']} --data ... --dry-run")


STAGES = "which residual stages get a block, from 1; all by default"


def explain_plugins() -> list[dict[str, Any]]:
    """Return every plug-in for --json and the tables."""
    from inbatch.training.registry import plugins

    every = []
    for name, (part, doc, defaults) in plugins().items():
        descriptions = _descriptions(doc, defaults) | ({"stages": STAGES} if "stages" in defaults else {})
        options = {key: {"default": value, "what": descriptions.get(key, "")} for key, value in defaults.items()}
        every.append({"part": part, "name": name, "what": doc.partition("\n")[0], "options": options})
    return every


def print_plugins(every: Sequence[Mapping[str, Any]]) -> None:
    """Print a row per plug-in."""
    flags = {"curate": "--curate"}
    rows = [(flags.get(p["part"], f"--{p['part']} {p['name']}"), p["what"], ", ".join(p["options"])) for p in every]
    print_table(("flag", "what it is", "options"), rows)
    say(
        "",
        "All can be combined, and fit every method; --mix needs one with soft targets, --negatives one that contrasts",
        "with the other samples of the batch. See also --shuffle-groups and --crops (inbatch crops --crops all).",
    )
    say("One plug-in in detail: inbatch plugins NAME")


def print_plugin(p: Mapping[str, Any]) -> None:
    """Print a plug-in's options."""
    say(f"{p['name']}: {p['what']}", "")
    print_table(
        ("--set", "default", "what it is"),
        [(f"{p['part']}.{o}", str(option["default"]), option["what"]) for o, option in p["options"].items()],
    )


def _descriptions(doc: str, options: Iterable[str]) -> dict[str, str]:
    """Return the text of each option that a docstring explains."""
    _, entries = split_entries(doc, options)
    return {name: what for names, what in entries.items() for name in names.split(", ")}


def _yes(value: bool) -> str:
    return "yes" if value else "no"
