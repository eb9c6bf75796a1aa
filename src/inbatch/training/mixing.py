"""Mixing in a training step: which views are mixed, their images, and the loss of their rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inbatch.batch import MIXED, Batch, Losses, Mixture, Rows
from inbatch.context.mixing import Draw, Mixer
from inbatch.methods.base import Method
from inbatch.models.network import NEVER_FUSED
from inbatch.rng import fold
from inbatch.runtime import distributed

MIXING = 0x6D6978
"""Part of the key of mixing, which no other random number of a step has."""


def mixed_views(mixer: Mixer | None, method: Method, views: Sequence[int]) -> list[int]:
    """Return the numbers of the online network's views: v for a plain view, ~v (that is -1 - v) for its mixture.

    Mixed images replace all views if their keys are from elsewhere (a target network, labels), else the first view.
    """
    if mixer is None:
        return list(views)
    if not mixer.replaces:
        return [*views, *(~v for v in (views[:1] if mixer.first_only else views))]
    if method.target or method.mixed_keys == "none":
        return [~v for v in views]
    return [~views[0], *views[1:]]


def learned_views(mixer: Mixer | None, method: Method, count: int) -> list[int]:
    """Return the numbers of the views, of `count` views of a sample, whose rows have a gradient."""
    views = list(method.online_views(count))
    keys_alone = mixer is not None and mixer.replaces and not method.keys_learn
    return [~v for v in mixed_views(mixer, method, views) if v < 0] if keys_alone else views


def compared_views(mixer: Mixer, method: Method, count: int) -> dict[int, list[int]]:
    """Return the views that are mixed, and for each the positions of its key views.

    They are positions among the rows of the target network, or among the plain rows of the online network if there is
    no target network.

    Args:
        mixer: The rule.
        method: The method.
        count: Number of views of a sample.
    """
    numbers = mixed_views(mixer, method, list(method.online_views(count)))
    key_views = list(method.target_views(count)) if method.target else [v for v in numbers if v >= 0]

    def compares(view: int, key_view: int) -> bool:
        if method.mixed_keys == "same":
            return key_view == view
        return method.mixed_keys == "other" and (mixer.every_key or key_view != view)

    return {~v: [j for j, of in enumerate(key_views) if compares(~v, of)] for v in numbers if v < 0}


def stand_ins(mixer: Mixer | None, views: Sequence[Tensor], numbers: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Return images and numbers for a forward pass that only measures: without mixing, and without fusion."""
    size = len(views[0]) if mixer is None else mixer.size(len(views[0]))
    images = [views[v] if v >= 0 else views[~v][:size] for v in numbers]
    return images, [NEVER_FUSED if v >= 0 else ~NEVER_FUSED for v in numbers]


@dataclass
class StepMixing:
    """The mixtures of one step; equal on all ranks.

    Attributes:
        mixer: The rule.
        method: The method.
        count: Number of views of a sample.
        key: Hash of seed and step.
        groups: Context groups of a rank.
        samples: Samples of this rank.
        synced: Context groups extend over all ranks.
        own: The loss gets the rows of this rank only.
    """

    mixer: Mixer
    method: Method
    count: int
    key: int
    groups: int
    samples: int
    synced: bool
    own: bool = False
    _draws: dict[int, Draw] = field(default_factory=dict)

    def places(self) -> Tensor:
        """Return the positions in the batch of the samples of each group of all ranks, (groups, G)."""
        world = distributed.world()
        every = torch.arange(world * self.samples)
        if not self.synced:
            return every.view(world * self.groups, -1)
        return every.view(world, self.groups, -1).transpose(0, 1).reshape(self.groups, -1)

    def images(self, view: int, group: int, x: Tensor) -> Tensor:
        """Return this rank's mixed images of its group from its plain images of the view."""
        if view not in self._draws:
            side = (x.shape[-2], x.shape[-1])
            self._draws[view] = self.mixer.draw(fold(self.key, view), self.places(), side)
        if self.synced:
            return distributed.local_shard(self._draws[view].images(group, distributed.gather(x)))
        return self._draws[view].images(distributed.rank() * self.groups + group, x)

    def mixture(self, view: int, like: Tensor) -> Mixture:
        """Return the contents of the mixed images of a view, in the order of their rows `like`."""
        draw, places = self._draws[view], self.places()
        if self.own:
            groups = slice(distributed.rank() * self.groups, (distributed.rank() + 1) * self.groups)
            places = places[groups] - distributed.rank() * self.samples
            draw = Draw(draw.partner[groups], draw.share[groups])

        def gathered(x: Tensor) -> Tensor:
            return (x.unflatten(1, (distributed.world(), -1)).transpose(0, 1) if self.synced else x).flatten()

        own = places[:, : draw.partner.shape[1]]
        positive = torch.stack([gathered(own), gathered(places.gather(1, draw.partner))])
        share = gathered(draw.share)
        weight = torch.stack([share, 1 - share]).to(like)
        return Mixture(positive.to(like.device), weight, self.mixer.candidates, self.mixer.temperature)

    def loss(self, rows: Rows, target: Rows, batch: Batch) -> Losses:
        """Return the losses of a step: of the mixed images, and of the plain ones unless those are replaced.

        Args:
            rows: Rows of the online network, of plain and of mixed images.
            target: Rows of the target network.
            batch: The whole batch.
        """
        method, mixed = self.method, []
        plain = {name: x for name, x in rows.items() if not name.startswith(MIXED)}
        keys = target if method.target else plain
        for i, (view, chosen) in enumerate(compared_views(self.mixer, method, self.count).items()):
            query = {name.removeprefix(MIXED): x[i] for name, x in rows.items() if name.startswith(MIXED)}
            mixture = self.mixture(view, next(iter(query.values())))
            mixed.append(method.mixed_loss(query, {name: x[chosen] for name, x in keys.items()}, mixture, batch))
        loss = torch.stack(mixed).mean()
        if self.mixer.replaces:
            return {"loss": loss}
        losses = method.loss(plain, target, batch)
        return losses | {"loss": losses["loss"] + self.mixer.weight * loss, "mixed": loss}
