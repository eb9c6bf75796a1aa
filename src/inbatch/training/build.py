"""Build the components of a run from a recipe: source, loader, views, networks, method, optimiser, step."""

import contextlib
import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from inbatch.data import Loader, Source
from inbatch.data.samplers import SAMPLERS
from inbatch.data.streams import Sequential
from inbatch.data.views import AnyViews, TransformedViews
from inbatch.errors import ConfigError
from inbatch.methods.base import Method
from inbatch.models import Encoder
from inbatch.models.cpu_convolution import by_product
from inbatch.models.network import Network, make_target_network
from inbatch.models.recompute import blocks, recompute_activations
from inbatch.models.sync_batchnorm import synchronise_norm
from inbatch.runtime import distributed
from inbatch.runtime.device import precision_for, slow_weight_gradients
from inbatch.runtime.sharding import shard
from inbatch.training import build_checks
from inbatch.training.budget import Timeline
from inbatch.training.build_checks import check_recipe, context_and_groups
from inbatch.training.checkpoint_recipe import run_facts
from inbatch.training.drawn_parts import DrawnParts, draw_weights, settings_of
from inbatch.training.negatives import embeds, plug_in_negatives
from inbatch.training.optim import build_optimizer, layer_scales, parameter_groups, scaled_lr
from inbatch.training.plug_ins import curator_of, without_effect
from inbatch.training.rates import frozen_steps, set_rates
from inbatch.training.recipe import Recipe
from inbatch.training.run_views import drawn, image_scale
from inbatch.training.step import Step
from inbatch.training.teacher import teacher_network
from inbatch.training.whole_encoder import WholeEncoder


@dataclass
class RunComponents:
    """The components of a run, ready for its first step."""

    recipe: Recipe
    source: Source
    loader: Loader
    views: AnyViews
    encoder: Encoder
    method: Method
    network: Network
    target: Network | None
    optimizer: Optimizer
    step: Step
    context: int
    lr: float
    timeline: Timeline
    notes: tuple[str, ...] = ()
    whole: WholeEncoder | None = None

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Give `encoder` its weights within the context, which every rank must enter; without shards it has them."""
        return contextlib.nullcontext() if self.whole is None else self.whole.gathered()

    @property
    def total(self) -> int:
        """Number of steps of the whole run."""
        return self.timeline.total

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this run besides its state (`checkpoint_recipe.run_facts`)."""
        return run_facts(self.recipe, self.context, distributed.world())

    def parts(self) -> dict[str, Any]:
        """Return every component that has state to save in a checkpoint, by name."""
        parts: dict[str, Any] = {"network": self.network, "method": self.method, "optimizer": self.optimizer}
        optional = {
            "target": None if self.method.teacher else self.target,
            "curator": self.step.curator,
            "sampler": self.loader.sampler,
        }
        return parts | {name: part for name, part in optional.items() if part is not None}


