"""The named parts of a recipe; the constructor of a part is its schema, and unknown options raise errors."""

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import pydantic

from inbatch.context.curation import CURATORS
from inbatch.context.fusion import FUSIONS
from inbatch.context.mixing import MIXERS
from inbatch.context.negatives import NEGATIVES
from inbatch.data.samplers import SAMPLERS
from inbatch.data.views import PRESETS
from inbatch.errors import ConfigError, check_whole, closest
from inbatch.methods import METHODS
from inbatch.models import create_encoder
from inbatch.models.attention_slots import ATTENDS
from inbatch.runtime import own_parts
from inbatch.training.optim import OPTIMIZERS
from inbatch.training.renamed_keys import RENAMED, check_not_renamed

Settings = dict[str, Any]
"""Flat settings: "batch_size" or "part.key" -> value."""


@dataclass(frozen=True)
class Part:
    """The name of a part and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


PARTS: dict[str, Mapping[str, Callable[..., Any]] | None] = {
    "method": METHODS,
    "views": PRESETS,
    "optimizer": OPTIMIZERS,
    "encoder": None,  # timm checks the names
    "fuse": FUSIONS,
    "curate": CURATORS,
    "attend": ATTENDS,
    "negatives": NEGATIVES,
    "mix": MIXERS,
    "sampler": SAMPLERS,
}
"""Part -> its implementations by name."""
OPTIONAL = ("fuse", "curate", "attend", "negatives", "mix", "sampler")
"""Parts that a run may omit."""
_SUPPLIED = {
    "optimizer": {"params"},
    "fuse": {"group", "size", "mean", "std"},
    "attend": {"channels", "width"},
}
"""Arguments of a part that the run supplies."""
_Rate = Annotated[float, pydantic.Field(ge=0)]
_DIVISORS = ("temperature", "cluster_temperature", "base_temperature", "teacher_temperature", "warmup_temperature",
    "sigma", "epsilon")  # fmt: skip
_LIMITS: dict[str, dict[str, Any]] = {
    **{name: {"gt": 0} for name in _DIVISORS}, "eps": {"ge": 0}, "center_momentum": {"ge": 0, "le": 1},
}  # fmt: skip
"""Limits of the options of methods, by name: of those that divide similarities, and that are below a root."""


def make_part(part: str, options: Settings, size: int) -> Part | None:
    """Return a part with its options checked against its constructor's signature; None for an omitted part."""
    options = dict(options)
    if part in OPTIONAL and options.get("name") in (None, "none"):
        for key in sorted(set(options) - {"name"}):
            check_not_renamed(f"{part}.{key}")
            raise ConfigError(f"{part}.{key} is set, but there is no {part}.name: {', '.join(PARTS[part] or ())}")
        return None
    name = str(options.pop("name"))
    if own_parts.is_own(name) and own_parts.find(part, name) is None:
        return Part(name, options)  # of a finished run, which may be read without its code; `build` needs it
    if PARTS[part] is None:
        allowed = _encoder_options()
        of_recipe = {
            "size": "image_size",
            "channels": "channels",
            "attend": "attend.name",
            "attend_options": "attend.OPTION",
            "check": "image_size",
        }
        for key in of_recipe.keys() & options.keys():
            raise ConfigError(f"{part}.{key} follows from another setting: set {of_recipe[key]}")
        if options.get("lora") is not None:
            _check_lora(options)
        return Part(name, {k: v for k, v in options.items() if k in allowed or v is not None})
    maker = maker_of(part, name)
    if name not in (PARTS[part] or ()) and not own_parts.is_maker(part, maker):
        for key in options.keys() - {"sizes", "object"}:
            raise ConfigError(f"{part}.{key}: {name} is an existing object, which has no settings")
        return Part(name, options)
    adapter, known = _schema(part, name, maker)
    if part == "views" and "size" in known:
        options.setdefault("size", size)
    for key in options:
        if key not in known:
            check_not_renamed(f"{part}.{key}", f"{part} {name}", known)
            raise ConfigError(f"{part} {name} has no setting {shown(key)}{nearest(key, known, usual=False)}")
    checked = validated(adapter, options, f"{part}.").model_dump()
    if part != "optimizer" and own_parts.find(part, name) is not None:
        # Defaults that are not plain values stay those of the constructor.
        return Part(name, {k: v for k, v in checked.items() if k in options or is_plain(v)})
    # Our own parts are written with all options; the options of torch's optimisers differ between versions.
    return Part(name, checked if part != "optimizer" else {k: checked[k] for k in options})


@functools.cache
def _encoder_options() -> frozenset[str]:
    """Return the arguments of `create_encoder` that a recipe may give."""
    return frozenset(inspect.signature(create_encoder).parameters) - {"check", "kwargs"}


def _check_lora(options: Settings) -> None:
    """Raise ConfigError for a rank of LoRA that is not a whole number of at least 1."""
    check_whole("encoder.lora", options["lora"], least=1)


def maker_of(part: str, name: Any, key: str | None = None) -> Any:
    """Return the class or function of a part's name: ours, one that is passed or typed, or that of a package.

    Args:
        part: The part.
        name: Its name.
        key: Setting for messages, PART.name by default.

    Raises:
        ConfigError: If the name is unknown, or code of the user that is neither passed nor typed.
    """
    makers = PARTS[part] or {}
    if isinstance(name, str) and name in makers:
        return makers[name]
    if (own := own_parts.find(part, name)) is not None:
        return own.maker
    if own_parts.is_own(name):
        raise own_parts.demand(part, name)
    check_known(key or f"{part}.name", name, (*makers, *own_parts.installed_names(part)))
    raise AssertionError(name)


