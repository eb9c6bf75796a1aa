"""A requested comparison: its variants, images, seeds and time, and the settings of every variant."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons.variants import Variant, named
from inbatch.errors import ConfigError
from inbatch.runtime.remote import is_url
from inbatch.training.recipe import Recipe, Settings
from inbatch.training.requested_settings import check_one_length, with_default_budget
from inbatch.training.resolve import resolve_recipe
from inbatch.training.run_encoder import with_encoder_of_init

KEPT = 0.1
"""Share of a budget that is kept for planning and for the evaluation on all images, until both are measured."""
DEFAULT = 3600.0
"""Seconds of a run on a CPU if nothing determines its length, as of `inbatch pretrain`."""


@dataclass(frozen=True)
class Request:
    """A requested comparison.

    Attributes:
        variants: The variants.
        place: Location of the images, or the name of a data set.
        seeds: Seeds of every variant.
        common: Settings of all variants, which a variant may override.
        budget: Seconds for all runs together; None without a budget.
        download: Download a torchvision data set that is missing.
    """

    variants: tuple[Variant, ...]
    place: str
    seeds: tuple[int, ...]
    common: Settings = field(default_factory=dict)
    budget: float | None = None
    download: bool = False

    @property
    def name(self) -> str:
        """Name of the images in the names of files: the last part of their location."""
        first = (self.place if is_url(self.place) else self.place.split(os.pathsep)[0]).rstrip("/")
        return re.sub(r"[^\w.-]+", "-", Path(first).name or first).strip("-.") or "data"


def with_length(request: Request, device: Any, jobs: int) -> Request:
    """Return the request, on a CPU with a budget of an hour a run if no variant sets length or encoder.

    Raises:
        ConfigError: If some variants set a length and others do not.
    """
    if request.budget is not None:
        return request
    own = [{**request.common, **variant.settings} for variant in request.variants]
    lacking = [with_default_budget(one, request.place, device, configured=False) is not one for one in own]
    if any(lacking) and not all(lacking):
        name = request.variants[lacking.index(True)].name
        raise ConfigError(f"variant {name!r} sets no length and others do: add --epochs or --budget for all")
    rounds = -(-len(own) * len(request.seeds) // jobs)
    return replace(request, budget=DEFAULT * rounds / (1 - KEPT)) if all(lacking) else request


def resolved(request: Request) -> tuple[list[Settings], list[Recipe], Any]:
    """Return requested settings and recipe of every variant, and the images; errors name the variant.

    All variants get the number of neighbours of the first one's preset, so that their evaluation is the same.
    """
    settings, recipes, source = list[Settings](), list[Recipe](), None
    for variant in request.variants:
        own = {**request.common, **variant.settings}
        try:
            own = with_encoder_of_init(own)
            if request.budget is not None:
                check_one_length(own | {"budget": request.budget})
            recipe, opened = resolve_recipe(request.place, own, request.download)
            if recipes and "knn_k" not in own and recipe.knn_k != recipes[0].knn_k:
                own = own | {"knn_k": recipes[0].knn_k}
                recipe, _ = resolve_recipe(request.place, own, request.download)
        except ConfigError as error:  # an error of the images is not the variant's
            raise ConfigError(named(f"pretrain {variant.name}", error)) from None
        source = source or opened
        settings.append(own)
        recipes.append(recipe)
    return settings, recipes, source
