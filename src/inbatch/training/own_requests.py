"""Objects that a caller passes as parts of a run: the names and options by which a recipe stores them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from inbatch.data.views import View
from inbatch.errors import ConfigError, reason, type_name
from inbatch.methods.base import Method
from inbatch.models import Encoder
from inbatch.runtime import own_parts
from inbatch.runtime.own_parts import OwnPart
from inbatch.training.callbacks import Callback, named
from inbatch.training.recipe import Recipe
from inbatch.training.registry import PARTS, Settings, is_plain, shown, without_addresses

P = ParamSpec("P")
R = TypeVar("R")

PASSED = ("method", "encoder", "views", "optimizer")
"""Parts that a caller may pass as an object."""


def with_own_parts(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Decorate a function that takes data and settings of a run: its parts may be objects instead of names."""
    place = list(inspect.signature(function).parameters).index("method")

    @functools.wraps(function)
    def call(*args: Any, **fields: Any) -> Any:
        if len(args) > place:
            fields["method"], args = args[place], args[:place] + args[place + 1 :]
        parts, settings = dict[str, OwnPart](), Settings()
        for part in PASSED:
            if fields.get(part) is not None:
                fields[part], options, own = requested_part(part, fields[part])
                settings |= {f"{part}.{key}": value for key, value in options.items()}
                parts |= {} if own is None else {part: own}
        if fields.get("callbacks"):
            fields["callbacks"], more = requested_callbacks(fields["callbacks"])
            parts |= more
        if settings:
            fields["settings"] = settings | dict(fields.get("settings") or {})
        with own_parts.using(parts):
            return function(*args, **fields)

    return call


def with_own_encoder(function: Callable[P, R]) -> Callable[..., R]:
    """Decorate a function that takes a run: its own parts may be passed as `encoder=`, `method=`, ... objects."""
    taken = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> R:
        passed = {part: options.pop(part) for part in PASSED if part not in taken and part in options}
        with own_parts.using(parts_of(passed)):
            return function(*args, **options)

    return call


@contextmanager
def use_parts(*, method: Any = None, encoder: Any = None, views: Any = None, optimizer: Any = None) -> Iterator[None]:
    """Let every function use parts of your own within the context, for runs that learned with them.

    Args:
        method: Your method, or its class.
        encoder: Your module, or what makes it; its weights are replaced by those of a run.
        views: Your views.
        optimizer: Your optimizer.

    Raises:
        ConfigError: If an object cannot be such a part.
    """
    passed = {"method": method, "encoder": encoder, "views": views, "optimizer": optimizer}
    with own_parts.using(parts_of(passed)):
        yield


def requested_callbacks(values: Sequence[Any]) -> tuple[list[Callback], dict[str, OwnPart]]:
    """Return callbacks as objects, and as the user's own parts; classes are called without arguments."""
    if isinstance(values, Callback | type | OwnPart):
        raise ConfigError("callbacks must be a list: pass callbacks=[...]")
    callbacks, parts = list[Callback](), dict[str, OwnPart]()
    for value in values:
        typed = value if isinstance(value, OwnPart) else None
        one = typed.maker if typed is not None else value
        if own_parts.is_maker("callback", one):
            try:
                one = one()
            except Exception as error:  # of any code
                raise ConfigError(f"the callback {one!r:.80} cannot be made by a call: {reason(error)}") from error
        named([one])
        own = typed or own_parts.described("callback", one)
        callbacks.append(one)
        parts[f"callback {own.name}"] = replace(own, lasting=one.changes_weights)
    return callbacks, parts


def parts_of(passed: Mapping[str, Any]) -> dict[str, OwnPart]:
    """Return the user's own parts among objects by part; names of ours and None are left out."""
    parts = {part: requested_part(part, value)[2] for part, value in passed.items() if value is not None}
    return {part: own for part, own in parts.items() if own is not None}


