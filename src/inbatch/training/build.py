"""Build the components of a run from a recipe: source, loader, views, networks, method, optimiser, step."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inbatch.batch import Batch
from inbatch.context.curation import CURATORS, Curator
from inbatch.context.fusion import FUSIONS, Fusion
from inbatch.data import Loader, Source
from inbatch.data.views import PRESETS, AnyViews, TransformedViews, View, Views, make_views, own_views
from inbatch.data.views.crop_pairs import arrange
from inbatch.errors import ConfigError, DataError, reason
from inbatch.methods.base import Method
from inbatch.models import Encoder, check_side
from inbatch.models.cpu_convolution import by_product
from inbatch.models.lora import add_lora
from inbatch.models.network import Network, make_target_network
from inbatch.models.sync_batchnorm import synchronise_norm
from inbatch.nn import triton_logsumexp
from inbatch.nn.heads import Head
from inbatch.runtime import distributed, own_parts
from inbatch.runtime.device import precision_for, slow_weight_gradients
from inbatch.training.budget import Timeline
from inbatch.training.checkpoint_recipe import run_facts
from inbatch.training.optim import build_optimizer, layer_scales, parameter_groups, scaled_lr
from inbatch.training.presets import method_named
from inbatch.training.rates import frozen_steps, set_rates
from inbatch.training.recipe import Recipe
from inbatch.training.run_encoder import fit_first_layer, make_encoder, seeded, starting_weights, view_sides
from inbatch.training.step import Step
from inbatch.training.teacher import load_teacher, teacher_network


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

    @property
    def total(self) -> int:
        """Number of steps of the whole run."""
        return self.timeline.total

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this run besides its state (`checkpoint_recipe.run_facts`)."""
        return run_facts(self.recipe, self.context, distributed.world())

    def parts(self) -> dict[str, Any]:
        """Return every component that has state to save in a checkpoint, by name."""
        parts: dict[str, Any] = {"tower": self.network, "method": self.method, "optimizer": self.optimizer}
        optional = {"target": None if self.method.teacher else self.target, "curator": self.step.curator}
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
    context, groups = _context(recipe, distributed.world())
    _check(recipe, source, device, context)
    parts = _draw_weights(recipe, source, device, context, (init, teacher))
    loader = loader or _make_loader(recipe, source, parts.views, device, workers)
    # Chosen by the free memory if the recipe leaves it open; it decides pixels, so a resumed run must not choose again.
    recipe = replace(recipe, cache_on_device=loader.held is not None)
    network, target = _make_networks(recipe, parts, device)
    piece = recipe.batch_size // distributed.world() // groups
    curator = curator_of(recipe, parts.views, network, piece, device)
    if recipe.compile:
        _compile(parts.views, network, target)
    optimizer, lr = _make_optimizer(recipe, parts, network)
    timeline = Timeline(recipe.steps or recipe.epochs * loader.steps, list(recipe.replans))
    set_rates(recipe, loader.steps, timeline, optimizer, 0)  # an invalid schedule raises an error now
    frozen = frozen_steps(recipe, loader.steps, timeline.planned)
    if frozen and not any(p.requires_grad for p in network.heads.parameters()):
        raise ConfigError(f"schedule.freeze_encoder_epochs: {recipe.method.name} has no heads that could learn alone")
    step = Step(
        method=parts.method, network=network, call=distributed.wrap(network), target=target,
        views=lambda batch: drawn(parts.views, batch, device), count=len(parts.views), optimizer=optimizer,
        schedule=functools.partial(set_rates, recipe, loader.steps, timeline), groups=groups,
        progress=timeline.progress, seed=recipe.seed,
        synced=recipe.sync_norm, curator=curator, shuffle=recipe.shuffle_groups, products=recipe.loss_precision,
        variance=recipe.variance_weight, scale=functools.partial(image_scale, recipe), frozen=frozen,
    )  # fmt: skip
    return RunComponents(
        recipe, source, loader, parts.views, parts.encoder, parts.method, network, target, optimizer, step, context, lr,
        timeline, tuple(parts.notes),
    )  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """What draws random weights, in the order in which it draws them, and the views.

    fused: numbers of the views that `fuse` mixes. notes: sentences for the user. teacher: frozen encoder, if any.
    """

    method: Method
    encoder: Encoder
    views: AnyViews
    heads: dict[str, Head]
    fuse: Fusion | None
    fused: Sequence[int]
    notes: list[str]
    teacher: Encoder | None


