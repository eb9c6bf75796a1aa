"""Mixing of a batch written out: images and targets one by one, for comparison with the step."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from inbatch.batch import MIXED, Batch, Mixture, Rows
from inbatch.context.mixing import MIXERS, Mixer
from inbatch.methods.base import Method
from inbatch.rng import fold
from inbatch.training.mixing import MIXING


def mixer_of(plugs: Collection[str]) -> Mixer | None:
    """Return the mixing among the plug-ins, with an option of its own where it has one."""
    name = next((name for name in MIXERS if name in plugs), None)
    options = {"imix": {"alpha": 0.5}, "unmix": {"weight": 0.5}, "mixco": {"weight": 2.0}}
    return None if name is None else MIXERS[name](**options.get(name, {}))


class MixedBatch:
    """The mixtures of one step of `small_methods.literal`."""

    def __init__(self, mixer: Mixer, method: Method, images: Sequence[Tensor], groups: int, step: int) -> None:
        self.mixer, self.method, self.groups = mixer, method, groups
        self.views, self.key = images, fold(3, step, MIXING)
        learned = list(method.online_views(len(images)))
        if not mixer.replaces:
            self.numbers = learned + [~v for v in (learned[:1] if mixer.first_only else learned)]
        elif method.target or method.mixed_keys == "none":
            self.numbers = [~v for v in learned]
        else:
            self.numbers = [~learned[0], *learned[1:]]

    def images(self) -> list[Tensor]:
        """Return the images of all numbers, in the order of the groups."""
        return [self.views[v] if v >= 0 else self._pairs(~v)[0] for v in self.numbers]

    def _pairs(self, view: int) -> tuple[Tensor, Mixture]:
        x = self.views[view]
        places = torch.arange(len(x)).view(self.groups, -1)
        draw = self.mixer.draw(fold(self.key, view), places, (x.shape[-2], x.shape[-1]))
        images, positive, weight = [], [], []
        for g, members in enumerate(places.tolist()):
            for m, partner in enumerate(draw.partner[g].tolist()):
                share = draw.share[g, m]
                image = share * x[members[m]] + (1 - share) * x[members[partner]]
                if draw.box is not None:
                    top, left, bottom, right = draw.box[g, m].tolist()
                    image = x[members[m]].clone()
                    image[:, top:bottom, left:right] = x[members[partner]][:, top:bottom, left:right]
                images.append(image)
                positive.append((members[m], members[partner]))
                weight.append((share, 1 - share))
        how = self.mixer.candidates, self.mixer.temperature
        return torch.stack(images), Mixture(torch.tensor(positive).T, torch.tensor(weight, dtype=x.dtype).T, *how)

    def loss(self, rows: Rows, target: Rows, batch: Batch) -> Tensor:
        """Return the loss of a step."""
        plain = {name: x for name, x in rows.items() if not name.startswith(MIXED)}
        keys, views = plain, [v for v in self.numbers if v >= 0]
        if self.method.target:
            keys, views = target, list(self.method.target_views(len(self.views)))
        losses = []
        for i, v in enumerate(~v for v in self.numbers if v < 0):
            other = [j for j, w in enumerate(views) if w != v or self.mixer.every_key]
            chosen = {"other": other, "same": [j for j, w in enumerate(views) if w == v], "none": []}
            query = {name.removeprefix(MIXED): x[i] for name, x in rows.items() if name.startswith(MIXED)}
            compared = {name: x[chosen[self.method.mixed_keys]] for name, x in keys.items()}
            losses.append(self.method.mixed_loss(query, compared, self._pairs(v)[1], batch))
        mixed = sum(losses) / len(losses)
        return (
            mixed if self.mixer.replaces else self.method.loss(plain, target, batch)["loss"] + self.mixer.weight * mixed
        )
