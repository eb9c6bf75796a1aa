"""The named parts of a recipe; the constructor of a part is its schema, and unknown options raise errors."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import pydantic

from inbatch.context.curation import CURATORS
from inbatch.context.fusion import FUSIONS
from inbatch.data.views import PRESETS
from inbatch.errors import ConfigError, closest
from inbatch.methods import METHODS
from inbatch.models import create_encoder
from inbatch.models.attention_slots import ATTENDS
from inbatch.training.optim import OPTIMIZERS
from inbatch.training.renamed_keys import RENAMED

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
}
"""Part -> its implementations by name."""
OPTIONAL = ("fuse", "curate", "attend")
"""Parts that a run may omit."""
_GIVEN = {
    "optimizer": {"params"},
    "fuse": {"group", "size", "mean", "std"},
    "attend": {"channels", "width"},
}
"""Arguments of a part that the run supplies."""
_ABOVE_0 = {"temperature", "cluster_temperature", "base_temperature", "teacher_temperature", "warmup_temperature",
    "sigma", "epsilon"}  # fmt: skip
"""Options of a method that divide similarities."""


def make_part(part: str, options: Settings, size: int) -> Part | None:
    """Return a part with its options checked against its constructor's signature; None for an omitted part."""
    options = dict(options)
    if part in OPTIONAL and options.get("name") in (None, "none"):
        for key in set(options) - {"name"}:
            raise ConfigError(f"{part}.{key} is set, but there is no {part}.name: {', '.join(PARTS[part] or ())}")
        return None
    name = str(options.pop("name"))
    makers = PARTS[part]
    if makers is None:
        allowed = set(inspect.signature(create_encoder).parameters) - {"check", "kwargs"}
        of_recipe = {
            "size": "image_size",
            "channels": "channels",
            "attend": "attend.name",
            "attend_options": "attend.OPTION",
            "check": "image_size",
        }
        for key in of_recipe.keys() & options.keys():
            raise ConfigError(f"{part}.{key} follows from another setting: set {of_recipe[key]}")
        return Part(name, {k: v for k, v in options.items() if k in allowed or v is not None})
    check_known(f"{part}.name", name, makers)
    maker = makers[name]
    signature = inspect.signature(maker)
    if part == "views" and "size" in signature.parameters:
        options.setdefault("size", size)
    adapter, known = _schema(part, name)
    for key in options:
        if key not in known:
            if RENAMED.get(f"{part}.{key}", ".").split(".")[1] in known:
                check_not_renamed(f"{part}.{key}")
            raise ConfigError(f"{part} {name} has no setting {shown(key)}{nearest(key, known, usual=False)}")
    checked = validated(adapter, options, f"{part}.").model_dump()
    # Our own parts are written with all options; the options of torch's optimisers differ between versions.
    return Part(name, checked if part != "optimizer" else {k: checked[k] for k in options})


def plugins() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return every named plug-in: name -> its part, its docstring, and its options with their defaults."""
    found = {}
    for part in OPTIONAL:
        for name, maker in (PARTS[part] or {}).items():
            defaults = {key: field.default for key, field in _model(part, name).model_fields.items()}
            found[name] = (part, inspect.getdoc(maker) or "", defaults)
    return found


@functools.cache
def _schema(part: str, name: str) -> tuple[pydantic.TypeAdapter, tuple[str, ...]]:
    model = _model(part, name)
    return pydantic.TypeAdapter(model), tuple(model.model_fields)


def _model(part: str, name: str) -> type[pydantic.BaseModel]:
    """Return the settings of a part: its constructor's signature without the arguments that the run supplies."""
    maker = (PARTS[part] or {})[name]
    target = maker.func if isinstance(maker, functools.partial) else maker
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    fields: dict[str, Any] = {}
    for p in inspect.signature(maker).parameters.values():
        if p.name not in _GIVEN.get(part, ()):
            required = p.default is inspect.Parameter.empty
            hint = hints.get(p.name, Any)
            if part == "method" and p.name in _ABOVE_0:
                hint = Annotated[hint, pydantic.Field(gt=0)]
            fields[p.name] = (hint, ... if required else p.default)
    if part == "optimizer":
        fields |= {"lr": (float, ...), "weight_decay": (float, 0.0), "vector_lr": (float | None, None)}
        fields |= {"layer_decay": (Annotated[float, pydantic.Field(gt=0, le=1)], 1.0)}
    if part == "attend" and "channels" in inspect.signature(maker).parameters:
        fields |= {"stages": (tuple[int, ...] | None, None)}
    rules = pydantic.ConfigDict(arbitrary_types_allowed=True, protected_namespaces=(), allow_inf_nan=False)
    return pydantic.create_model(name, __config__=rules, **fields)


def validated(adapter: pydantic.TypeAdapter, values: Mapping[str, Any], where: str) -> Any:
    """Return the validated values; raise ConfigError for the first that is invalid."""
    try:
        return adapter.validate_python(values)
    except pydantic.ValidationError as e:
        fault = e.errors()[0]
        key = where + ".".join(str(p) for p in fault["loc"] if not isinstance(p, int))
        problem = f"{key} = {shown(fault['input'])}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
        raise ConfigError(problem if fault["type"] != "missing" else f"{key} must be given") from None


def shown(value: Any) -> str:
    """Return a value as Python writes it, shortened: invalid values come from the user."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python converts
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_known(key: str, name: Any, names: Iterable[str]) -> None:
    """Raise ConfigError with a suggestion if a name is unknown."""
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{key} = {shown(name)} is unknown{nearest(name, names)}")


def check_not_renamed(key: str) -> None:
    """Raise ConfigError that names the new key if a key has been renamed."""
    if key in RENAMED:
        raise ConfigError(
            f"the setting {key!r} is now {RENAMED[key]!r}: rename it "
            "(scripts/migrate_recipes.py of the repository rewrites whole files and runs)"
        )


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
    return f": did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
