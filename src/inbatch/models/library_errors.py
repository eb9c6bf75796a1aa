"""Errors of timm, torchvision and torch while an encoder is built or tried, as sentences for the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import nn

from inbatch.errors import ConfigError, InbatchError, reason

LIBRARIES = ("timm", "torchvision")


def library_of(name: str, backbone: nn.Module | None = None) -> str:
    """Return the library of an encoder with its version; empty for encoders of this library and of the user.

    Args:
        name: name of the encoder.
        backbone: its backbone, if it exists; its class then decides, because a user's own may have any name.
    """
    library = type(backbone).__module__.partition(".")[0] if backbone is not None else "timm"
    if backbone is None and name.startswith("torchvision/"):
        library = "torchvision"
    own = library not in LIBRARIES or name in ("tiny", "fast")
    return "" if own else f"{library} {version(library)}"


@contextmanager
def explained(name: str, what: str, fix: str = "", backbone: nn.Module | None = None) -> Iterator[None]:
    """Turn every exception of a library within the context into a ConfigError with the encoder, its library and a fix.

    Args:
        name: name of the encoder.
        what: what cannot be done, after "cannot".
        fix: what to do; by default another size, published sizes being known to work, or another encoder.
        backbone: backbone of the encoder, if it exists.
    """
    try:
        yield
    except (InbatchError, MemoryError):
        raise
    except Exception as error:  # a library raises any exception for a size or an option that it does not expect
        library = library_of(name, backbone)
        who = f"{name} ({library})" if library else name
        raise ConfigError(f"{who} cannot {what}: {reason(error)}. {fix or _fix(name, library)}") from error


def described(side: int, channels: int, options: dict[str, Any]) -> str:
    """Return the size and the options of an encoder for a sentence."""
    chosen = ", ".join(f"{key} = {value!r}" for key, value in options.items())
    return f"{side}x{side} pixels and {channels} channels" + (f" with {chosen}" if chosen else "")


def _fix(name: str, library: str) -> str:
    published = ""
    if library.startswith("timm"):
        import timm

        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        published = f" (it is published for {cfg.input_size[-1]} pixels)" if cfg is not None and cfg.input_size else ""
    return f"Choose another image size{published}, other options, or another encoder"
