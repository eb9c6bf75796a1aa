"""Does an embedding tell in which context group it was made? Then a loss can be solved without looking at images."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from inbatch.context.grouped import Grouped
from inbatch.models.network import frozen_statistics
from inbatch.rng import fold, permutation
from inbatch.runtime import distributed
from inbatch.training import grad_cache
from inbatch.training.build import RunComponents

SAMPLES = 1024
"""About so many samples are asked, in 4 to 16 groups."""
SURE = 4.0
"""Standard errors above chance from which on groups are said to be told apart."""


def group_leak(rows: Float[Tensor, "v k g d"]) -> dict[str, float]:
    """How often the group of a sample is told from one of its embeddings, in the view where that is easiest.

    rows: V views of G samples in each of K groups. A linear discriminant (shrunken covariance) and the 20 nearest
    neighbours (cosine) learn from one half of every group's samples and are asked about the other; the better counts.
    leak: share told rightly; leak_chance: 1 / K; leak_error: the standard error of chance. Below chance is no leak:
    batch normalisation centres a group, and then its two halves stand on opposite sides.
    """
    k, g = rows.shape[1:3]
    order = permutation(0, 0, g)
    known, asked = order[: g // 2], order[g // 2 :]
    learned, group = (np.arange(k).repeat(len(part)) for part in (known, asked))
    right = []
    for view in torch.nn.functional.normalize(rows.double(), dim=-1).cpu().numpy():
        bank, queries = (view[:, part].reshape(len(part) * k, -1) for part in (known, asked))
        for probe in (
            LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            KNeighborsClassifier(min(20, len(known)), metric="cosine", algorithm="brute"),
        ):
            with threadpool_limits(1):
                right.append(float((probe.fit(bank, learned).predict(queries) == group).mean()))
    chance = 1 / k
    return {"leak": max(right), "leak_chance": chance, "leak_error": (chance * (1 - chance) / len(group)) ** 0.5}


def meets(built: RunComponents) -> bool:
    """Whether samples of a group meet otherwise than in norm layers."""
    return built.network.fuse is not None or any(isinstance(m, Grouped) for m in built.encoder.modules())


@torch.no_grad()
def leak(built: RunComponents, epoch: int) -> dict[str, float]:
    """`group_leak` of the rows that the loss reads, of groups as in training; every rank takes part in it.

    Nothing is learned, and no statistics are kept. Empty where the data fill fewer than two groups of 4 samples.
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
    if not step.synced:  # every rank's part is a group of its own
        whole = whole.unflatten(2, (distributed.world(), -1)).flatten(1, 2)
    return group_leak(whole[:, :wanted])


def _rows(built: RunComponents, group: Sequence[Tensor], numbers: Sequence[int], epoch: int) -> Tensor:
    network = built.network
    with frozen_statistics(network), grad_cache.seeded_rng(fold(built.recipe.seed, epoch), group[0].device):
        return network.forward(group, numbers)[built.method.online[0]]


def sign(found: dict[str, float], shuffled: bool) -> str | None:
    """A sentence where the groups are told apart."""
    if found["leak"] < found["leak_chance"] + SURE * found["leak_error"]:
        return None
    does = "the groups are shuffled, which takes the use of it away" if shuffled else "see --shuffle-groups"
    return (
        f"one embedding tells its context group in {found['leak']:.0%} of cases (chance {found['leak_chance']:.0%}): "
        f"what a group has in common can stand in for the image; {does}."
    )