def _check(recipe: Recipe, source: Source, device: torch.device, context: int) -> None:
    """Raise ConfigError or DataError for a recipe that this device or these images do not allow."""
    if recipe.loss_precision == "tf32x3" and device.type != "cuda":
        raise ConfigError("loss_precision = tf32x3 is a GPU's: here take float32, or bf16")
    if distributed.world() > 1:  # ranks that reduce results must compute them in the same way
        kernels = triton_logsumexp.usable(torch.zeros(1, 1, device=device))
        facts = {"use of Triton's kernels": kernels, "precision": precision_for(recipe.precision, device)}
        distributed.assert_equal_across_ranks(facts)
    check_labels(recipe, source)
    if recipe.shuffle_groups and recipe.batch_size == context:
        raise ConfigError(
            f"shuffle_groups: the batch of {context} is one group, there is nothing to shuffle; set context"
        )


def check_labels(recipe: Recipe, source: Source) -> None:
    """Raise DataError if the method learns from labels and the images have none."""
    if method_named(recipe.method.name).labels and not bool((source.labels >= 0).any()):
        raise DataError(
            f"{recipe.method.name} learns from labels, but {source.name} has none{source.why_unlabelled()}: "
            "use class sub-folders, or name the column of labels (--label-column)"
        )


def _draw_weights(
    recipe: Recipe, source: Source, device: torch.device, context: int, kept: tuple[Path | None, Path | None]
) -> _Parts:
    """Create method, encoder, heads and fusion with weights from the recipe's seed, or from the copies in a run."""
    notes: list[str] = []
    start, teacher = kept[0] or starting_weights(recipe, notes), load_teacher(recipe, kept[1], notes)
    with seeded(recipe, device):
        with _settings_of("method", recipe.method.name):
            method = method_named(recipe.method.name)(**recipe.method.options)
        encoder = make_encoder(recipe, start)
        notes += encoder.init_notes
        for side, setting in view_sides(recipe).items():
            check_side(encoder, side, setting)
        if start is None:
            fit_first_layer(encoder, source)
        views = views_of(recipe, encoder.mean, encoder.std)
        _check_views(recipe, method, len(views))
        with _settings_of("method", recipe.method.name):
            method.teacher_width = teacher.feature_width if teacher else 0
            classes = int(source.labels.max()) + 1
            method.prepare(images=len(source), classes=classes, batch=recipe.batch_size, views=len(views))
            heads = method.heads(encoder.width)
        if recipe.lora:
            notes.append(_adapted(recipe, encoder))
        notes += method.notes(len(source))
        return _Parts(method, encoder, views, heads, *fusion(recipe, method, views, encoder, context), notes, teacher)


def _adapted(recipe: Recipe, encoder: Encoder) -> str:
    """Let only matrices of low rank learn in the encoder; return a sentence about them."""
    if recipe.encoder.options.get("init") is None and "encoder" not in recipe.own:
        raise ConfigError(
            "encoder.lora freezes the weights of the encoder, and these are random: name weights to start from "
            "(--init), or leave out encoder.lora"
        )
    return add_lora(encoder, recipe.lora or 0)


def _make_loader(recipe: Recipe, source: Source, views: AnyViews, device: torch.device, workers: int | None) -> Loader:
    """Return the loader of this rank's part of every batch."""
    return Loader(
        source, batch=recipe.batch_size, views=views, seed=recipe.seed, device=device, rank=distributed.rank(),
        world=distributed.world(), resident=recipe.cache_on_device, workers=workers,
        whole=recipe.curate is not None or views.whole, max_bad=recipe.max_unreadable,
    )  # fmt: skip


def _make_networks(recipe: Recipe, parts: _Parts, device: torch.device) -> tuple[Network, Network | None]:
    """Return the online and the target network on the device, in its precision and layout."""
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
    parts.method.to(device)
    for module in filter(None, (network, target)):
        module.to(device)
        if recipe.channels_last:
            module.to(memory_format=torch.channels_last)
        if recipe.sync_norm and not (parts.teacher and module is target):
            synchronise_norm(module)
            distributed.make_context_global(module)
    return network, target


def _compile(views: AnyViews, *networks: Network | None) -> None:
    """Compile views (for accelerators; a CPU uses its own kernel) and networks."""
    views.compile()
    for network in filter(None, networks):
        network.compile()


def _make_optimizer(recipe: Recipe, parts: _Parts, network: Network) -> tuple[Optimizer, float]:
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
    with _settings_of("optimizer", name):
        optimizer = build_optimizer(name, groups, **options)
    return optimizer, lr if has_rate else optimizer.param_groups[0]["lr"]


