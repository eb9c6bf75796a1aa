"""Parts of a run that are code of the user: where they come from, their names, versions and source hashes.

A recipe holds only the name of such a part. The object comes from the command line (`imported`), from a call in Python
(`described`) or from an entry point of an installed package (`installed`), never from a file that names it.
"""

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inbatch.errors import ConfigError, closest, reason
from inbatch.runtime.source_hash import hash_in, source_file

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_<][\w.<>]*")
_GROUPS = {"method": "inbatch.methods", "encoder": "inbatch.encoders", "source": "inbatch.sources"}
"""Part -> group of the entry points of installed packages."""
_OWN = ("method", "encoder", "views", "optimizer", "source", "callback")
"""Parts that can be code of the user."""


@dataclass(frozen=True)
class OwnPart:
    """A part of a run that is code of the user or of another package.

    Attributes:
        part: "method", "encoder", "views", "optimizer" or "callback".
        name: Its name in a recipe, "my_package.my_module:MyMethod", or the name of an entry point.
        maker: The class, function or object.
        version: Version of the package that contains it, if it is installed.
        sha256: Hash of its source (`source_hash`); None if the source cannot be read.
        file: File of its source.
        lasting: Whether it decides what is learned, and is therefore part of the recipe.
    """

    part: str
    name: str
    maker: Any
    version: str | None = None
    sha256: str | None = None
    file: str | None = None
    lasting: bool = True

    def facts(self) -> dict[str, str | None]:
        """Return what a recipe keeps of the part besides its name and options."""
        return {"version": self.version, "sha256": self.sha256}

    def sentence(self) -> str:
        """Return a sentence for the user: which code runs."""
        where = self.file or "memory (its source cannot be read, so that a change would not be noticed)"
        return f"The {self.part} {self.name} runs your code from {where}."


_NONE: Mapping[str, OwnPart] = MappingProxyType({})
_current: ContextVar[Mapping[str, OwnPart]] = ContextVar("own parts", default=_NONE)


@contextmanager
def using(parts: Mapping[str, OwnPart]) -> Iterator[None]:
    """Let the names of these parts be resolved within the context.

    Args:
        parts: The parts by part, such as "method"; several of one part by part and name, "method my_module:MyMethod".
    """
    token = _current.set({**_current.get(), **parts})
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Mapping[str, OwnPart]:
    """Return the parts of the user that are in use, by part."""
    return _current.get()


_any_source: ContextVar[bool] = ContextVar("any source", default=False)


@contextmanager
def any_source() -> Iterator[None]:
    """Accept another source than that of a run within the context: a new run may start from its weights."""
    token = _any_source.set(True)
    try:
        yield
    finally:
        _any_source.reset(token)


def is_own(name: object) -> bool:
    """Return whether a name is that of a user's own part, MODULE:NAME."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def find(part: str, name: object) -> OwnPart | None:
    """Return the part of the user, or of an installed package, with this name; None if there is none.

    An encoder is taken whatever its name is: the weights of a run tell whether it fits.
    """
    in_use = _current.get()
    supplied = in_use.get(part)
    if supplied is not None and (supplied.name == name or (part == "encoder" and is_own(name))):
        return supplied
    if (one := in_use.get(f"{part} {name}")) is not None:
        return one
    return installed(part, name) if isinstance(name, str) and not is_own(name) else None


def demand(part: str, name: object) -> ConfigError:
    """Return the error for a part of the user that is not in use, or that cannot be code of the user."""
    part = part.split()[0]
    if part not in _OWN:
        return ConfigError(f"{part}.name = {name!r} is unknown: code of your own can be {', '.join(_OWN)}")
    keyword = "callbacks" if part == "callback" else part
    return ConfigError(
        f"the {part} {name} is code of your own, which is never imported because a file or a setting names it: type "
        f"--{part} {name} on the command line, or pass the object in Python ({keyword}=...)"
    )


def is_maker(part: str, maker: Any) -> bool:
    """Return whether an object makes a part from options; otherwise it is the part itself, such as a transform."""
    if part != "views" or inspect.isclass(maker):
        return inspect.isclass(maker) or inspect.isroutine(maker) or isinstance(maker, functools.partial)
    if not inspect.isroutine(maker):
        return isinstance(maker, functools.partial)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(maker).parameters.values()
    return all(p.default is not inspect.Parameter.empty or p.kind not in kinds for p in parameters)


def check_same(part: str, name: str, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError if the part of the user that a run was trained with is missing, or has another source now."""
    own, part = find(part, name), part.split()[0]
    if own is None:
        if is_own(name):
            raise demand(part, name)
        raise ConfigError(f"the {part} {name} came from an installed package, which is missing now: install it again")
    then = facts.get("sha256")
    if _any_source.get():
        return
    if own.name == name and then is not None and own.sha256 is not None and own.sha256 != then:
        versions = f" (version {facts.get('version')} then, {own.version} now)" if facts.get("version") else ""
        raise ConfigError(
            f"the source of the {part} {name} has changed since the run began{versions}: SHA-256 {then} then, "
            f"{own.sha256} now. Restore the source{f' in {own.file}' if own.file else ''}, or start a new run from the "
            "weights of this one (--init RUN)"
        )


