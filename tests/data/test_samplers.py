"""Samplers: batches with equal classes, without two images of a group, or of nearest neighbours."""

from collections import Counter
from typing import Any

import pytest
import torch
from test_loader import VIEWS, photos, same  # noqa: F401 - a fixture

from inbatch.data import Loader, open_data
from inbatch.data.samplers import SAMPLERS, Apart, Balanced, Neighbours, Sampler, earlier_occurrences
from inbatch.data.views import View, Views
from inbatch.data.workers import SampleReader
from inbatch.errors import DataError


class Source:
    name = "it"

    def __init__(self, labels: list[int], groups: list[int] | None = None) -> None:
        self.labels, self.groups = torch.tensor(labels), None if groups is None else torch.tensor(groups)

    def __len__(self) -> int:
        return len(self.labels)

    def why_unlabelled(self) -> str:
        return ""


def prepared(sampler: Sampler, source: Any, batch: int) -> Sampler:
    sampler.prepare(source, batch, seed=3)
    return sampler


def batches(sampler: Sampler, epoch: int = 0) -> list[list[int]]:
    """Return the batches of an epoch, after what holds for every sampler has been checked."""
    order = sampler.order(epoch)
    assert len(order) == sampler.steps * sampler.batch and torch.equal(order, sampler.order(epoch))
    assert not torch.equal(order, sampler.order(epoch + 1))
    drawn = order.view(sampler.steps, sampler.batch).tolist()
    assert all(len(set(batch)) == len(batch) for batch in drawn), "a sample occurs twice in a batch"
    return drawn


def test_classes_are_balanced_in_batches_and_context_groups() -> None:
    labels = [0] * 60 + [1] * 25 + [2] * 3 + [-1] * 9
    sampler = prepared(Balanced(), Source(labels), 16)
    assert sampler.steps == 97 // 16
    counts, larger = torch.zeros(97, dtype=torch.long), Counter[int]()
    for batch in batches(sampler):
        counts[batch] += 1
        parts = Counter(labels[i] for i in batch)
        larger.update(c for c in (0, 1, -1) if parts[c] == 5)
        assert parts[2] == 3 and sorted(parts[c] for c in (0, 1, -1)) == [4, 4, 5]
        for half in (batch[:8], batch[8:]):
            assert all(abs(Counter(labels[i] for i in half)[c] - parts[c] / 2) <= 1.5 for c in parts)
    assert larger == {0: 2, 1: 2, -1: 2}, "what is left over goes to every class in turn"
    for label in set(labels):  # each image of a class as often as another, give or take one
        mine = counts[torch.tensor(labels) == label]
        assert int(mine.max() - mine.min()) <= 1


def test_what_replaces_unreadable_images_occurs_once_in_a_batch() -> None:
    """Balanced batches repeat images of small classes, so that the next batch can have those of this one."""
    source = Source([0] * 3 + [1] * 60)
    sampler = prepared(Balanced(), source, 8)
    for bad in ({40}, {1, 7, 30, 41}):

        def make(i: int, bad: set[int] = bad) -> int:
            if i in bad:
                raise DataError("it cannot be read")
            return i

        for epoch in range(20):
            order = sampler.order(epoch)
            reader = SampleReader(source, 3, 8, order)  # type: ignore[arg-type]
            used = torch.tensor([reader.read(epoch, at, make)[0] for at in range(len(order))]).view(-1, 8).tolist()
            assert all(len(set(batch)) == 8 and not bad & set(batch) for batch in used)


def test_more_classes_than_samples_and_classes_of_one_image() -> None:
    labels = list(range(12)) * 3 + [12]
    drawn = batches(prepared(Balanced(), Source(labels), 6))
    assert all(len({labels[i] for i in batch}) == 6 for batch in drawn)
    with pytest.raises(DataError, match=r"all images of .* are of one class; leave out --sampler"):
        prepared(Balanced(), Source([0] * 20), 20)
    with pytest.raises(DataError, match=r"has no labels; set sampler\.by=cluster"):
        prepared(Balanced(), Source([-1] * 20), 4)


def test_clusters_are_balanced_after_the_first_epoch() -> None:
    sampler = prepared(Balanced(by="cluster", num_clusters=100, every=2), Source([-1] * 40), 8)
    assert sampler.clusters == 40 and [sampler.observes(e) for e in range(5)] == [False, True, False, True, False]
    assert sorted(i for batch in batches(sampler) for i in batch) == list(range(40))
    clusters = torch.tensor([0] * 30 + [1] * 10)
    sampler.observe(clusters)
    again = prepared(Balanced(by="cluster", num_clusters=100, every=2), Source([-1] * 40), 8)
    again.load_state_dict(sampler.state_dict())
    assert batches(again, 1) == batches(sampler, 1)
    assert all(sum(int(clusters[i]) for i in batch) == 4 for batch in batches(sampler, 1))


