"""Parameters, shapes and memory of a run, estimated before its first step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inbatch.models.network import Network
from inbatch.runtime import distributed
from inbatch.runtime.memory import free_bytes
from inbatch.runtime.sharding import local, unit_sizes
from inbatch.training.build import RunComponents
from inbatch.training.mixing import stand_ins
from inbatch.training.negatives import embeds
from inbatch.training.optim import build_optimizer, parameter_groups

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
_GATHERED = 3
"""Whole tensors of a sharded network's largest unit: its weights, those of the next one, and its gradients."""


def parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def precision_name(network: Network) -> str:
    """Return the name of the type in which a network computes."""
    return str(network.precision).removeprefix("torch.")


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
        "gathered": _GATHERED * max(unit_sizes(built.network), default=0),
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
        "precision": precision_name(built.network),
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