def imported(part: str, text: str, option: str | None = None) -> OwnPart:
    """Import a part that is typed on the command line as MODULE:NAME; the current folder is on the path.

    Raises:
        ConfigError: If the module cannot be imported, or does not have the name.
    """
    option = option or f"--{part}"
    if not is_own(text):
        raise ConfigError(f"{option} {text}: write your own code as MODULE:NAME, such as my_package.my_module:MyClass")
    module_name, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            where = "the current folder or among the installed packages"
            raise ConfigError(f"{option} {text}: there is no module {error.name!r} in {where}") from None
        raise ConfigError(f"{option} {text}: the module cannot be imported: {error}") from error
    except SystemExit as error:
        raise ConfigError(
            f"{option} {text}: the module ends the program when it is imported ({error.code}); put what a script runs "
            "under if __name__ == '__main__':"
        ) from error
    except Exception as error:  # of any code
        raise ConfigError(f"{option} {text}: the module cannot be imported: {reason(error)}") from error
    for name in path.split("."):
        if not hasattr(value, name):
            near = closest(name, [key for key in dir(value) if not key.startswith("_")])
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{option} {text}: {module_name} has no {name!r}{hint}")
        value = getattr(value, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return described(part, value)
    file = inspect.getsourcefile(sys.modules[module_name])  # an object, such as a transform made by the module
    return OwnPart(part, text, value, _version(module_name), hash_in(file, path.split(".")[0]), file)


def described(part: str, value: Any) -> OwnPart:
    """Return the part of an object that is passed in Python: a class, a function, or an instance of a class."""
    definition = value if inspect.isclass(value) or inspect.isroutine(value) else type(value)
    file, module = source_file(definition), definition.__module__
    qualname = definition.__qualname__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        stem = Path(file).stem if file and os.path.exists(file) else "__main__"
        module = spec.name if spec is not None and spec.origin == file else stem
    return OwnPart(part, f"{module}:{qualname}", value, _version(module), hash_in(file, qualname.split(".")[0]), file)


def installed(part: str, name: str) -> OwnPart | None:
    """Return the part that an installed package offers under a name by an entry point; None if none does.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    for point in _points(_GROUPS[part], tuple(sys.path)) if part in _GROUPS else ():
        if point.name == name:
            return _loaded(part, point)
    return None


def installed_names(part: str) -> list[str]:
    """Return the names of the parts that installed packages offer, without loading them."""
    return [point.name for point in _points(_GROUPS[part], tuple(sys.path))] if part in _GROUPS else []


def every_installed(part: str) -> tuple[dict[str, OwnPart], dict[str, str]]:
    """Return the parts that installed packages offer, by name, and the sentences on those that cannot be loaded."""
    parts, broken = dict[str, OwnPart](), dict[str, str]()
    for point in _points(_GROUPS[part], tuple(sys.path)):
        try:
            parts.setdefault(point.name, _loaded(part, point))
        except ConfigError as error:
            broken[point.name] = str(error)
    return parts, broken


@functools.cache
def _points(group: str, path: tuple[str, ...]) -> tuple[metadata.EntryPoint, ...]:
    """Return the entry points of a group; the search takes tens of milliseconds."""
    return tuple(metadata.entry_points(group=group))


def _loaded(part: str, point: metadata.EntryPoint) -> OwnPart:
    package = point.dist.name if point.dist else "an installed package"
    version = point.dist.version if point.dist else None
    try:
        value = point.load()
    except Exception as error:  # of any code
        raise ConfigError(
            f"the {part} {point.name} of the package {package} cannot be loaded from {point.value}: {reason(error)}"
        ) from error
    file = source_file(value) if inspect.isclass(value) or inspect.isroutine(value) else None
    sha256 = hash_in(file, value.__qualname__.split(".")[0]) if file else None
    return OwnPart(part, point.name, value, version, sha256, file)


def _version(module: str) -> str | None:
    """Return the version of the package that contains a module: its own, else that of the distribution of its name."""
    top = module.split(".")[0]
    own = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(own, str):
        return own
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:  # a script, or a module of the current folder
        return None
