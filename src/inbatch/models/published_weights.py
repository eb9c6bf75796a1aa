"""Find the weights of an encoder in a file that another program wrote, adapt them, and say what fitted."""

import contextlib
import io
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inbatch.errors import ConfigError, DataError, listed, many
from inbatch.models.weight_files import Contents
from inbatch.models.weight_layouts import aliases, layout_name, noun, preference
from inbatch.models.weight_names import Tensors, namings

MIN_MATCH = 0.95
"""Smallest share of an encoder's tensors that published weights must contain."""
_CANDIDATES = 12
"""Number of parts of a file that are compared with the encoder in full."""


@dataclass(frozen=True)
class Match:
    """The weights of an encoder in a file.

    Attributes:
        layout: Name of the layout.
        tensors: Tensors by the names of the backbone, of the right shapes.
        others: Shapes of tensors of the right name, but of another shape.
        adapted: What was adapted to the encoder's images, in words.
        unused: Number of tensors of the file that the encoder does not use, by group.
        deeper: Names of tensors of further blocks, which the encoder does not have.
    """

    layout: str
    tensors: Tensors
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    unused: dict[str, int] = field(default_factory=dict)
    deeper: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A part of a file that has names of an encoder: the tensors under a prefix, by a naming."""

    tensors: Tensors
    prefix: str
    own: dict[str, str]
    plain: bool

    def loaded(self, backbone: nn.Module, channels: int) -> Match:
        """Return the tensors that fit the backbone, adapted by the rules of timm."""
        under: Tensors = {}
        if self.plain:
            under = {k[len(self.prefix) :]: v for k, v in self.tensors.items() if k.startswith(self.prefix)}
            named, adapted = _filtered(under, backbone)
        else:
            named, adapted = {own: self.tensors[name] for own, name in self.own.items()}, []
        wanted = backbone.state_dict()
        named = {k: v for k, v in named.items() if k in wanted}
        for key, value in list(named.items()):
            if value.shape != wanted[key].shape:
                named[key] = _adapted(key, value, wanted[key], backbone, channels, adapted)
        fit = {k: v for k, v in named.items() if v.shape == wanted[k].shape}
        others = {k: tuple(under.get(k, v).shape) for k, v in named.items() if k not in fit}
        return Match("", fit, others, tuple(adapted))


def match(backbone: nn.Module, contents: Contents, channels: int) -> Match:
    """Return the tensors of a file that fit a backbone best, in whichever layout they are.

    The names of the file are compared with those of the backbone from their ends, so that every wrapper and prefix is
    found by the content. Of several complete encoders, `weight_layouts.preference` decides.

    Args:
        backbone: The backbone.
        contents: Content of the file.
        channels: Channels of the images of the backbone.
    """
    parts = _parts(backbone, contents.tensors)
    loaded = [(part, part.loaded(backbone, channels)) for part in parts]
    if not loaded:
        return Match(layout_name("", contents.tensors, contents.values), {}, {}, (), _groups("", contents.tensors))
    part, best = max(loaded, key=lambda one: (len(counted(one[1].tensors)), preference(one[0].prefix)))
    used = {tensor.data_ptr() for tensor in best.tensors.values()} | {
        part.tensors[name].data_ptr() for name in part.own.values()
    }
    rest = [
        name for name, tensor in part.tensors.items()
        if not (name.startswith(part.prefix) and (tensor.data_ptr() in used or name in part.own.values()))
    ]  # fmt: skip
    layout = layout_name(part.prefix, contents.tensors, contents.values)
    deeper = _deeper(part, rest)
    unused = _groups(part.prefix, [name for name in rest if name not in deeper])
    return Match(layout, best.tensors, best.others, best.adapted, unused, deeper)


def _deeper(part: _Part, rest: list[str]) -> tuple[str, ...]:
    """Return the names among unused ones that belong to further blocks of a used stage: `layer1.2`, `blocks.12`."""

    def block(name: str) -> tuple[str, ...]:
        words = name[len(part.prefix) :].split(".")
        return tuple(words[: 2 if len(words) > 1 and words[1].isdigit() else 1])

    used = {block(name) for name in part.own.values()}
    stages = {one[0] for one in used}
    under = [name for name in counted(dict.fromkeys(rest)) if name.startswith(part.prefix)]
    return tuple(name for name in under if block(name)[0] in stages and block(name) not in used)


def counted(tensors: Mapping[str, object]) -> list[str]:
    """Return the names of the tensors that count: all but the step counters of batch norm, which old files lack."""
    return [name for name in tensors if not name.endswith("num_batches_tracked")]


def _parts(backbone: nn.Module, tensors: Tensors) -> list[_Part]:
    """Return the parts of a file that have most names of a backbone, best first."""
    parts: list[_Part] = []
    for renamed in namings(tensors):
        for plain, names in enumerate(aliases(backbone)):
            under: dict[str, dict[str, str]] = defaultdict(dict)
            for name in renamed:
                words = name.split(".")
                for i in range(len(words)):
                    if own := names.get(".".join(words[i:])):
                        under["".join(f"{word}." for word in words[:i])][own] = name
            parts += [_Part(renamed, prefix, own, plain == 0) for prefix, own in under.items()]
    parts.sort(key=lambda part: -len(part.own))
    most = len(parts[0].own) if parts else 0
    return [part for part in parts if len(part.own) >= most / 2][:_CANDIDATES]


def _filtered(tensors: Tensors, backbone: nn.Module) -> tuple[Tensors, list[str]]:
    """Return tensors as timm converts them for a model (position and patch embeddings, DINOv2, DINOv3)."""
    module = sys.modules[type(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    if convert is None:
        return tensors, []
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # timm prints exceptions
            warnings.simplefilter("ignore")
            converted = dict(convert(dict(tensors), backbone))
    except Exception:  # timm's conversion assumes weights of this architecture; others are compared as they are
        return tensors, []
    adapted = [
        f"{name} {_shape(tensors[name])} to {_shape(value)} (timm's rule)"
        for name, value in converted.items()
        if name in tensors and isinstance(value, Tensor) and value.shape != tensors[name].shape
    ]
    return {k: v for k, v in converted.items() if isinstance(v, Tensor)}, adapted


def _adapted(key: str, value: Tensor, wanted: Tensor, backbone: nn.Module, channels: int, adapted: list[str]) -> Tensor:
    """Return a first convolution for other channels, or a position embedding of torchvision for another size."""
    first = next((n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)), None)
    same = value.ndim == 4 and value.shape[0] == wanted.shape[0] and value.shape[2:] == wanted.shape[2:]
    if key == f"{first}.weight" and same and value.shape[1] == 3 and wanted.shape[1] == channels:
        from timm.models import adapt_input_conv

        adapted.append(f"{key} from 3 to {many(channels, 'channel')} (timm's rule)")
        return adapt_input_conv(channels, value)
    if key == "encoder.pos_embedding" and value.ndim == 3 and value.shape[2] == wanted.shape[2]:
        from timm.layers import resample_abs_pos_embed

        side = round((wanted.shape[1] - 1) ** 0.5)
        adapted.append(f"{key} {_shape(value)} to {_shape(wanted)} (timm's rule)")
        return resample_abs_pos_embed(value, new_size=[side, side], num_prefix_tokens=1)
    return value


def _groups(prefix: str, names: Mapping[str, object] | list[str]) -> dict[str, int]:
    """Return the number of names by the first word in which they differ from a prefix."""
    at = prefix.split(".")[:-1]
    groups: Counter[str] = Counter()
    for name in names:
        words = name.split(".")
        groups[next((w for i, w in enumerate(words) if i >= len(at) or w != at[i]), name)] += 1
    return dict(groups)


def _shape(tensor: Tensor | tuple[int, ...]) -> str:
    shape = tensor.shape if isinstance(tensor, Tensor) else tensor
    return "x".join(map(str, shape)) or "scalar"


def load(backbone: nn.Module, best: Match, name: str, origin: str, least: float, strict: bool = False) -> str:
    """Load the weights of a match into a backbone, and return a sentence about them.

    Args:
        backbone: The backbone; tensors that do not fit stay as they are.
        best: The match.
        name: Name of the encoder.
        origin: Origin of the weights.
        least: Smallest share of the tensors that must fit.
        strict: Also refuse weights of which the encoder does not use all.

    Raises:
        ConfigError: If fewer tensors fit.
        DataError: If a tensor has values that are not finite, or whole numbers instead of floating-point numbers.
    """
    own = backbone.state_dict()
    every = counted(own)
    fit = [key for key in every if key in best.tensors]
    problems = _problems(best, own, strict)
    share = f"{len(fit)} of {len(every)} tensors fit"
    beyond = len(best.deeper) + (sum(best.unused.values()) if strict else 0)
    if len(fit) < least * (len(every) + beyond):
        where = origin if strict else f"{origin}; {best.layout}"
        raise ConfigError(f"the weights do not fit {name} ({where}): {share}; {problems}. {_remedy(best, own)}")
    if whole := [key for key in fit if own[key].is_floating_point() and not best.tensors[key].is_floating_point()]:
        kind = str(best.tensors[whole[0]].dtype).removeprefix("torch.")
        raise DataError(
            f"{origin}: {listed(whole, 3)} holds whole numbers ({kind}), as quantised weights do, which are not the "
            "weights themselves; choose a file of floating-point numbers"
        )
    if bad := [key for key in fit if not bool(torch.isfinite(best.tensors[key]).all())]:
        raise DataError(
            f"{origin}: {listed(bad, 3)} holds values that are not finite; the weights are damaged. Choose others, or "
            "download them again"
        )
    backbone.load_state_dict(best.tensors, strict=False)
    sentences = [f"Initial weights: {origin} ({best.layout}): {share}"]
    sentences += [f"Initialised or left out: {problems}"] if problems else []
    sentences += [f"Adapted: {'; '.join(best.adapted)}"] if best.adapted else []
    sentences += [f"Not used: {_unused(best.unused)}"] if best.unused else []
    return ". ".join(sentences)


def _problems(best: Match, own: Mapping[str, Tensor], strict: bool) -> str:
    """Return which tensors are missing, of another shape, or of further blocks; strict: also all unused ones."""
    every = counted(own)
    shapes = [
        f"{key} ({_shape(best.others[key])} in the file, {_shape(own[key])} here)"
        for key in every if key in best.others
    ]  # fmt: skip
    lists = {
        "missing": [key for key in every if key not in best.tensors and key not in best.others],
        "of another shape": shapes,
        "of further blocks": list(best.deeper),
    }
    problems = [f"{len(keys)} {what} ({listed(keys, 3)})" for what, keys in lists.items() if keys]
    if strict and best.unused:
        problems.append(f"{sum(best.unused.values())} unexpected ({listed(list(best.unused), 3)})")
    return "; ".join(problems)


def _remedy(best: Match, own: Mapping[str, Tensor]) -> str:
    """Return what to do if too few weights fit: if little more than the first convolution differs, name the stem."""
    first = ("conv1.weight", "conv1.0.weight", "stages.0.0.weight")
    stem = next((key for key in first if key in own and key not in best.tensors), None)
    if stem is not None and len(best.tensors) > len(own) / 2:
        ours, theirs = own[stem].shape[-1], best.others.get(stem, (0,))[-1]
        if theirs not in (0, ours):
            way = f'stem="{"cifar" if theirs == 3 else "imagenet"}"'
            if stem == "stages.0.0.weight":  # of the encoder fast, whose stem follows from the size of the images
                way = "at most 96 pixels (--image-size 32)" if theirs == 3 else "more than 96 pixels (--image-size 224)"
            return (
                f"The first convolution is {theirs}x{theirs} in the weights, but {ours}x{ours} in the stem of this "
                f"encoder: choose {way}"
            )
        return "The stem differs (its first convolutions): choose the encoder of the weights, with the same stem"
    return "Choose the encoder of the weights (--encoder), or accept fewer tensors (--init-min-match)"


def _unused(groups: Mapping[str, int]) -> str:
    kinds: dict[str, list[str]] = defaultdict(list)
    for group, count in groups.items():
        kinds[noun(group)].append(f"{group} ({count})")
    return "; ".join(f"{kind}: {listed(names, 4)}" for kind, names in kinds.items())
