"""Check that a device, the images and the number of processes allow a recipe."""

import torch
from torch import nn

from inbatch.data import Source
from inbatch.errors import ConfigError, DataError
from inbatch.methods.base import Method, call_hook
from inbatch.models.network import norms
from inbatch.nn import triton_logsumexp
from inbatch.runtime import distributed
from inbatch.runtime.device import precision_for
from inbatch.runtime.process_group import assert_equal_across_ranks
from inbatch.training.negatives import check_negatives
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe


def check_recipe(recipe: Recipe, source: Source, device: torch.device, context: int) -> None:
    """Raise ConfigError or DataError for a recipe that this device or these images do not allow."""
    if recipe.loss_precision == "tf32x3" and device.type != "cuda":
        raise ConfigError("loss_precision = tf32x3 is a GPU's: here take float32, or bf16")
    if distributed.world() > 1:  # ranks that reduce results must compute them in the same way
        kernels = triton_logsumexp.usable(torch.zeros(1, 1, device=device))
        facts = {"use of Triton's kernels": kernels, "precision": precision_for(recipe.precision, device)}
        assert_equal_across_ranks(facts)
    check_reading(recipe)
    check_labels(recipe, source)
    check_negatives(recipe, source)
    if recipe.shuffle_groups and recipe.batch_size == context:
        raise ConfigError(
            f"shuffle_groups: the batch of {context} is one group, there is nothing to shuffle; set context"
        )


def check_reading(recipe: Recipe) -> None:
    """Raise ConfigError if the recipe needs images by their index, or in memory, and reads them one after the other."""
    if recipe.read != "sequential":
        return
    if recipe.sampler is not None:
        raise ConfigError(
            f"read = sequential and sampler = {recipe.sampler.name} exclude each other: a sampler draws images by "
            "their index; leave out the sampler, or use --read random"
        )
    if recipe.cache_on_device:
        raise ConfigError(
            "read = sequential and cache_on_device = true exclude each other: images that are kept in memory are read "
            "once; leave out one of the two"
        )


def check_recompute(recipe: Recipe, encoder: nn.Module) -> None:
    """Raise ConfigError if activations of some views would be computed again with other statistics than before."""
    altered = [name for name, part in (("fuse", recipe.fuse), ("mix", recipe.mix)) if part is not None]
    if altered and norms(encoder):
        raise ConfigError(
            f"checkpoint_activations and {altered[0]} exclude each other for an encoder with batch normalisation, "
            "whose running statistics leave out altered images: choose a ViT, or leave one of the two out"
        )


def check_labels(recipe: Recipe, source: Source) -> None:
    """Raise DataError if the method learns from labels and the images have none."""
    if method_named(recipe.method.name).labels and not bool((source.labels >= 0).any()):
        raise DataError(
            f"{recipe.method.name} learns from labels, but {source.name} has none{source.why_unlabelled()}: "
            "use class sub-folders, or name the column of labels (--label-column)"
        )


def check_views(recipe: Recipe, method: Method, views: int) -> None:
    """Raise ConfigError if the method does not take this number of views."""
    least, most = method.views
    if views < least or (most is not None and views > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{recipe.method.name} learns from {wanted} views, but views {recipe.views.name} draws {views}: "
            "choose other views (--set views.name=...)"
            + (" or views.num_views" if "num_views" in recipe.views.options else "")
        )


def check_momentum(method: Method) -> None:
    """Raise ValueError if the target network of a method would not be a mean of past weights."""
    for progress in (0.0, 1.0) if method.target and not method.teacher else ():
        momentum = call_hook(method, "target_momentum", progress)
        if not isinstance(momentum, int | float):
            raise ValueError(f"target_momentum({progress}) returns {momentum!r}: return a number from 0 to 1")
        if not 0 <= momentum <= 1:
            raise ValueError(f"the momentum of the target network is {momentum:g}: choose a number from 0 to 1")


def context_and_groups(recipe: Recipe, world: int) -> tuple[int, int]:
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
    if context // (ranks := world if recipe.sync_norm else 1) < 2:
        raise ConfigError(
            f"a context of {context} leaves one sample for a rank, which has no statistics: choose at least {2 * ranks}"
        )
    return context, share // context


def local_batch_size(recipe: Recipe, world: int) -> int:
    """Return the number of samples to split into context groups: the local batch, with sync_norm the global batch."""
    if recipe.batch_size % world:
        raise ConfigError(
            f"a batch of {recipe.batch_size} cannot be shared by {world} processes: use a multiple of {world}"
        )
    return recipe.batch_size if recipe.sync_norm else recipe.batch_size // world
