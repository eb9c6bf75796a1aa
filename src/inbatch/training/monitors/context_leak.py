"""Measure context leak: whether an embedding identifies its context group.

With such a leak, a loss can be minimised without using the content of the images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from inbatch.context.grouped import Grouped
from inbatch.models.network import frozen_statistics
from inbatch.rng import fold, permutation
from inbatch.runtime import distributed
from inbatch.training import grad_cache
from inbatch.training.build import RunComponents

SAMPLES = 1024
"""Approximate number of tested samples, in 4 to 16 groups."""
SURE = 4.0
"""Standard errors above chance from which groups are reported as distinguishable."""


def group_leak(rows: Float[Tensor, "v k g d"]) -> dict[str, float]:
    """Return how often a sample's group is identified from one of its embeddings, in the view with the highest share.

    A linear discriminant (shrunken covariance) and the 20 nearest neighbours (cosine) are fitted to one half of every
    group's samples and tested on the other; the better one counts. A share below chance is not a leak: batch
    normalisation centres a group, so that its two halves are on opposite sides.

    Args:
        rows: V views of G samples in each of K groups.

    Returns:
        leak: share of correct identifications. leak_chance: 1 / K. leak_error: standard error of chance.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # not needed by a run without context
    from sklearn.neighbors import KNeighborsClassifier

    k, g = rows.shape[1:3]
    order = permutation(0, 0, g)
    known, tested = order[: g // 2], order[g // 2 :]
    learned, group = (np.arange(k).repeat(len(part)) for part in (known, tested))
    right = []
    for view in torch.nn.functional.normalize(rows.double(), dim=-1).cpu().numpy():
        bank, queries = (view[:, part].reshape(len(part) * k, -1) for part in (known, tested))
        for probe in (
            LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            KNeighborsClassifier(min(20, len(known)), metric="cosine", algorithm="brute"),
        ):
            with threadpool_limits(1):
                right.append(float((probe.fit(bank, learned).predict(queries) == group).mean()))
    chance = 1 / k
    return {"leak": max(right), "leak_chance": chance, "leak_error": (chance * (1 - chance) / len(group)) ** 0.5}


def mixes_samples(built: RunComponents) -> bool:
    """Return whether samples of a group interact outside norm layers."""
    return built.network.fuse is not None or any(isinstance(m, Grouped) for m in built.encoder.modules())


@torch.no_grad()
def leak(built: RunComponents, epoch: int) -> dict[str, float]:
    """Return `group_leak` of the rows that the loss reads, with groups as in training; every rank must call it.

    No parameter and no statistic changes. The result is empty if the data fill fewer than two groups of 4 samples.
    """
    step = built.step
    at_once = step.groups * (1 if step.synced else distributed.world())
    wanted = min(16, max(4, SAMPLES // built.context), at_once * built.loader.steps)
    if wanted < 2 or built.context < 4:
        return {}
    parts: list[Tensor] = []
    online_views = list(built.method.online_views(len(built.views)))
    for batch in built.loader.epoch(epoch, stop=-(-wanted // at_once)):
        for group in batch.split(len(batch) // step.groups):
            if len(parts) * at_once // step.groups < wanted:  # a part is one group, or one of every rank
                images = step.views(group)
                parts.append(_rows(built, [images[v] for v in online_views], online_views, batch.epoch))
    whole = torch.stack(
        [distributed.gather(part.contiguous(), dim=1) for part in parts], dim=1
    )  # (V, groups here, W * g, D)
    if not step.synced:  # every rank's part is a separate group
        whole = whole.unflatten(2, (distributed.world(), -1)).flatten(1, 2)
    return group_leak(whole[:, :wanted])


def _rows(built: RunComponents, group: Sequence[Tensor], numbers: Sequence[int], epoch: int) -> Tensor:
    network = built.network
    with frozen_statistics(network), grad_cache.seeded_rng(fold(built.recipe.seed, epoch), group[0].device):
        return network.forward(group, numbers)[built.method.online[0]]


def sign(figures: dict[str, float], shuffled: bool) -> str | None:
    """Return a sentence if groups are distinguishable, else None."""
    if figures["leak"] < figures["leak_chance"] + SURE * figures["leak_error"]:
        return None
    does = "the groups are shuffled, so the loss cannot exploit it" if shuffled else "see --shuffle-groups"
    return (
        f"one embedding identifies its context group in {figures['leak']:.0%} of cases "
        f"(chance {figures['leak_chance']:.0%}): features of the group can replace those of the image; {does}."
    )
