"""Batch fusion, batch curation and mixing of a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.context.curation import CURATORS, Curator
from inbatch.context.fusion import FUSIONS, Fusion
from inbatch.context.mixing import MIXERS, Mixer
from inbatch.data import Loader, Source
from inbatch.data.views import AnyViews
from inbatch.errors import ConfigError
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.models import Encoder
from inbatch.models.network import Network
from inbatch.runtime import distributed
from inbatch.runtime.remote import is_url
from inbatch.runtime.sharding import is_sharded
from inbatch.training.mixing import compared_views, learned_views
from inbatch.training.negatives import embeds
from inbatch.training.recipe import Recipe, Schedule


def fusion(
    recipe: Recipe, method: Method, views: AnyViews, encoder: Encoder, context: int, mixer: Mixer | None
) -> tuple[Fusion | None, Sequence[int]]:
    """Return the batch fusion of a recipe and the indices of the views that it fuses."""
    if recipe.fuse is None:
        return None, ()
    learned, requested = set(learned_views(mixer, method, len(views))), recipe.fuse.options["views"]
    if requested is not None and (not requested or not set(requested) <= set(range(len(views)))):
        raise ConfigError(f"fuse.views = {list(requested)}: the views are numbered 0 to {len(views) - 1}")
    if requested is not None and not learned & set(requested):
        mixed = f" with mixed images ({recipe.mix.name})" if recipe.mix else ""
        numbers = ", ".join(map(str, sorted(learned)))
        raise ConfigError(
            f"fuse.views = {list(requested)}: {recipe.method.name}{mixed} learns from view {numbers} only, and a "
            f"fusion of others would never be trained: pass --set fuse.views=[{numbers}]"
        )
    fused = requested or ((1,) if 1 in learned else (max(learned),))
    sizes = {views.views[v].size for v in fused}
    if len(sizes) > 1:
        raise ConfigError(f"fuse.views = {list(fused)} are of {sorted(sizes)} pixels: fuse views of one size")
    arguments: dict[str, Any] = {"group": context, "size": sizes.pop(), "mean": encoder.mean, "std": encoder.std}
    make_fusion: Any = FUSIONS[recipe.fuse.name]
    return make_fusion(**arguments, **recipe.fuse.options), fused


def _unused_settings(recipe: Recipe) -> list[str]:
    """Return a sentence for every setting whose effect needs another one that is not set."""
    schedule, notes = recipe.schedule, []
    if (recipe.grow_from < 1) != (recipe.grow_until > 0):
        notes.append(
            f"grow_from = {recipe.grow_from:g} has no effect with grow_until = {recipe.grow_until:g}: images have "
            "their full size from the first step on. Set both, or neither"
        )
    if schedule.milestones != Schedule.milestones and schedule.name != "step":
        notes.append(f"schedule.milestones has no effect with schedule.name = {schedule.name}: set schedule.name=step")
    if schedule.end and schedule.name != "cosine":
        notes.append(f"schedule.end has no effect with schedule.name = {schedule.name}: set schedule.name=cosine")
    return notes


def without_effect(
    recipe: Recipe, source: Source, loader: Loader, method: Method, curator: Curator | None, steps: int
) -> list[str]:
    """Return a sentence for the user for every plug-in, column or part of the method that this run does not use.

    steps: number of steps of the run.
    """
    notes, sampler = _unused_settings(recipe), loader.sampler
    for option, what in method.later.items():
        if steps <= (start := getattr(method, option)) * loader.steps:
            notes.append(
                f"method.{option} = {start}: {what} only from epoch {start + 1} on, after the end of the run. Train "
                "for more epochs, or set it lower"
            )
    if recipe.shard and distributed.world() == 1:
        notes.append("shard has no effect on one process: start several (torchrun --nproc-per-node ...)")
    grouped = recipe.negatives is not None and recipe.negatives.name == "drop-similar" and not embeds(recipe, source)
    if source.groups is not None and not grouped and (recipe.sampler is None or recipe.sampler.name != "apart"):
        notes.append(
            f"group_column = {recipe.group_column}: this run does not use the groups; --sampler apart does, and "
            "--negatives drop-similar, unless negatives.by=features"
        )
    if loader.plan is not None and is_url(recipe.data):
        notes.append(
            "The images are remote and are read one after the other (read = sequential). --read random reads each by "
            "its index, and cache_on_device = true keeps a small data set in memory"
        )
    if sampler is not None and (sampler.neighbours or sampler.clusters) and steps <= loader.steps:
        notes.append(
            "The sampler has no effect: the first epoch has a random order, and the run has no other one. Train for "
            "more epochs"
        )
    if curator is not None and steps <= curator.starts * loader.steps:
        notes.append(
            f"Curation has no effect: it begins with epoch {curator.starts + 1}, after the end of the run. Train for "
            "more epochs"
        )
    return notes


def curator_of(
    recipe: Recipe, views: AnyViews, network: Network, snapshot: Network | None, piece: int, epochs: int,
    device: torch.device,
) -> Curator | None:  # fmt: skip
    """Return the curator of a recipe; it embeds `piece` images at a time.

    snapshot: a copy of a sharded network, divided like it. epochs: number of epochs of the run, also of one whose
    length is in steps.
    """
    if recipe.curate is None:
        return None
    if len(views) < 2:
        raise ConfigError(
            f"curation compares the views of a sample, but views {recipe.views.name} draw {len(views)}: choose others "
            "(--set views.name=simclr), or leave out --curate"
        )
    where = recipe.curate.options["where"]
    if where == "projection" and "projection" not in network.heads:
        raise ConfigError(f"{recipe.method.name} has no projection: set curate.where=features")

    def embed(model: Network, batch: Batch) -> Tensor:
        def rows(image: Tensor) -> Tensor:
            return model.features(image) if where == "features" else model.outputs(image)[where]

        model.scale = network.scale  # the snapshot compares images of the size that the step trains on
        with model.evaluating():
            parts = (views(part.to(device)).images for part in batch.split(piece))  # sequentially
            return torch.cat([torch.stack([rows(image) for image in images]) for images in parts], dim=1)

    curator = CURATORS[recipe.curate.name](**recipe.curate.options)
    curator.prepare(network, embed, epochs, snapshot, is_sharded(network))
    return curator.to(device)


def mixer_of(recipe: Recipe, method: Method, views: int, context: int) -> Mixer | None:
    """Return the mixing of a recipe; ConfigError if its method, views or context do not allow it."""
    if recipe.mix is None:
        return None
    mixer: Mixer = MIXERS[recipe.mix.name](**recipe.mix.options)
    name, flag = recipe.method.name, f"mix {recipe.mix.name}"
    if method.mixed_keys is None:
        fitting = ", ".join(key for key, cls in METHODS.items() if cls.mixed_keys and key != name)
        whose = " with these options" if type(method).mixed_keys else ""
        needs = f": set {method.mixed_if}, or choose another method" if method.mixed_if else ""
        raise ConfigError(f"{flag}: {name}{whose} has no soft targets{needs}; images can be mixed with {fitting}")
    if mixer.temperature is not None and not hasattr(method, "temperature"):
        raise ConfigError(f"mix.temperature = {mixer.temperature:g}: {name} has no temperature; leave it out")
    if method.mixed_keys != "none" and not all(compared_views(mixer, method, views).values()):
        raise ConfigError(
            f"{flag}: {name} compares a mixed view with another plain view of the sample, but views "
            f"{recipe.views.name} draws {views}: choose other views (--set views.name=simclr)"
        )
    ranks = distributed.world() if recipe.sync_norm else 1
    if mixer.parts > 1 and (context % (mixer.parts * ranks) or mixer.size(context) < 2 * ranks):
        raise ConfigError(
            f"{flag} divides a context into halves of at least 2 samples on every rank: choose a multiple of "
            f"{mixer.parts * ranks} from {2 * mixer.parts * ranks} on, not {context}"
        )
    return mixer
