"""The plug-ins of a recipe, made to fit its method, views and tower; what cannot be is an error here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.config import Recipe
from inbatch.context.curate import CURATORS, Curator
from inbatch.context.fuse import FUSIONS, Fusion
from inbatch.encoders import Encoder
from inbatch.errors import ConfigError
from inbatch.methods.base import Method
from inbatch.tower import Tower
from inbatch.views import Views


def fusion(
    recipe: Recipe, method: Method, views: Views, encoder: Encoder, context: int
) -> tuple[Fusion | None, Sequence[int]]:
    """The batch fusion of a recipe and the numbers of the views it fuses."""
    if recipe.fuse is None:
        return None, ()
    learned, asked = set(method.online_views(len(views))), recipe.fuse.options["views"]
    if asked is not None and (not asked or not set(asked) <= set(range(len(views)))):
        raise ConfigError(f"fuse.views = {list(asked)}: the views are numbered 0 to {len(views) - 1}")
    if asked is not None and not learned & set(asked):
        raise ConfigError(
            f"fuse.views = {list(asked)}: {recipe.method.name} learns from view {', '.join(map(str, sorted(learned)))} "
            "only, and a fusion of others would never be trained"
        )
    fused = asked or ((1,) if 1 in learned else (max(learned),))
    sizes = {views.views[v].size for v in fused}
    if len(sizes) > 1:
        raise ConfigError(f"fuse.views = {list(fused)} are of {sorted(sizes)} pixels: fuse views of one size")
    given: dict[str, Any] = {"group": context, "size": sizes.pop(), "mean": encoder.mean, "std": encoder.std}
    make_fusion: Any = FUSIONS[recipe.fuse.name]
    return make_fusion(**given, **recipe.fuse.options), fused


def curator_of(recipe: Recipe, views: Views, tower: Tower, piece: int, device: torch.device) -> Curator | None:
    """The curator of a recipe; it embeds `piece` images at a time."""
    if recipe.curate is None:
        return None
    if len(views) < 2:
        raise ConfigError(f"curation compares the views of a sample, but {recipe.method.name} draws {len(views)}")
    where = recipe.curate.options["where"]
    if where == "projection" and "projection" not in tower.heads:
        raise ConfigError(f"{recipe.method.name} has no projection: curate.where is features")

    def embed(model: Tower, batch: Batch) -> Tensor:
        def rows(image: Tensor) -> Tensor:
            return model.features(image) if where == "features" else model.outputs(image)[where]

        with model.evaluating():
            parts = (views(part.to(device)).images for part in batch.split(piece))  # one after the other
            return torch.cat([torch.stack([rows(image) for image in images]) for images in parts], dim=1)

    curator = CURATORS[recipe.curate.name](**recipe.curate.options)
    curator.prepare(tower, embed, recipe.epochs)
    return curator.to(device)