def is_plain(value: Any) -> bool:
    """Return whether a value can be written to a recipe."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def without_rates(optimizer: Any) -> set[str]:
    """Return which of the rates `optimizer.lr` and `optimizer.weight_decay` the user's own optimiser does not take."""
    own = own_parts.find("optimizer", optimizer)
    if own is None:
        return set()
    return {"lr", "weight_decay"} - set(inspect.signature(own.maker).parameters)


def plugins() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return every named plug-in: name -> its part, its docstring, and its options with their defaults."""
    entries = {}
    for part in OPTIONAL:
        for name, maker in (PARTS[part] or {}).items():
            defaults = {key: field.default for key, field in _model(part, name, maker).model_fields.items()}
            entries[name] = (part, inspect.getdoc(maker) or "", defaults)
    return entries


@functools.cache
def _schema(part: str, name: str, maker: Callable[..., Any]) -> tuple[pydantic.TypeAdapter, tuple[str, ...]]:
    model = _model(part, name, maker)
    return pydantic.TypeAdapter(model), tuple(model.model_fields)


def _model(part: str, name: str, maker: Callable[..., Any]) -> type[pydantic.BaseModel]:
    """Return the settings of a part: its constructor's signature without the arguments that the run supplies."""
    target = maker.func if isinstance(maker, functools.partial) else maker
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # of the user, with names that only type checkers know
        hints = {}
    fields: dict[str, Any] = {}
    for p in inspect.signature(maker).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name.startswith("_"):
            continue
        if p.name not in _SUPPLIED.get(part, ()):
            required = p.default is inspect.Parameter.empty
            hint = hints.get(p.name, Any)
            if part == "method" and p.name in _LIMITS:
                hint = Annotated[hint, pydantic.Field(**_LIMITS[p.name])]
            fields[p.name] = (hint, ... if required else p.default)
    if part == "views" and ":" in name:
        fields |= {"sizes": (tuple[int, ...] | None, None)}
    if part == "optimizer":
        rates: dict[str, Any] = {"lr": (_Rate, ...), "weight_decay": (_Rate, 0.0), "vector_lr": (_Rate | None, None)}
        rates["layer_decay"] = (Annotated[float, pydantic.Field(gt=0, le=1)], 1.0)
        left = without_rates(name)
        left |= {"vector_lr", "layer_decay"} if "lr" in left else set()
        fields |= {key: field for key, field in rates.items() if key not in left}
    if part == "attend" and "channels" in inspect.signature(maker).parameters:
        fields |= {"stages": (tuple[int, ...] | None, None)}
    rules = pydantic.ConfigDict(arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False)
    return pydantic.create_model(name, __config__=rules, **fields)


def validated(adapter: pydantic.TypeAdapter, values: Mapping[str, Any], where: str) -> Any:
    """Return the validated values; raise ConfigError for the first that is invalid."""
    try:
        result = adapter.validate_python(values)
    except pydantic.ValidationError as e:
        fault = e.errors()[0]
        key = where + ".".join(str(p) for p in fault["loc"] if not isinstance(p, int))
        problem = f"{key} = {shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        raise ConfigError(
            problem if fault["type"] != "missing" else f"{key} must be given: add --set {key}=VALUE"
        ) from None
    _check_no_booleans(values, result, where)
    return result


def _check_no_booleans(values: Mapping[str, Any], result: Any, where: str) -> None:
    """Raise ConfigError for true or false as a number, which pydantic takes as 1 or 0."""
    for key, value in values.items():
        taken_as = getattr(result, key, None)
        if isinstance(value, Mapping):
            _check_no_booleans(value, taken_as, f"{where}{key}.")
        elif isinstance(value, bool) and type(taken_as) in (int, float):
            raise ConfigError(f"{where}{key} = {value}: input should be a number")


def without_addresses(value: Any) -> str:
    """Return a value as Python writes it, without addresses in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def shown(value: Any) -> str:
    """Return a value as Python writes it, shortened and without addresses: invalid values come from the user."""
    try:
        text = without_addresses(value)
    except ValueError:  # more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_known(key: str, name: Any, names: Iterable[str]) -> None:
    """Raise ConfigError with a suggestion if a name is unknown."""
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{key} = {shown(name)} is unknown{nearest(name, names)}")


USUAL = {
    "lr": "optimizer.lr", "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "momentum": "optimizer.momentum", "temperature": "method.temperature", "bs": "batch_size",
    "img_size": "image_size", "input_size": "image_size", "backbone": "encoder.name", "model": "encoder.name",
    "arch": "encoder.name", "warmup": "schedule.warmup_epochs", "max_epochs": "epochs", "num_epochs": "epochs",
    "pretrained": "encoder.init", "wd": "optimizer.weight_decay", "opt": "optimizer.name", "schedule": "schedule.name",
    "resolution": "image_size", "temp": "method.temperature", "tau": "method.temperature", "ema": "method.momentum",
}  # fmt: skip
"""Names of other libraries -> settings of a recipe."""
for _old, _new in RENAMED.items():  # former and present names of options, without their part
    if "." in _old:
        USUAL.setdefault(_old.split(".")[1], _new)
        USUAL.setdefault(_new.split(".")[1], _new)


def nearest(word: Any, known: Iterable[str], usual: bool = True) -> str:
    """Return the end of an error message: the setting of a `usual` name, else the most similar name, else all names."""
    known = sorted(known)
    if usual and isinstance(word, str) and word in USUAL:
        return f": did you mean {USUAL[word]!r}?"
    close = closest(shown(word).strip("'"), known)
    return f": did you mean {close[0]!r}?" if close else f"; there are {', '.join(known) or 'none'}"