def views_of(recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> AnyViews:
    """Return the views of a recipe, normalised with this mean and standard deviation per channel."""
    name, options = recipe.views.name, recipe.views.options
    crops, pairs = arrange(recipe.crops, make_views(name, options, recipe.channels))
    if name not in PRESETS:
        if own_parts.find("views", name) is None:
            raise own_parts.demand("views", name)
        if not isinstance((own := own_views(name, options))[0], View):
            return TransformedViews(own, options["sizes"], mean, std, name)
    return Views(crops, mean, std, pairs)


def drawn(views: AnyViews, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """Return the images of the views of a batch; its pixels may still be in host memory."""
    return views(batch.to(device)).images


def image_scale(recipe: Recipe, progress: float) -> float:
    """Return the share of the image side that the encoder uses at a share of the run."""
    return recipe.grow_from if progress < recipe.grow_until else 1.0


def local_batch_size(recipe: Recipe, world: int) -> int:
    """Return the number of samples to split into context groups: the local batch, with sync_norm the global batch."""
    if recipe.batch_size % world:
        raise ConfigError(
            f"a batch of {recipe.batch_size} cannot be shared by {world} processes: use a multiple of {world}"
        )
    return recipe.batch_size if recipe.sync_norm else recipe.batch_size // world


def _context(recipe: Recipe, world: int) -> tuple[int, int]:
    """Return the number of samples in a context group, and the number of groups per rank."""
    if recipe.context == "auto":
        raise ConfigError(
            "context = auto must be resolved before build: training.auto_context.resolve puts in a number"
        )
    share = local_batch_size(recipe, world)
    context = recipe.context or share
    if context > share or share % context or (recipe.sync_norm and context % world):
        whose = "the batch" if world == 1 or recipe.sync_norm else "a rank's share of the batch"
        raise ConfigError(f"a context of {context} does not divide {whose}, {share}: choose a divisor of it")
    if context // (world if recipe.sync_norm else 1) < 2:
        raise ConfigError("a context group needs at least 2 samples on every rank: one sample has no statistics")
    return context, share // context


def _check_views(recipe: Recipe, method: Method, views: int) -> None:
    least, most = method.views
    if views < least or (most is not None and views > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{recipe.method.name} learns from {wanted} views, but views {recipe.views.name} draws {views}: "
            "choose other views (--set views.name=...)"
            + (" or views.num_views" if "num_views" in recipe.views.options else "")
        )


@contextlib.contextmanager
def _settings_of(part: str, name: str) -> Iterator[None]:
    """Turn errors of a constructor (a negative width, a rate below 0) into a ConfigError that names the setting."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError) as e:
        raise ConfigError(f"{part} {name} cannot be made with these settings: {str(e) or reason(e)}") from e


def fusion(
    recipe: Recipe, method: Method, views: AnyViews, encoder: Encoder, context: int
) -> tuple[Fusion | None, Sequence[int]]:
    """Return the batch fusion of a recipe and the indices of the views that it fuses."""
    if recipe.fuse is None:
        return None, ()
    learned, requested = set(method.online_views(len(views))), recipe.fuse.options["views"]
    if requested is not None and (not requested or not set(requested) <= set(range(len(views)))):
        raise ConfigError(f"fuse.views = {list(requested)}: the views are numbered 0 to {len(views) - 1}")
    if requested is not None and not learned & set(requested):
        raise ConfigError(
            f"fuse.views = {list(requested)}: {recipe.method.name} learns from view "
            f"{', '.join(map(str, sorted(learned)))} only, and a fusion of others would never be trained"
        )
    fused = requested or ((1,) if 1 in learned else (max(learned),))
    sizes = {views.views[v].size for v in fused}
    if len(sizes) > 1:
        raise ConfigError(f"fuse.views = {list(fused)} are of {sorted(sizes)} pixels: fuse views of one size")
    arguments: dict[str, Any] = {"group": context, "size": sizes.pop(), "mean": encoder.mean, "std": encoder.std}
    make_fusion: Any = FUSIONS[recipe.fuse.name]
    return make_fusion(**arguments, **recipe.fuse.options), fused


def curator_of(recipe: Recipe, views: AnyViews, network: Network, piece: int, device: torch.device) -> Curator | None:
    """Return the curator of a recipe; it embeds `piece` images at a time."""
    if recipe.curate is None:
        return None
    if len(views) < 2:
        raise ConfigError(f"curation compares the views of a sample, but {recipe.method.name} draws {len(views)}")
    where = recipe.curate.options["where"]
    if where == "projection" and "projection" not in network.heads:
        raise ConfigError(f"{recipe.method.name} has no projection: curate.where is features")

    def embed(model: Network, batch: Batch) -> Tensor:
        def rows(image: Tensor) -> Tensor:
            return model.features(image) if where == "features" else model.outputs(image)[where]

        with model.evaluating():
            parts = (views(part.to(device)).images for part in batch.split(piece))  # sequentially
            return torch.cat([torch.stack([rows(image) for image in images]) for images in parts], dim=1)

    curator = CURATORS[recipe.curate.name](**recipe.curate.options)
    curator.prepare(network, embed, recipe.epochs)
    return curator.to(device)
