"""Views of a recipe, and the images that they return."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.data.views import PRESETS, AnyViews, TransformedViews, View, Views, make_views, own_views
from inbatch.data.views.crop_pairs import arrange
from inbatch.runtime import own_parts
from inbatch.training.recipe import Recipe


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
