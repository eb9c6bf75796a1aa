"""Describe a run before its first step, as text and numbers: model, training and memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.data.views import make_views
from inbatch.errors import many
from inbatch.models import Encoder, added
from inbatch.models.network import Network
from inbatch.models.teacher import TeacherNetwork
from inbatch.runtime import distributed
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.sharding import local
from inbatch.runtime.text import printable
from inbatch.training.build import RunComponents
from inbatch.training.mixing import stand_ins
from inbatch.training.negatives import embeds
from inbatch.training.optim import build_optimizer, parameter_groups
from inbatch.training.recipe import Recipe

_SAMPLES = 8
"""Largest number of samples for which the memory kept by a forward pass is measured; it grows with the samples."""
COPIES = 8
"""Approximate number of copies of the global batch's rows that are held during a loss of gathered rows.

They are received and gathered, online and target, normalised, and their gradients. The memory of a loss does not grow
faster (`nn.logsumexp`).
"""
OWN_COPIES = 10
"""Approximate number of copies of a rank's rows that are held during a loss of own rows (`nn.passing`).

Measured by `benchmarks/ring.py` with 16,384 rows of a rank: its own, their gradients, and pieces that pass.
"""


def describe(built: RunComponents) -> str:
    """Return the data report and the resolved recipe in a few readable lines."""
    r, encoder, world = built.recipe, built.encoder, distributed.world()
    stem = {"cifar": ", CIFAR stem (3x3, no max-pool)", "imagenet": ", ImageNet stem (7x7, max-pool)"}
    heads = ", ".join(f"{name} {parameters(head):,}" for name, head in built.network.heads.items())
    sizes = [view.size for view in built.views.views]
    sides = " + ".join(f"{sizes.count(s)} of {s} px" for s in dict.fromkeys(sizes))
    groups = r.batch_size // built.context
    shared = f" on {world} ranks" if world > 1 else ""
    lines = {
        "data": built.loader.report().replace("\n", "\n" + " " * 9),
        "method": f"{r.method.name}, preset {r.preset}; views {r.views.name}: {sides}{_colourless(r)}",
        "encoder": f"{encoder.name}{stem.get(encoder.stem or '', '')}, {parameters(encoder):,} parameters, "
        f"{encoder.channels}x{encoder.size}x{encoder.size} -> {encoder.width}; heads: {heads}",
        **_teacher(built),
        **_plugins(built),
        **_memory(built),
        "batch": f"{r.batch_size:,} = {groups:,} context group{'s' * (groups > 1)} of {built.context:,}{shared}",
        "rate": f"{r.optimizer.name}, {_rate(built)}; {_schedule(built)}",
        "run": f"{_length(built)}, {_precision(built.network)} on {built.loader.device}, seed {r.seed}",
    }
    return printable("\n".join(f"{name + ':':8} {text}" for name, text in lines.items()))


def _length(built: RunComponents) -> str:
    """Return the length of the run: in epochs, or in steps if these are set."""
    r, each = built.recipe, built.loader.steps
    if r.steps is not None:
        return f"{many(built.total, 'step')}, {built.total / each:.3g} passes over the images"
    return f"{many(r.epochs, 'epoch')} x {many(each, 'step')} = {built.total:,}"


def _teacher(built: RunComponents) -> dict[str, str]:
    """Return the line of the frozen teacher, if the run has one."""
    if not isinstance(built.target, TeacherNetwork):
        return {}
    encoder = built.target.frozen_encoder
    size = f"{encoder.channels}x{encoder.size}x{encoder.size} -> {encoder.feature_width}"
    return {"teacher": f"{encoder.name}, {parameters(encoder):,} parameters, frozen, {size}: {built.recipe.teacher}"}


def _memory(built: RunComponents) -> dict[str, str]:
    """Return the line of what saves memory."""
    options = []
    if built.whole is not None:
        held = sum(local(p).numel() for p in built.network.encoder.parameters())
        options.append(f"encoder sharded over {distributed.world()} ranks, {held:,} parameters on this one")
    if built.recipe.checkpoint_activations:
        options.append("activations of its blocks computed again")
    return {"memory": "; ".join(options)} if options else {}


def _colourless(r: Recipe) -> str:
    """Return which transforms are omitted from the views of images that are not RGB."""
    needed = r.channels != 3 and any(view.needs_colour for view in make_views(r.views.name, r.views.options, 3))
    return f", without saturation, hue and greyscale ({r.channels} channels)" if needed else ""


def _plugins(built: RunComponents) -> dict[str, str]:
    """Return a line for every plug-in of the run."""
    r, fuse, curator = built.recipe, built.network.fuse, built.step.curator
    lines = {}
    if r.fuse is not None and fuse is not None:
        views = ", ".join(map(str, sorted(v for v in built.network.fused if v >= 0)))
        lines["fuse"] = (
            f"{r.fuse.name}, {parameters(fuse):,} parameters, patches of {fuse.patch} px in groups of {built.context}; "
            f"view {views} of 0 to {len(built.views) - 1}"
        )
    if curator is not None:
        lines["curate"] = (
            f"from epoch {curator.starts + 1} on, {curator.rule} rule, at most {curator.rounds} rounds and "
            f"{curator.budget:g} redraws per sample; "
            f"{curator.distance} distance of {curator.where}, {curator.uses} model"
        )
    if r.attend is not None:
        lines["attend"] = attention(built.encoder, built.context)
    if r.negatives is not None:
        lines["negatives"] = _negatives(built)
    if r.mix is not None and built.step.mixer is not None:
        numbers = built.step.online_views()
        mixed, plain = (
            ", ".join(map(str, views)) for views in ([~v for v in numbers if v < 0], [v for v in numbers if v >= 0])
        )
        lines["mix"] = f"{r.mix.name} of view {mixed} in groups of {built.context}; plain: {plain or 'none'}"
    if r.sampler is not None:
        used = {"by"} if r.sampler.options.get("by") == "class" else set(r.sampler.options)
        options = "".join(f", {key} {value}" for key, value in r.sampler.options.items() if key in used)
        lines["sampler"] = f"{r.sampler.name}{options}; {built.loader.steps:,} batches in an epoch"
    if r.crops != "default":
        lines["crops"] = r.crops
    if r.variance_weight:
        lines["variance"] = f"{r.variance_weight:g} times VICReg's variance term added to the loss"
    if r.shuffle_groups:
        whose = "the target network's" if built.target else "those of every view but the first"
        lines["groups"] = f"shuffled: {whose}"
    return lines


def _negatives(built: RunComponents) -> str:
    """Return how the negatives of a run are chosen or weighted."""
    chosen, similar = built.recipe.negatives, built.step.similar
    assert chosen is not None
    if similar is None:
        return ", ".join([chosen.name, *(f"{key} {value:g}" for key, value in chosen.options.items())])
    if embeds(built.recipe, built.source):
        return f"{chosen.name}, from a cosine of {similar.threshold:g} of the features of whole images on"
    return f"{chosen.name}, by the groups of {built.recipe.group_column}"


def attention(encoder: Encoder, context: int) -> str:
    """Return what the attention blocks of an encoder add, for groups of `context` samples."""
    assert encoder.attend is not None
    more, count = added(encoder, max(context, 2)), len(encoder.slots)
    where = "behind the pooling" if encoder.pooled is not None else f"in {count} block{'s' * (count > 1)}"
    return (
        f"{encoder.attend['name']} {where}, "
        f"+{more['parameters']:,} parameters ({more['parameters_share']:.1%}), "
        f"+{more['flops'] / 1e6:,.3g} MFLOP an image ({more['flops_share']:.1%})"
    )


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def estimate(built: RunComponents) -> dict[str, Any]:
    """Return parameters, shapes and bytes of one rank, for JSON; runs the network on a few random images.

    The bytes of activations are those of the tensors that one forward pass of a context group keeps for the backward
    pass. The workspace of convolutions and the fragmentation of an allocator come in addition to the sum.
    """
    share = built.recipe.batch_size // distributed.world()
    group = share // built.step.groups
    shapes = _activations(built, group)
    images, rows, activations = shapes.views, shapes.rows, shapes.kept + _fusing(built, group)
    held = [*built.network.parameters(), *built.network.buffers()]
    learning = [p for p in built.network.parameters() if p.requires_grad]
    memory = {
        "weights": _bytes(held),
        "gradients": _bytes(learning),
        "optimiser": round(_state_per_number(built) * _bytes(learning)),
        "target_network": _bytes([*built.target.parameters(), *built.target.buffers()]) if built.target else 0,
        "curator": _bytes(built.step.curator.buffers()) + _bytes(built.step.curator.parameters())
        if built.step.curator
        else 0,
        "method": _bytes(built.method.buffers()),
        "images_on_device": _bytes([built.loader.held.images]) if built.loader.held else 0,
        "pixels_of_a_batch": share * _pixels(built),
        "rows_of_a_batch": (share * OWN_COPIES if built.step.own_rows() else built.recipe.batch_size * COPIES)
        * sum(x[0] * math.prod(x[2:]) * 4 for x in rows.values()),
        "views_of_a_group": sum(group * math.prod(shape[1:]) * 4 for shape in images),
        "activations_of_a_group": activations,
    }
    return {
        "parameters": {"encoder": parameters(built.encoder)}
        | {name: parameters(head) for name, head in built.network.heads.items()}
        | ({"fuse": parameters(built.network.fuse)} if built.network.fuse else {}),
        "views": [[share, *shape[1:]] for shape in images],
        "rows": {
            name: [shape[0], built.recipe.batch_size * shape[1] // images[0][0], *shape[2:]]
            for name, shape in rows.items()
        },
        "context": built.context,
        "lr": built.lr,
        "precision": _precision(built.network),
        "device": str(built.loader.device),
        "images": len(built.source),
        "steps_per_epoch": built.loader.steps,
        "steps": built.total,
        "memory_bytes_estimate": memory | {"sum": sum(memory.values())},
        "memory_bytes_free": free_bytes(built.loader.device, distributed.world()) + memory["images_on_device"],
    }


@dataclass(frozen=True)
class _ForwardPass:
    """A forward pass of a few samples.

    Attributes:
        views: Shapes of the views.
        rows: Shapes of the rows, by head.
        kept: Bytes that are kept for the backward pass.
    """

    views: list[tuple[int, ...]]
    rows: dict[str, tuple[int, ...]]
    kept: int


def _activations(built: RunComponents, group: int) -> _ForwardPass:
    """Return the forward pass of a few samples, with the bytes that a group of this size keeps."""
    passed = _forward(built, min(group, _SAMPLES))
    if group <= _SAMPLES:
        return passed
    # Extrapolated linearly: a part of it (weights in bfloat16) does not grow.
    per_sample = (passed.kept - _forward(built, _SAMPLES // 2).kept) / (_SAMPLES - _SAMPLES // 2)
    return replace(passed, kept=passed.kept + round(per_sample * (group - _SAMPLES)))


def _forward(built: RunComponents, samples: int) -> _ForwardPass:
    """Run random images through the online network."""
    sizes = [view.size for view in built.views.views]
    views = [_images(built, samples, size) for size in sizes]
    # Never fused: a group of so few samples may not fit.
    images, plain = stand_ins(built.step.mixer, views, built.step.online_views())
    network = built.network.forward  # not through the call, which may compile first
    rows, kept = _kept(built, lambda: network(images, plain))
    return _ForwardPass([tuple(v.shape) for v in views], {name: tuple(x.shape) for name, x in rows.items()}, kept)


def _pixels(built: RunComponents) -> int:
    """Return the bytes of one sample that a batch holds on the device before its views are drawn."""
    if built.loader.held is not None or built.loader.device.type != "cpu":
        return 0  # part of the resident images, or in host memory until the group is processed
    sizes = [view.size for view in built.views.views]
    if built.recipe.curate is not None or embeds(built.recipe, built.source):  # whole canvases arrive
        return built.recipe.channels * (2 * max(sizes)) ** 2
    return built.recipe.channels * sum(size**2 for size in sizes)


def _fusing(built: RunComponents, group: int) -> int:
    """Return the bytes that batch fusion keeps for the backward pass."""
    fuse = built.network.fuse
    if fuse is None:
        return 0
    learned = sorted(built.network.fused & set(built.method.online_views(len(built.views))))
    images = _images(built, group, built.views.views[learned[0]].size)
    with built.network.autocast(images):
        return _kept(built, lambda: fuse(images))[1] * len(learned)


def _images(built: RunComponents, samples: int, size: int) -> Tensor:
    return torch.randn(samples, built.recipe.channels, size, size, device=built.loader.device)


def _kept(built: RunComponents, run: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of a forward pass, and the bytes that it keeps for the backward pass, excluding weights."""
    weights = {local(p).untyped_storage().data_ptr() for p in built.network.parameters()}
    kept: dict[int, Any] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return result, sum(storage.nbytes() for storage in kept.values())  # 0 for gathered weights, which were freed