def test_groups_are_apart() -> None:
    groups = [0] * 9 + [1] * 4 + [2] * 2 + [-1] * 25
    sampler = prepared(Apart(), Source([-1] * 40, groups), 8)
    assert isinstance(sampler, Apart) and sampler.steps == 4 and sampler.unused == 8
    used: Counter[int] = Counter()
    for epoch in range(6):
        for batch in batches(sampler, epoch):
            used.update(batch)
            known = [groups[i] for i in batch if groups[i] >= 0]
            assert len(set(known)) == len(known)
    assert len(used) == 40 and "leaves out 8 images, other ones in every epoch" in sampler.notes()[0]
    every = prepared(Apart(), Source([-1] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]), 4)
    assert sorted(i for batch in batches(every) for i in batch) == list(range(12)) and every.notes() == []
    with pytest.raises(DataError, match="are of 2 groups, and a batch of 3 needs as many"):
        prepared(Apart(), Source([-1] * 6, [0, 0, 0, 1, 1, 1]), 3)
    with pytest.raises(DataError, match="--group-column"):
        prepared(Apart(), Source([-1] * 6), 3)


def test_neighbours_are_together() -> None:
    sampler = prepared(Neighbours(size=4, candidates=6), Source([-1] * 48), 12)
    assert isinstance(sampler, Neighbours) and sampler.neighbours == 6
    batches(sampler)
    family = torch.arange(48) // 4  # images 4 i to 4 i + 3 are neighbours of each other
    others = torch.stack([torch.arange(4) + 4 * family[i] for i in range(48)])
    near = torch.stack([torch.cat([row[row != i], torch.tensor([(i + 7) % 48, (i + 9) % 48, (i + 11) % 48])])
                        for i, row in enumerate(others)])  # fmt: skip
    sampler.observe(near)
    for batch in batches(sampler, 1):
        assert set(Counter(family[batch].tolist()).values()) == {4}
    again = prepared(Neighbours(size=4, candidates=6), Source([-1] * 48), 12)
    again.load_state_dict(sampler.state_dict())
    assert batches(again, 1) == batches(sampler, 1)


def test_resident_streamed_ranks_and_resumed_batches_are_those_of_the_sampler(photos: Any) -> None:  # noqa: F811
    def loader(rank: int = 0, world: int = 1, **options: Any) -> Loader:
        data = open_data(str(photos))
        data.groups = torch.arange(len(data)) // 3
        return Loader(data, batch=8, views=VIEWS, seed=3, sampler=SAMPLERS["apart"](), rank=rank, world=world,
                      canvas=128, **options)  # fmt: skip

    held, streamed = loader(resident=True), loader(resident=False, workers=2)
    for epoch in (0, 1):
        expected = held.sampler and held.sampler.order(epoch).view(-1, 8)
        assert expected is not None
        for candidate in (held, streamed):
            assert torch.equal(torch.stack([batch.index for batch in candidate.epoch(epoch)]), expected)
    for whole, late in zip([*streamed.epoch(1)][2:], streamed.epoch(1, start=2), strict=True):
        same(whole, late)
    parts = [loader(rank, 2, resident=False, workers=0) for rank in range(2)]
    for whole, *shares in zip(held.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
    streamed.close()


def test_each_occurrence_of_a_repeated_image_has_other_views(photos: Any) -> None:  # noqa: F811
    """Resident, streamed as crops and as whole images: the same draws, of which none is repeated."""
    order = torch.tensor([5, 2, 5, 0, 2, 5])
    assert earlier_occurrences(order).tolist() == [0, 0, 1, 0, 1, 2]
    views = Views([View(size=8)], (0.5,) * 3, (0.2,) * 3)

    def boxes(**options: Any) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        data = open_data(str(photos))
        data.labels, data.classes = (torch.arange(len(data)) > 1).long(), ("rare", "other")
        loader = Loader(data, batch=8, views=views, seed=3, sampler=Balanced(), canvas=128, **options)
        seen: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for batch in loader.epoch(1):
            drawn = views(batch).boxes[0].tolist()
            for i, box in zip(batch.index.tolist(), drawn, strict=True):
                seen.setdefault((i, int(data.labels[i])), []).append(tuple(box))
        loader.close()
        return seen

    held = boxes(resident=True)
    rare = [drawn for (_, label), drawn in held.items() if not label]
    assert len(rare) == 2 and all(len(set(drawn)) == len(drawn) > 1 for drawn in rare)
    assert boxes(resident=False, workers=0) == boxes(resident=False, workers=2, whole=True) == held
