"""Backbones by name, without their classifier: own ones, timm's and torchvision's (imported only if requested)."""

import copy
import inspect
import socket
import typing
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from inbatch.errors import ConfigError, closest, reason
from inbatch.models.fast import Fast
from inbatch.models.library_errors import described, explained
from inbatch.runtime import own_parts
from inbatch.runtime.own_parts import OwnPart

# timm's own options for weights and files, one of them through pickle: `init` replaces them.
_REFUSED = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def build(name: str, size: int, channels: int, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a backbone with random weights, and the names of its removed classifiers."""
    if wrong := sorted(set(kwargs) & set(_REFUSED)):
        raise ConfigError(f"an encoder has no setting {wrong[0]!r}: weights are named by init.")
    with explained(name, f"be built for {described(size, channels, kwargs)}"):
        if name == "tiny":
            return _tiny(channels, **kwargs), ()
        if name == "fast":
            return Fast(channels, size, **kwargs), ()
        if name.startswith("torchvision/"):
            return _torchvision(name.removeprefix("torchvision/"), size, channels, kwargs)
        backbone = _timm(name, size, channels, kwargs)
    classifier = published_cfg(backbone).get("classifier") or ()
    return backbone, (classifier,) if isinstance(classifier, str) else tuple(classifier)


OURS = ("tiny", "fast", "resnet10")
"""Names of the backbones of this library."""


def own_encoder(name: str) -> OwnPart | None:
    """Return the user's own part of a name, or that of an installed package; None for names of ours, timm's, ...

    Raises:
        ConfigError: If it is the user's own, and not in use.
    """
    if name in OURS or name.startswith("torchvision/"):
        return None
    own = own_parts.find("encoder", name)
    if own is None and own_parts.is_own(name):
        raise own_parts.demand("encoder", name)
    if own is not None and not own_parts.is_own(name):
        import timm

        return None if timm.is_model(name) else own
    return own


def arguments_for_own(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the saved arguments of an encoder that what the user passes for it can take; all if it is one of ours."""
    own = own_encoder(name)
    if own is None:
        return arguments
    if isinstance(own.maker, nn.Module):
        return {}
    known = inspect.signature(own.maker).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in known}


def own_backbone(own: OwnPart, size: int, channels: int, kwargs: dict[str, Any]) -> nn.Module:
    """Return a new backbone of the user: a copy of a module, or what a class or function makes.

    Args:
        own: The module, class or function; its parameters `size` and `channels` are set by the run.
        size: Side of the images in pixels.
        channels: Channels of the images.
        kwargs: Other arguments of the class or function.

    Raises:
        ConfigError: If it cannot be built so, or is not a module.
    """
    maker = own.maker
    if isinstance(maker, nn.Module):
        if kwargs:
            raise ConfigError(f"encoder.{next(iter(kwargs))}: {own.name} is an existing module, which has no settings")
        return copy.deepcopy(maker).cpu()
    known = inspect.signature(maker).parameters
    sizes = {key: value for key, value in (("size", size), ("channels", channels)) if key in known}
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in kwargs if not any_name else ():
        if key not in known:
            near = closest(key, set(known) - set(sizes))
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"the encoder {own.name} has no setting {key!r}{hint}")
    try:
        backbone = maker(**sizes | kwargs)
    except Exception as error:  # of any code
        raise ConfigError(f"the encoder {own.name} cannot be made with these settings: {reason(error)}") from error
    if not isinstance(backbone, nn.Module):
        raise ConfigError(f"the encoder {own.name} must make an nn.Module, not {type(backbone).__name__}")
    return backbone


def _timm(name: str, size: int, channels: int, kwargs: dict[str, Any], published: bool = False) -> nn.Module:
    import timm

    if name != "resnet10" and not timm.is_model(name):
        raise _unknown(name, ["tiny", "fast", "resnet10", *timm.list_models()])
    name, args = timm_arguments(name, size, channels, kwargs)
    return timm.create_model(name, pretrained=published, **args)


