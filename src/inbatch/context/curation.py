"""Batch curation: embed the drawn views with the model, and draw again those that do not identify their sample."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.errors import ConfigError

Embed = Callable[[Any, Batch], Tensor]
"""(model, b samples) -> (V, b, D): embeddings of their views of draw `attempt`, each independent of other images."""
Gather = Callable[[Tensor, int], Tensor]
"""Join every rank's part of a tensor along a dimension."""

_HELD = 2**22
"""Maximum number of distances in memory at once, for batches of any size."""


def pair_distances(
    mine: Float[Tensor, "v b d"], everyone: Float[Tensor, "v n d"], first: int, distance: str = "cosine"
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Return each sample's largest distance between its own views, and its smallest distance to another sample's view.

    These are the row statistics of M_S and M_D (Welle et al. 2021, Algorithm 1).

    Args:
        mine: samples first, first + 1, ... of everyone.
        everyone: samples of the whole batch.
        first: position of the first sample.
        distance: "cosine", 1 - cos, or "euclidean", without normalisation.
    """
    views, b, _ = mine.shape
    if distance == "cosine":
        mine, everyone = (nn.functional.normalize(z, dim=-1) for z in (mine, everyone))
    others, each = everyone.flatten(0, 1), torch.arange(views, device=mine.device)
    own, nearest = mine.new_full((b,), -math.inf), mine.new_full((b,), math.inf)
    piece = max(1, _HELD // len(others))
    for v in range(views):
        for part in torch.arange(b, device=mine.device).split(piece):
            far = _distances(mine[v, part], others, distance)
            same = (first + part)[:, None] + each * everyone.shape[1]  # positions of the sample's own views
            apart = far.gather(1, same).masked_fill(each == v, -math.inf).amax(1)
            own[part] = own[part].maximum(apart)
            nearest[part] = nearest[part].minimum(far.scatter(1, same, math.inf).amin(1))
    return own, nearest


def _distances(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"], distance: str) -> Float[Tensor, "m n"]:
    if distance == "cosine":
        return 1 - a @ b.T
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def violating(
    own: Float[Tensor, "n"], nearest: Float[Tensor, "n"], rule: str = "pairwise", margin: float = 0.0
) -> Bool[Tensor, "n"]:
    """Return which samples of a batch violate the rule.

    "pairwise": a sample's own distance is not smaller, by the margin, than that to the nearest view of another sample.
    "strict": the largest own distance of the batch must be smaller than the smallest distance between two samples
        (Algorithm 1); a sample violates it if its own distance is at least the latter, or its distance to another
        sample is at most the former.
    """
    if rule == "pairwise":
        return own + margin >= nearest
    return (own + margin >= nearest.min()) | (nearest <= own.max() + margin)


class Curator(nn.Module):
    """Batch curation (Welle et al. 2021): views are drawn again until a sample's are nearer than any other sample's.

    rounds: maximum redraws of a sample; samples that still violate the rule are used unchanged.
    budget: maximum redraws per sample of a batch, on average; the largest violations come first. null is the setting of
        the paper: no limit but the rounds.
    rule: "pairwise" compares a pair with its own neighbours, "strict" with the whole batch, as in Algorithm 1.
    distance: "cosine" of normalised rows, or "euclidean" of rows without normalisation.
    where: rows of the encoder's "features" or of the method's "projection".
    model: a "snapshot" of the network from the end of the previous epoch (as in the paper), or the "live" network.
    margin: required difference between the two distances, in units of the distance.
    warmup: share of the run before the first curated batch.
    """

    def __init__(
        self, rounds: int = 3, budget: float | None = 0.5, rule: Literal["pairwise", "strict"] = "pairwise",
        distance: Literal["cosine", "euclidean"] = "cosine", where: Literal["features", "projection"] = "features",
        model: Literal["snapshot", "live"] = "snapshot", margin: float = 0.0, warmup: float = 0.1,
    ) -> None:  # fmt: skip
        if rounds < 1 or not 0 <= warmup < 1:
            raise ConfigError(
                f"curate.rounds = {rounds} must be at least 1, and curate.warmup = {warmup} at least 0 and below 1"
            )
        if budget is not None and budget <= 0:
            raise ConfigError(f"curate.budget = {budget} must be above 0, or null: no limit but the rounds")
        super().__init__()
        self.rounds, self.rule, self.distance, self.margin = rounds, rule, distance, margin
        self.budget = math.inf if budget is None else budget
        self.where, self.uses, self.warmup = where, model, warmup
        self.epoch: Tensor
        self.register_buffer("epoch", torch.tensor(-1))

    def prepare(
        self, live: nn.Module, embed: Embed, epochs: int, snapshot: nn.Module | None = None, together: bool = False
    ) -> None:
        """Set the model and the number of epochs; called once.

        Args:
            live: the online network.
            embed: the function that embeds views.
            epochs: number of epochs of the run.
            snapshot: a copy of the online network; by default it is made here.
            together: the model is divided over ranks, which must call it equally often.
        """
        self._live, self._embed = [live], embed  # in a list, so that the live model is not saved with this module
        self.starts, self.together = self.first_epoch(epochs), together
        if self.uses == "snapshot" and snapshot is None:
            snapshot = copy.deepcopy(live)
        self.snapshot = snapshot.requires_grad_(False) if snapshot is not None and self.uses == "snapshot" else None

    def first_epoch(self, epochs: int) -> int:
        """Return the first curated epoch of a run of so many epochs."""
        return max(1, math.ceil(self.warmup * epochs))

    def redraws(self) -> float:
        """Return the most redraws per sample of a batch."""
        return float(min(self.budget, self.rounds))

    @torch.no_grad()
    def forward(
        self, batch: Batch, gather: Gather = lambda x, dim: x, first: int = 0
    ) -> tuple[Batch, dict[str, float]]:
        """Return this rank's samples with their attempts, and statistics; `first` is their position in the whole batch.

        The statistics are curate_rounds; curate_violating_before and curate_violating, shares of the batch that violate
        the rule; and curate_redrawn, redraws per sample. Nothing is done during the warm-up.
        """
        if batch.epoch < self.starts:
            return batch, {}
        if batch.crops is not None and batch.images is None:
            raise ConfigError(
                "Views cannot be drawn again from crops that the workers have cut: keep the images "
                "on the device (cache_on_device=true)."
            )
        model = self._model(batch.epoch)
        first_draw = torch.zeros_like(batch.index) if batch.attempt is None else batch.attempt
        attempt = first_draw.clone()
        rows = self._embed(model, batch)
        bad, excess = self._find_violations(rows, gather, first)
        rounds, redrawn, before = 0, 0, int(bad.sum())
        while rounds < self.rounds and (count := int(min(int(bad.sum()), self.budget * len(bad) - redrawn))) > 0:
            rounds, redrawn = rounds + 1, redrawn + count
            worst = excess.masked_fill(~bad, -math.inf).argsort(descending=True, stable=True)[:count]
            chosen = torch.zeros_like(bad).index_fill(0, worst, True)
            again = chosen[first : first + len(batch)].nonzero()[:, 0]
            attempt[again] = first_draw[again] + rounds
            taken = again  # their number differs between ranks, the number of rounds does not
            if self.together:  # the first sample stands for those that other ranks have in addition
                most = int(chosen.view(-1, len(batch)).sum(1).max())
                taken = torch.cat([again, again.new_zeros(most - len(again))])
            if len(taken):
                embedded = self._embed(model, replace(batch, attempt=attempt).take(taken))
                rows[:, again] = embedded[:, : len(again)]
            bad, excess = self._find_violations(rows, gather, first)
        statistics = {"rounds": rounds, "redrawn": redrawn / len(bad), "violating_before": before / len(bad)}
        statistics["violating"] = int(bad.sum()) / len(bad)
        return replace(batch, attempt=attempt), {f"curate_{name}": float(value) for name, value in statistics.items()}

    def _model(self, epoch: int) -> nn.Module:
        if self.snapshot is None:
            return self._live[0]
        if int(self.epoch) != epoch:
            self.snapshot.load_state_dict(self._live[0].state_dict())
            self.epoch.fill_(epoch)
        return self.snapshot

    def _find_violations(
        self, rows: Float[Tensor, "v b d"], gather: Gather, first: int
    ) -> tuple[Bool[Tensor, "n"], Float[Tensor, "n"]]:
        """Return the violating samples of the whole batch and their excess distance: the same on every rank."""
        mine = pair_distances(rows, gather(rows, 1), first, self.distance)
        own, nearest = gather(mine[0], 0), gather(mine[1], 0)
        return violating(own, nearest, self.rule, self.margin), own - nearest


CURATORS: dict[str, type[Curator]] = {"redraw": Curator}
"""Name -> batch curation."""