def build(
    recipe: Recipe, source: Source, *, device: torch.device, workers: int | None = None, loader: Loader | None = None,
    init: Path | None = None, teacher: Path | None = None,
) -> RunComponents:  # fmt: skip
    """Build every component of a run; invalid combinations raise an error here, not at a later step.

    The recipe of the result states whether the images are kept on the device (`cache_on_device`).

    Args:
        recipe: The complete recipe.
        source: Images to train on.
        device: Device of the networks.
        workers: Number of processes that decode images; None chooses it.
        loader: A loader to reuse, made for the same images, batch, seed and views.
        init: Directory of the run's initial weights (`run_encoder.kept_initial`).
        teacher: Directory of the run's copy of its teacher (`teacher.kept_teacher`).
    """
    context, groups = context_and_groups(recipe, distributed.world())
    check_recipe(recipe, source, device, context)
    parts = draw_weights(recipe, source, device, context, (init, teacher))
    loader = loader or _make_loader(recipe, source, parts.views, device, workers)
    # Chosen by the free memory if the recipe leaves it open; it decides pixels, so a resumed run must not choose again.
    recipe = replace(recipe, cache_on_device=loader.held is not None)
    if loader.plan is not None:
        recipe = replace(recipe, read_streams=loader.plan.streams)
    whole = WholeEncoder(parts.encoder) if recipe.shard and distributed.world() > 1 else None
    network, target, snapshot = _make_networks(recipe, parts, device, whole is not None)
    piece = recipe.batch_size // distributed.world() // groups
    epochs = recipe.epochs if recipe.steps is None else -(-recipe.steps // loader.steps)
    curator = curator_of(recipe, parts.views, network, snapshot, piece, epochs, device)
    similar = plug_in_negatives(recipe, source, parts.method, network, parts.encoder, piece, device)
    if recipe.compile and whole is None:
        _compile(parts.views, network, target)
    optimizer, lr = _make_optimizer(recipe, parts, network)
    timeline = Timeline(recipe.steps or recipe.epochs * loader.steps, list(recipe.replans))
    set_rates(recipe, loader.steps, timeline, optimizer, 0)  # an invalid schedule raises an error now
    frozen = frozen_steps(recipe, loader.steps, timeline.planned)
    if frozen and not any(p.requires_grad for p in network.heads.parameters()):
        raise ConfigError(
            f"schedule.freeze_encoder_epochs: {recipe.method.name} has no heads that could learn alone; leave it out"
        )
    step = Step(
        method=parts.method, network=network, call=distributed.wrap(network), target=target,
        views=lambda batch: drawn(parts.views, batch, device), count=len(parts.views), optimizer=optimizer,
        schedule=functools.partial(set_rates, recipe, loader.steps, timeline), groups=groups,
        progress=timeline.progress, seed=recipe.seed,
        synced=recipe.sync_norm, curator=curator, shuffle=recipe.shuffle_groups, products=recipe.loss_precision,
        mixer=parts.mixer, variance=recipe.variance_weight, scale=functools.partial(image_scale, recipe), frozen=frozen,
        similar=similar,
    )  # fmt: skip
    return RunComponents(
        recipe, source, loader, parts.views, whole.copy if whole else parts.encoder, parts.method, network, target,
        optimizer, step, context, lr, timeline,
        (*parts.notes, *(loader.sampler.notes() if loader.sampler else ()),
         *without_effect(recipe, source, loader, parts.method, curator, timeline.total)), whole,
    )  # fmt: skip


def _make_loader(recipe: Recipe, source: Source, views: AnyViews, device: torch.device, workers: int | None) -> Loader:
    """Return the loader of this rank's part of every batch."""
    own = views if isinstance(views, TransformedViews) else None
    resident = recipe.cache_on_device
    if own is not None and resident is None and device.type != "cpu" and workers != 0:
        resident = False  # workers draw the views, which cannot read the memory of an accelerator
    return Loader(
        source, batch=recipe.batch_size, views=views, seed=recipe.seed, device=device, rank=distributed.rank(),
        world=distributed.world(), resident=resident, workers=workers, drawer=own,
        whole=recipe.curate is not None or views.whole or embeds(recipe, source), max_bad=recipe.max_unreadable,
        sampler=None if recipe.sampler is None else SAMPLERS[recipe.sampler.name](**recipe.sampler.options),
        read=Sequential(recipe.read_buffer, recipe.read_streams) if recipe.read == "sequential" else None,
    )  # fmt: skip


def _make_networks(
    recipe: Recipe, parts: DrawnParts, device: torch.device, sharded: bool
) -> tuple[Network, Network | None, Network | None]:
    """Return the online and the target network on the device, in its precision and layout.

    The third is a copy for curation, which cannot be made of a sharded network.
    """
    network = Network(
        parts.encoder, parts.heads, parts.method.online, precision_for(recipe.precision, device), recipe.channels_last,
        recipe.joint_norm, parts.fuse, parts.fused,
    )  # fmt: skip
    if device.type == "cpu" and network.precision == torch.bfloat16 and slow_weight_gradients():
        by_product(parts.encoder)
    target = None
    if parts.teacher is not None:
        target = teacher_network(parts.teacher, parts.encoder, network.precision, recipe.channels_last)
    elif parts.method.target:
        target = make_target_network(network, parts.heads, parts.method.target)
    keeps = recipe.curate is not None and recipe.curate.options["model"] == "snapshot"
    snapshot = copy.deepcopy(network) if sharded and keeps else None
    if recipe.checkpoint_activations:  # after the target network is made, which has no backward pass
        build_checks.check_recompute(recipe, parts.encoder)
        recompute_activations(parts.encoder)
        network.recomputes = True
    parts.method.to(device)
    for module in filter(None, (network, target, snapshot)):
        learned = not (parts.teacher and module is target)
        if learned and sharded:
            if recipe.sync_norm:  # before, because shards have classes of their own
                _synchronise(module)
            _shard(recipe, parts.views, module, device)  # before all of it is on the device
        module.to(device)
        if recipe.channels_last and not sharded:  # shards are parts of contiguous tensors
            module.to(memory_format=torch.channels_last)
        if learned and recipe.sync_norm and not sharded:
            _synchronise(module)
    return network, target, snapshot


def _synchronise(network: Network) -> None:
    """Extend the context groups of a network over all ranks."""
    synchronise_norm(network)
    distributed.make_context_global(network)


def _shard(recipe: Recipe, views: AnyViews, network: Network, device: torch.device) -> None:
    """Divide the encoder of a network over the ranks, block by block; compiled, each block is compiled alone."""
    encoder: Any = network.encoder
    units = blocks(encoder.backbone)
    if recipe.compile:
        views.compile()
        for unit in units:
            unit.compile()
    try:
        shard(encoder, units, device)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"shard: {encoder.name} cannot be divided over ranks ({error}); leave it out") from error


def _compile(views: AnyViews, *networks: Network | None) -> None:
    """Compile views (for accelerators; a CPU uses its own kernel) and networks."""
    views.compile()
    for network in filter(None, networks):
        network.compile()


def _make_optimizer(recipe: Recipe, parts: DrawnParts, network: Network) -> tuple[Optimizer, float]:
    """Return the optimiser of the online network, and its learning rate for the recipe's batch."""
    options, name = dict(recipe.optimizer.options), recipe.optimizer.name
    has_rate = "lr" in options
    lr = scaled_lr(options.pop("lr", 1.0), recipe.batch_size, recipe.schedule.scaling)
    vector_lr, decay = options.pop("vector_lr", None), options.pop("layer_decay", 1.0)
    groups = parameter_groups(
        {"encoder": parts.encoder, **network.heads} | ({} if parts.fuse is None else {"fuse": parts.fuse}),
        lr=lr, weight_decay=options.pop("weight_decay", 0.0),
        vector_lr=None if vector_lr is None else scaled_lr(vector_lr, recipe.batch_size, recipe.schedule.scaling),
        own={name: {"constant": True} for name in parts.method.constant_lr()},
        scales=layer_scales(parts.encoder.backbone, decay) if decay < 1 else None,
    )  # fmt: skip
    with settings_of("optimizer", name):
        optimizer = build_optimizer(name, groups, **options)
    return optimizer, lr if has_rate else optimizer.param_groups[0]["lr"]