def timm_arguments(name: str, size: int, channels: int, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments; fixed-size models (ViT, Swin) get the size, resnet10 its depth."""
    import timm

    args = {"num_classes": 0, "in_chans": channels, **kwargs}
    if name == "resnet10":
        return "resnet18", {"layers": [1, 1, 1, 1], **args}
    cfg = timm.get_pretrained_cfg(name)
    return name, {"img_size": size, **args} if cfg is not None and cfg.fixed_input_size else args


def published_cfg(backbone: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of the published weights of one of its models; empty for others."""
    cfg: Any = getattr(backbone, "pretrained_cfg", {})
    return cfg


def pretrained(name: str, size: int, channels: int, kwargs: dict[str, Any]) -> nn.Module:
    """Return the same timm model with its published weights."""
    if name in OURS or name.startswith("torchvision/"):
        raise ConfigError(f'timm has no weights for {name}: init="timm" needs a timm model with published weights.')
    try:
        return _timm(name, size, channels, kwargs | _cached(name), published=True)
    except ConfigError:
        raise
    except Exception as e:  # timm and its hub client raise any exception of their transport
        raise ConfigError(
            f"the published weights of {name} cannot be loaded through timm ({reason(e)}). {_INSTEAD}"
        ) from e


_INSTEAD = "Without a network, give init the path of a downloaded .safetensors file."


def _cached(name: str) -> dict[str, Any]:
    """Return arguments for timm if the hub is unreachable: its client retries for minutes before reading the cache."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id or reached(constants.ENDPOINT):
        return {}
    file = try_to_load_from_cache(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")
    if not isinstance(file, str):
        raise ConfigError(
            f"the published weights of {name} are not in a cache, and {constants.ENDPOINT} does not answer. {_INSTEAD}"
        )
    return {"pretrained_cfg_overlay": {"file": file}}


def reached(endpoint: str) -> bool:
    """Return whether the endpoint accepts connections; True behind a proxy, which only the client can test."""
    where = urlsplit(endpoint)
    if getproxies().get(where.scheme):
        return True
    try:
        socket.create_connection((where.hostname or "", where.port or 443), 5).close()
    except OSError:
        return False
    return True


def _torchvision(name: str, size: int, channels: int, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise _unknown(f"torchvision/{name}", [f"torchvision/{n}" for n in names])
    kwargs = torchvision_defaults(name, size) | kwargs
    backbone = torchvision.models.get_model(name, weights=None, **kwargs)
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(f"torchvision/{name} has no linear classifier to take off: choose another model.")
    backbone.set_submodule(linear[-1], nn.Identity())
    if channels != 3:
        first = next(n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
        old = backbone.get_submodule(first)
        new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        backbone.set_submodule(first, new)
    auxiliary = () if kwargs.get("aux_logits", True) else ("aux1", "aux2", "AuxLogits")
    return backbone, (linear[-1], *auxiliary)


def torchvision_defaults(name: str, size: int) -> dict[str, Any]:
    """Return arguments that a torchvision model accepts: its image size, and no auxiliary classifiers.

    Auxiliary classifiers make a model return several outputs in training. `init_weights` repeats the default, which
    otherwise is announced to change.
    """
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    kind = typing.get_type_hints(builder).get("return", builder)
    known = {"image_size": size, "input_size": (size, size), "aux_logits": False, "init_weights": True}
    return {key: value for key, value in known.items() if key in inspect.signature(kind).parameters}


_TINY = (32, 64, 96)
"""Widths of the layers of `tiny`."""


def _tiny(channels: int) -> nn.Module:
    # The maximum over positions, because a digit covers a small part of its canvas: k-NN 0.85, with the mean 0.71.
    layers: list[nn.Module] = []
    for width, stride in zip(_TINY, (1, 2, 1), strict=True):
        layers += [
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())


def cifar_stem(backbone: Any, channels: int) -> None:
    """Install a 3x3 convolution of stride 1 and no max-pool, as in SimCLR's CIFAR experiments (appendix B.9)."""
    backbone.conv1 = nn.Conv2d(channels, backbone.bn1.num_features, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def _unknown(name: str, known: list[str]) -> ConfigError:
    near = closest(name, known, 3)
    hint = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` lists what there is."
    return ConfigError(f"there is no encoder called {name!r}: {hint}")