def _state_per_number(built: RunComponents) -> float:
    """Return the numbers that the optimiser keeps per parameter, measured in one step of a small layer."""
    options = dict(built.recipe.optimizer.options)
    small = nn.Linear(64, 64, bias=False)
    rates = {"lr": options.pop("lr", 1e-3), "weight_decay": options.pop("weight_decay", 0.0)}
    groups = parameter_groups({"small": small}, **rates)
    for name in ("vector_lr", "layer_decay"):
        options.pop(name, None)
    optimizer = build_optimizer(built.recipe.optimizer.name, groups, **options)
    small.weight.grad = torch.ones_like(small.weight)
    optimizer.step()
    kept = [x for x in optimizer.state[small.weight].values() if isinstance(x, Tensor)]
    return sum(x.numel() for x in kept) / small.weight.numel()


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in map(local, tensors))


def _rate(built: RunComponents) -> str:
    lr, batch = built.recipe.optimizer.options["lr"], built.recipe.batch_size
    rule = {"linear": f" = {lr:g} x {batch}/256", "sqrt": f" = {lr:g} x sqrt({batch})", "none": ""}
    slowest = min(group["base_lr"] for group in built.optimizer.param_groups)
    decay = built.recipe.optimizer.options.get("layer_decay", 1.0)
    layers = f", layer decay {decay:g} down to {slowest:.3g}" if decay < 1 else ""
    return f"lr {built.lr:.4g}{rule[built.recipe.schedule.scaling]}{layers}"


def _schedule(built: RunComponents) -> str:
    s = built.recipe.schedule
    shapes = {
        "cosine": f"cosine to {s.end * built.lr:.3g}",
        "step": f"a tenth after {', '.join(f'{m:.0%}' for m in s.milestones)}",
        "constant": "constant",
    }
    steps = many(built.step.frozen, "step")
    return (
        (f"encoder frozen for {steps}; " if built.step.frozen else "")
        + (f"warm-up of {s.warmup_epochs:g} epoch{'s' * (s.warmup_epochs != 1)}, then " if s.warmup_epochs else "")
        + shapes[s.name]
    )


def _precision(network: Network) -> str:
    return str(network.precision).removeprefix("torch.")