def requested_part(part: str, value: Any) -> tuple[str, Settings, OwnPart | None]:
    """Return the name and the options of a part that is passed as an object, and the part itself if it is not ours.

    Args:
        part: The part.
        value: A name of ours or of an installed package; a class, function or object; or what was imported for the
            command line.

    Raises:
        ConfigError: If it cannot be such a part, or its arguments cannot be written to a recipe.
    """
    if isinstance(value, str):
        if own_parts.is_own(value):
            raise own_parts.demand(part, value)
        return value, {}, None
    typed = value if isinstance(value, OwnPart) else None
    value = typed.maker if typed is not None else value
    options = Settings()
    if part == "method" and isinstance(value, Method):
        options, value = _arguments(value), type(value)
        typed = None
    elif isinstance(value, functools.partial):
        if value.args:
            raise ConfigError(f"{part}: pass the arguments of {value.func.__name__} by name, not by position")
        options, value = dict(value.keywords), value.func
    _check_kind(part, value)
    for name, maker in (PARTS[part] or {}).items():
        if maker is value:
            return name, options, None
    _check_plain(part, value, options)
    own = typed if typed is not None and typed.maker is value else own_parts.described(part, value)
    if part == "views" and not own_parts.is_maker(part, value):
        options["object"] = _text(value)
    return own.name, options, own


def _arguments(method: Method) -> Settings:
    """Return the arguments of the constructor of a method by name."""
    kind = type(method)
    args, options = method.__dict__["_arguments"]
    signature = inspect.signature(kind)
    bound = signature.bind(*args, **options)
    settings = Settings()
    for name, value in bound.arguments.items():
        kinds = signature.parameters[name].kind
        if kinds is inspect.Parameter.VAR_POSITIONAL:
            raise ConfigError(f"{kind.__name__}(*{name}) cannot be written to a recipe: give its arguments names")
        settings |= value if kinds is inspect.Parameter.VAR_KEYWORD else {name: value}
    return settings


def _check_plain(part: str, maker: Any, options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if not is_plain(value):
            name = getattr(maker, "__name__", part)
            raise ConfigError(
                f"{part}: {name}({key}={shown(value)}): a recipe holds only numbers, texts, "
                f"lists and dicts (JSON), not {type_name(value)}; make this object inside of the constructor"
            )


def _check_kind(part: str, value: Any) -> None:
    """Raise ConfigError if an object cannot be this part."""
    if part == "method":
        fits, wanted = inspect.isclass(value) and issubclass(value, Method), "a name, or a Method, or its class"
    elif part == "encoder":
        if isinstance(value, Encoder):
            raise ConfigError(
                "encoder: pass the module that is trained (encoder.backbone), or start from its weights: "
                "settings={'encoder.init': FOLDER}, the run or the folder of inbatch.models.save_encoder"
            )
        fits = isinstance(value, nn.Module) or own_parts.is_maker(part, value)
        wanted = "a name, an nn.Module, or a class or function that makes one"
    elif part == "optimizer":
        fits, wanted = own_parts.is_maker(part, value), "a name, or a class or function that takes parameters"
    else:
        several = isinstance(value, Sequence) and value and not isinstance(value, bytes)
        fits = callable(value) or isinstance(value, View)
        fits |= bool(several) and all(callable(one) or isinstance(one, View) for one in value)
        wanted = "a name, a View or several, a transform of images or several, or a function that makes these"
    if not fits:
        raise ConfigError(f"{part} = {shown(value)}: pass {wanted}")


def _text(value: Any) -> str:
    """Return an object as a recipe describes it, without addresses in memory."""
    return " ".join(without_addresses(value).split())


def check_own_parts(recipe: Recipe) -> None:
    """Raise ConfigError if a part of a run that is the user's code is not in use, or has another source now."""
    for part, facts in recipe.own.items():
        name = getattr(recipe, part).name if part in PARTS else part.removeprefix("callback ")
        own_parts.check_same(part, name, facts)
    more = {part for part, own in own_parts.current().items() if part.startswith("callback ") and own.lasting}
    if more := more - recipe.own.keys():
        raise ConfigError(
            f"a resumed run keeps its recipe: the {', '.join(sorted(more))} changes weights, and the run began without "
            "it. Leave it out, or begin a new run"
        )
