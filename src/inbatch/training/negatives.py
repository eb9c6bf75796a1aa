"""The plug-in `negatives` of a run: whether it fits the method and the data, and its parts."""

import torch
from torch import Tensor

from inbatch.batch import Batch
from inbatch.context.negatives import NEGATIVES, THRESHOLD, DropSimilar
from inbatch.data import Source
from inbatch.data.views import Views, make_views
from inbatch.errors import ConfigError, DataError
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.models import Encoder
from inbatch.models.network import Network
from inbatch.nn.negatives import Negatives
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe


def check_negatives(recipe: Recipe, source: Source) -> None:
    """Raise ConfigError if the plug-in does not fit the method, DataError if the data lack the groups it uses."""
    if recipe.negatives is None:
        return
    name = recipe.negatives.name
    if name not in method_named(recipe.method.name).negatives:
        fitting = ", ".join(key for key, method in METHODS.items() if name in method.negatives)
        raise ConfigError(f"negatives {name} does not fit {recipe.method.name}: it fits {fitting}")
    if recipe.negatives.options.get("by") == "group" and source.groups is None:
        raise DataError(
            f"negatives.by = group: {source.name} has no groups; name their column (--group-column), or use the "
            "features (negatives.by = features)"
        )
    if name == "drop-similar" and not embeds(recipe, source):
        _check_groups(recipe, source)


def _check_groups(recipe: Recipe, source: Source) -> None:
    """Raise an error if an option is of features while known groups are used, or if these leave no negative."""
    assert recipe.negatives is not None and source.groups is not None
    if bool((source.groups == source.groups[0]).all()) and int(source.groups[0]) >= 0:
        raise DataError(
            f"all {len(source):,} images of {source.name} are of one group of {recipe.group_column}, so that none is a "
            "negative of another: name another column, or leave out negatives drop-similar"
        )
    if (threshold := recipe.negatives.options.get("threshold", THRESHOLD)) != THRESHOLD:
        raise ConfigError(
            f"negatives.threshold = {threshold:g} is a cosine of features, and near duplicates are those of the groups "
            f"of {recipe.group_column}: leave it out, or set negatives.by=features"
        )


def embeds(recipe: Recipe, source: Source) -> bool:
    """Return whether the plug-in uses the features of whole images."""
    by = recipe.negatives.options.get("by") if recipe.negatives is not None else None
    return by == "features" or (by == "auto" and source.groups is None)


def plug_in_negatives(
    recipe: Recipe, source: Source, method: Method, network: Network, encoder: Encoder, piece: int, device: torch.device
) -> DropSimilar | None:
    """Set how the method weights negatives; return what finds near duplicates, if the run leaves these out.

    Args:
        recipe: The recipe.
        source: Images to train on.
        method: The method.
        network: The online network.
        encoder: Its encoder.
        piece: Number of images that are embedded at a time.
        device: Device of the network.
    """
    if recipe.negatives is None:
        return None
    chosen = NEGATIVES[recipe.negatives.name](**recipe.negatives.options)
    method.weighting = Negatives(tau_plus=chosen.tau_plus, beta=chosen.beta)
    if not isinstance(chosen, DropSimilar):
        return None
    clean = Views(make_views("plain", {"size": recipe.image_size}, recipe.channels), encoder.mean, encoder.std)

    def embed(batch: Batch) -> Tensor:
        with network.evaluating():
            return torch.cat([network.features(clean(part.to(device)).images[0]) for part in batch.split(piece)])

    by_features, bank = embeds(recipe, source), method.negative_bank()
    if bank is not None:
        bank.keep_tags(encoder.width if by_features else None)
    chosen.prepare(embed if by_features else None, bank)
    return chosen
