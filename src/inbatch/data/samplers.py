"""Samplers: which samples form a batch.

The order of an epoch is a pure function of (seed, epoch), the data and the features that `observe` received. It is the
same on every rank and after a resume.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from inbatch import rng
from inbatch.data.source import Source
from inbatch.errors import ConfigError, DataError, check_whole, many


class Sampler(nn.Module):
    """Compose the batches of every epoch.

    Attributes:
        neighbours: Number of nearest neighbours of each image that `observe` receives; 0: none.
        clusters: Number of clusters of the features, of which `observe` receives that of each image; 0: none.
        every: Epochs between two calls of `observe`.
        steps: Number of batches per epoch.
        repeats: Whether an epoch can have an image several times, each time with other views.
    """

    neighbours: int = 0
    clusters: int = 0
    every: int = 1
    steps: int = 0
    repeats: bool = False

    def prepare(self, source: Source, batch: int, seed: int) -> None:
        """Set the images, the samples of a batch and the seed of the run.

        Raises:
            DataError: If these images do not allow such batches.
        """
        self.images, self.batch, self.seed = len(source), batch, seed
        self.steps = len(source) // batch

    def order(self, epoch: int) -> Int[Tensor, "m"]:
        """Return the image numbers of all batches of an epoch in turn, steps times batch."""
        raise NotImplementedError

    def observes(self, epoch: int) -> bool:
        """Return whether `observe` is called before this epoch; the features of an untrained network are not used."""
        return bool(self.neighbours or self.clusters) and epoch > 0 and (epoch - 1) % self.every == 0

    def observe(self, numbers: Int[Tensor, "n ..."]) -> None:
        """Receive the neighbours (N, k), nearest first, or the cluster (N,) of every image, for the next epochs."""

    def notes(self) -> list[str]:
        """Return sentences for the user about these images."""
        return []

    def generator(self, *key: int) -> torch.Generator:
        """Return a generator for a key, which begins with the epoch."""
        return torch.Generator().manual_seed(rng.fold(self.seed, *key))


def earlier_occurrences(order: Int[Tensor, "m"]) -> Int[Tensor, "m"]:
    """Return how many times the image at each position of an order has occurred before."""
    places = order.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = order[places[1:]] != order[places[:-1]]
    starts = first.nonzero()[:, 0]
    counts = torch.empty_like(order)
    counts[places] = torch.arange(len(order)) - starts[first.cumsum(0) - 1]
    return counts


class Balanced(Sampler):
    """Take equally many samples of each class, or of each cluster of the features, for every batch.

    Rare classes are repeated within an epoch, but no sample within a batch. A class with fewer images than its share
    gives all of them, and the others fill the rest. Images without a label are one more class.

    by: "class", or "cluster": k-means of the features after an epoch; the first epoch has a random order.
    num_clusters: number of clusters. every: epochs between two clusterings.
    """

    group: Tensor
    repeats = True

    def __init__(self, by: Literal["class", "cluster"] = "class", num_clusters: int = 100, every: int = 1) -> None:
        super().__init__()
        check_whole("sampler.num_clusters", num_clusters, 2)
        check_whole("sampler.every", every, 1)
        if by == "class" and (num_clusters, every) != (100, 1):
            raise ConfigError(
                "sampler.num_clusters and sampler.every are of clusters, and sampler.by = class balances classes: "
                "leave them out, or set sampler.by=cluster"
            )
        self.by, self.num_clusters, self.every = by, num_clusters, every
        self.register_buffer("group", torch.zeros(0, dtype=torch.int32), persistent=by == "cluster")

    def prepare(self, source: Source, batch: int, seed: int) -> None:
        super().prepare(source, batch, seed)
        if self.by == "cluster":
            self.clusters = min(self.num_clusters, self.images)
            self.group = torch.zeros(self.images, dtype=torch.int32)
        elif bool((source.labels >= 0).any()):
            self.group = source.labels.cpu().unique(return_inverse=True)[1].int()
            if not self.group.any():
                raise DataError(
                    f"the sampler balances classes, but all images of {source.name} are of one class; leave out "
                    "--sampler, or set sampler.by=cluster to balance the clusters of the features"
                )
        else:
            raise DataError(
                f"the sampler balances classes, but {source.name} has no labels{source.why_unlabelled()}; set "
                "sampler.by=cluster to balance the clusters of the features"
            )

    def observe(self, numbers: Int[Tensor, "n"]) -> None:
        self.group = numbers.int()

    def order(self, epoch: int) -> Int[Tensor, "m"]:
        places, sizes = self.group.argsort(stable=True), self.group.bincount()
        members = [part.tolist() for part in places.split(sizes.tolist()) if len(part)]
        cycles = [_Cycle(images, partial(self.generator, epoch, 0, i)) for i, images in enumerate(members)]
        shares, batches = _shares([len(images) for images in members], self.batch), []
        for step in range(self.steps):
            drawn = [cycle.draw(count) for cycle, count in zip(cycles, shares(step), strict=True)]
            images = torch.tensor([image for part in drawn for image in part])
            turn = torch.tensor([place for part in drawn for place in range(len(part))])
            mixed = torch.randperm(len(images), generator=self.generator(epoch, 1, step))
            batches.append(images[mixed][turn[mixed].argsort(stable=True)])  # context groups are balanced, too
        return torch.cat(batches)


class _Cycle:
    """The images of a class: each is drawn once in random order, then all again; one draw repeats no image."""

    def __init__(self, images: list[int], generator: Callable[[int], torch.Generator]) -> None:
        self.images, self.generator = images, generator
        self.waiting: list[int] = []
        self.at = self.turn = 0

    def draw(self, count: int) -> list[int]:
        """Return this number of different images, at most as many as there are."""
        drawn = self.waiting[self.at : self.at + count]
        self.at += len(drawn)
        if len(drawn) < count:
            shuffled = torch.randperm(len(self.images), generator=self.generator(self.turn)).tolist()
            self.turn, last = self.turn + 1, set(drawn)
            cycle = [self.images[i] for i in shuffled]
            self.waiting = [image for image in cycle if image not in last] + [image for image in cycle if image in last]
            self.at = count - len(drawn)
            drawn = drawn + self.waiting[: self.at]
        return drawn


def _shares(sizes: list[int], batch: int) -> Callable[[int], list[int]]:
    """Return the function of the step that gives the samples of each class in its batch: as equal as possible."""
    # The largest number that every class, if it has so many images, can have: bisect counts the numbers that fit.
    least = bisect_left(range(1, batch + 1), True, key=lambda n: sum(min(size, n) for size in sizes) > batch)
    equal = [min(size, least) for size in sizes]
    larger, rest = [i for i, size in enumerate(sizes) if size > least], batch - sum(equal)

    def share(step: int) -> list[int]:
        counts = list(equal)
        for i in range(rest):  # what is left over goes to other classes in every batch
            counts[larger[(step * rest + i) % len(larger)]] += 1
        return counts

    return share


class Apart(Sampler):
    """Never put two images of one known group (frames of a video, crops of a slide) into the same batch.

    Groups with more images than the epoch has batches are sampled anew in every epoch. Images without a group are
    groups of their own. The groups are a column of the data (`group_column`).
    """

    def prepare(self, source: Source, batch: int, seed: int) -> None:
        super().prepare(source, batch, seed)
        if source.groups is None:
            raise DataError(f"the sampler keeps groups apart, but {source.name} has none: name their column "
                            "(--group-column)")  # fmt: skip
        group = source.groups.cpu()
        alone = group.max() + 1 + torch.arange(len(group))
        self.group = group.where(group >= 0, alone).unique(return_inverse=True)[1]
        sizes = self.group.bincount()
        # The largest number of full batches.
        least = bisect_left(range(1, self.steps + 1), True, key=lambda n: int(sizes.clamp(max=n).sum()) < n * batch)
        if not least:
            raise DataError(
                f"the {self.images:,} images of {source.name} are of {many(len(sizes), 'group')}, and a batch of "
                f"{batch:,} needs as many groups as samples: choose a batch size of at most {len(sizes):,}"
            )
        self.steps, self.unused = least, self.images - least * batch

    def order(self, epoch: int) -> Int[Tensor, "m"]:
        drawn = torch.randperm(self.images, generator=self.generator(epoch, 0))
        turn = torch.randperm(int(self.group.max()) + 1, generator=self.generator(epoch, 1))
        drawn = drawn[turn[self.group[drawn]].argsort(stable=True)]  # group by group
        sizes = self.group[drawn].unique_consecutive(return_counts=True)[1]
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        drawn = drawn[torch.arange(self.images) - first < self.steps][: self.steps * self.batch]
        # The next image of a group goes to the next batch.
        return drawn.view(self.batch, self.steps).T.flatten()

    def notes(self) -> list[str]:
        if self.unused < self.batch:
            return []
        return [
            f"An epoch has {self.steps:,} batches and leaves out {many(self.unused, 'image')}, other "
            "ones in every epoch: some groups have more images than there are batches. Smaller batches leave out fewer."
        ]


class Neighbours(Sampler):
    """Put images that are nearest neighbours by the features of the last epoch into the same batch.

    An image that is in no batch yet is drawn, and its nearest neighbours that are in none join it, until all images
    are in one; such sets are then put into random order. The first epoch has a random order.

    size: images of a set. candidates: nearest neighbours that may join. every: epochs between two searches.
    """

    near: Tensor

    def __init__(self, size: int = 8, candidates: int = 16,
                 every: int = 1) -> None:  # fmt: skip
        super().__init__()
        check_whole("sampler.size", size, 2)
        check_whole("sampler.candidates", candidates, 1)
        check_whole("sampler.every", every, 1)
        if size > candidates + 1:
            raise ConfigError(
                f"sampler.size = {size}: a set is an image and at most sampler.candidates = {candidates} neighbours of "
                f"it; choose at least {size - 1} candidates, or a size of at most {candidates + 1}"
            )
        self.size, self.candidates, self.every = size, candidates, every
        self.register_buffer("near", torch.zeros(0, dtype=torch.int32))

    def prepare(self, source: Source, batch: int, seed: int) -> None:
        super().prepare(source, batch, seed)
        self.neighbours = min(self.candidates, self.images - 1)
        self.near = torch.full((self.images, self.neighbours), -1, dtype=torch.int32)

    def observe(self, numbers: Int[Tensor, "n k"]) -> None:
        self.near = numbers.int()

    def order(self, epoch: int) -> Int[Tensor, "m"]:
        drawn = torch.randperm(self.images, generator=self.generator(epoch, 0))
        if int(self.near[0, 0]) >= 0:
            near, free, sets = self.near.tolist(), [True] * self.images, []
            for image in drawn.tolist():
                if free[image]:
                    free[image] = False
                    joined = [other for other in near[image] if free[other]][: self.size - 1]
                    for other in joined:
                        free[other] = False
                    sets.append([image, *joined])
            turns = torch.randperm(len(sets), generator=self.generator(epoch, 1)).tolist()
            drawn = torch.tensor([image for turn in turns for image in sets[turn]])
        return drawn[: self.steps * self.batch]


SAMPLERS: dict[str, type[Sampler]] = {"balanced": Balanced, "apart": Apart, "neighbours": Neighbours}
"""Samplers by name."""
