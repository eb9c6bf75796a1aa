"""Likely label errors: a cross-validated linear probe and the nearest neighbours, compared with the labels.

The number of suspects of each pair of classes is estimated by confident learning (Northcutt, Jiang and Chuang 2021).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.errors import DataError, check_whole, many
from inbatch.evaluation.embeddings import Embeddings, check_finite, check_one_label
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.neighbours import nearest, nearest_others
from inbatch.evaluation.probe_presets import Lbfgs
from inbatch.rng import permutation
from inbatch.runtime.isolation import usual_numerics

LARGEST = 50_000
"""Images, at most, to which the probe of a fold is fitted, and among which neighbours are searched."""
LEAST = 3
"""Images of a class, at least, for its labels to be checked."""
_TILE = 1 << 14
_TEMPERATURE = 0.1
_PROBE = Lbfgs(c=0.001)
"""Strongly regularised: with C = 1, a probe fits the errors among its training labels, too."""


@dataclass(frozen=True)
class LabelErrors:
    """Comparison of the labels of the m `checked` images with the other images.

    Attributes:
        checked: (m,) int64, positions of the images with a label of a class that has at least 3 images.
        suspects: (s,) int64, places in `checked`, the most likely error first.
        ranking: (m,) int64, all places in `checked`, the most likely error first.
        label: (m,) int64, labels.
        suggested: (m,) int64, the most probable other class.
        margin: (m,) float32: how much more probable the class of the label is than the suggested one, each less the
            mean probability that images with its label have for it. Small values are likely errors.
        probe: (m, 2) float32, out-of-fold probabilities of the label and of the suggested class.
        votes: (m, 2) float32, their shares among the nearest neighbours.
        neighbours: (m, k) int64, positions of the nearest checked images, nearest first.
        agreement: Share of the labels that are predicted by the other images.
        notes: Sentences about images left out and samples.
    """

    checked: Int[Tensor, "m"]
    suspects: Int[Tensor, "s"]
    ranking: Int[Tensor, "m"]
    label: Int[Tensor, "m"]
    suggested: Int[Tensor, "m"]
    margin: Float[Tensor, "m"]
    probe: Float[Tensor, "m 2"]
    votes: Float[Tensor, "m 2"]
    neighbours: Int[Tensor, "m k"]
    agreement: float
    notes: tuple[str, ...] = ()


@usual_numerics()
@torch.no_grad()
def check_labels(
    vectors: Float[Tensor, "n f"], labels: Int[Tensor, "n ..."], *, folds: int = 5, k: int = 30, seed: int = 0
) -> LabelErrors:
    """Return which labels are likely wrong, checked for each image by the labels of others only.

    The probability of a class is the mean of that of a linear probe on the other folds, and of its share among the k
    nearest other images. An image is suspected if probe and neighbours both prefer another class to its label, and if
    its margin is among the smallest of the number that confident learning estimates for the pair of classes.

    Args:
        vectors: Features, for example memory-mapped.
        labels: Classes; negative ones are unknown and left out.
        folds: Number of parts of the cross-validation.
        k: Number of neighbours.
        seed: Seed of the folds and of samples.

    Raises:
        ConfigError: If there are fewer than 2 folds or no neighbour.
        DataError: If features are not finite, if images have several labels, or if fewer than two classes have three
            images or more.
    """
    check_whole("folds", folds, least=2)
    check_whole("k", k, least=1)
    check_one_label(labels, "the features")
    check_finite(vectors)
    checked, notes = _comparable(labels)
    rows = vectors if len(checked) == len(vectors) else vectors[checked]
    present, label = labels[checked].unique(return_inverse=True)
    classes = len(present)
    predictions = cross_validate(rows, label, classes, folds=folds, k=k, seed=seed)
    if len(rows) > LARGEST:
        notes.append(
            f"{len(rows):,} images are checked by samples: probes on {LARGEST:,} and neighbours among {LARGEST:,}"
        )
    suggested, margin = _margins(predictions.chance, label)
    disagree = (predictions.by_probe != label) & (predictions.by_neighbours != label)
    suspected = confident_errors(predictions.chance, label) & disagree
    ranking = margin.argsort(stable=True)
    pair = torch.stack([label, suggested], 1)
    shares = torch.cat([predictions.votes(at, label, classes).gather(1, pair[at]) for at in _tiles(len(rows))])
    return LabelErrors(
        checked, ranking[suspected[ranking]], ranking, present[label], present[suggested], margin,
        2 * predictions.chance.gather(1, pair) - shares, shares, checked[predictions.place],
        (predictions.chance.argmax(1) == label).float().mean().item(), tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True)
class CrossValidated:
    """Predictions for each sample from the others.

    Attributes:
        chance: (m, c) float32, mean of the probabilities of the probe and the shares among the neighbours.
        by_probe: (m,) int64, most probable class of the probe.
        by_neighbours: (m,) int64, class with the largest share among the neighbours.
        similarity: (m, k) float32, similarities of the nearest other rows.
        place: (m, k) int64, their places.
    """

    chance: Float[Tensor, "m c"]
    by_probe: Int[Tensor, "m"]
    by_neighbours: Int[Tensor, "m"]
    similarity: Float[Tensor, "m k"]
    place: Int[Tensor, "m k"]

    def votes(self, at: Int[Tensor, "b"], label: Int[Tensor, "m"], classes: int) -> Float[Tensor, "b c"]:
        """Return the shares of the classes among the neighbours of some rows."""
        return _votes(self.similarity[at], label[self.place[at]], classes)


@usual_numerics()
@torch.no_grad()
def cross_validate(
    rows: Float[Tensor, "m f"], label: Int[Tensor, "m"], classes: int, *, folds: int = 5, k: int = 30, seed: int = 0
) -> CrossValidated:
    """Return the class probabilities of each row, by the labels of others only; labels are 0 to `classes` - 1."""
    chance = _out_of_fold(rows, label, classes, min(folds, len(rows)), seed)
    by_probe = chance.argmax(1)
    near, place = _neighbours(rows, min(k, len(rows) - 1), seed)
    by_neighbours = torch.empty_like(by_probe)
    for at in _tiles(len(rows)):
        votes = _votes(near[at], label[place[at]], classes)
        by_neighbours[at] = votes.argmax(1)
        chance[at] = chance[at].add_(votes).div_(2)
    return CrossValidated(chance, by_probe, by_neighbours, near, place)


def _tiles(count: int) -> tuple[Tensor, ...]:
    return torch.arange(count).split(_TILE)


def _comparable(labels: Int[Tensor, "n"]) -> tuple[Int[Tensor, "m"], list[str]]:
    """Return the positions of images whose label can be checked, and notes on the others."""
    known = labels >= 0
    counts = labels[known].bincount()
    enough = counts >= LEAST
    if int(enough.sum()) < 2:
        raise DataError(
            f"labels are checked in classes of at least {LEAST} images, and there are {int(enough.sum())} of these: at "
            "least two are needed"
        )
    notes = []
    if missing := int((~known).sum()):
        notes.append(f"{many(missing, 'image')} without a label left out")
    if few := int(counts[~enough].sum()):
        of = many(int((counts[~enough] > 0).sum()), "class").replace("classs", "classes")
        notes.append(f"{many(few, 'image')} of {of} with fewer than {LEAST} images left out: nothing to compare with")
    return (known & enough[labels.clamp(min=0)]).nonzero()[:, 0], notes


def _out_of_fold(rows: Tensor, labels: Tensor, classes: int, folds: int, seed: int) -> Float[Tensor, "m c"]:
    """Return the probabilities of linear probes, each fitted to the other folds; every class is spread over all."""
    order = permutation(seed, 23, len(labels))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    probabilities = torch.empty(len(labels), classes)
    for number in range(folds):
        rest = (fold != number).nonzero()[:, 0]
        if len(rest) > LARGEST:
            rest = rest[permutation(seed, 24 + number, len(rest))[:LARGEST].sort().values]
        train = Embeddings(rows[rest], labels[rest], ("",) * len(rest), "the other folds", "")
        probe = fit(train, classes, _PROBE)
        for at in (fold == number).nonzero()[:, 0].split(_TILE):
            probabilities[at] = probe.scores(rows[at]).softmax(1)
    return probabilities


def _neighbours(rows: Tensor, k: int, seed: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Return the nearest other rows, of a sample if there are many."""
    if len(rows) <= LARGEST:
        return nearest_others(rows, k)
    bank = permutation(seed, 22, len(rows))[:LARGEST].sort().values
    near, place = nearest(rows, rows[bank], k + 1)
    place = bank[place]
    near[place == torch.arange(len(rows))[:, None]] = -torch.inf  # an image is not a neighbour of itself
    near, order = near.sort(dim=1, descending=True, stable=True)
    return near[:, :k], place.gather(1, order[:, :k])


def _votes(similarity: Float[Tensor, "m k"], labels: Int[Tensor, "m k"], classes: int) -> Float[Tensor, "m c"]:
    """Return the shares of the classes among neighbours, weighted by exp(similarity / 0.1)."""
    weight = (similarity / _TEMPERATURE).softmax(1)
    return torch.zeros(len(similarity), classes).scatter_add_(1, labels, weight)


def _thresholds(chance: Float[Tensor, "m c"], label: Int[Tensor, "m"]) -> Float[Tensor, "c"]:
    """Return the mean probability of a class for the images with its label (Northcutt et al. 2021, Eq. 2)."""
    own = chance.gather(1, label[:, None])[:, 0]
    return torch.zeros(chance.shape[1]).index_add_(0, label, own) / label.bincount(minlength=chance.shape[1])


def _margins(chance: Tensor, label: Tensor) -> tuple[Int[Tensor, "m"], Float[Tensor, "m"]]:
    """Return the best other class and the margin of the label, both by probabilities less thresholds."""
    threshold = _thresholds(chance, label)
    suggested, margin = torch.empty_like(label), torch.empty(len(label))
    for at in _tiles(len(label)):
        excess = chance[at] - threshold
        own = excess.gather(1, label[at, None])[:, 0]
        best = excess.scatter_(1, label[at, None], -torch.inf).max(1)
        suggested[at], margin[at] = best.indices, own - best.values
    return suggested, margin


def confident_errors(chance: Float[Tensor, "m c"], label: Int[Tensor, "m"]) -> Bool[Tensor, "m"]:
    """Return the suspects of "prune by noise rate": of each pair of classes, the estimated number with least margin.

    An image counts as of a class if its probability reaches the threshold of the class; of several, of the most
    probable. The rows of this table are scaled to the sizes of the classes (Northcutt et al. 2021, Eq. 1 to 3).
    """
    classes, threshold = chance.shape[1], _thresholds(chance, label)
    joint = torch.zeros(classes * classes, dtype=torch.float64)
    for at in _tiles(len(label)):
        best = chance[at].masked_fill(chance[at] < threshold, -1).max(1)
        cell = (label[at] * classes + best.indices)[best.values >= 0]
        joint += cell.bincount(minlength=len(joint))
    table = joint.view(classes, classes)
    table.diagonal().clamp_(min=1)
    table *= (label.bincount(minlength=classes) / table.sum(1))[:, None]
    suspected = torch.zeros(len(label), dtype=torch.bool)
    for own, counts in enumerate(table.round().long()):
        rows = (label == own).nonzero()[:, 0]
        for other in counts.nonzero()[:, 0].tolist():
            if other != own:
                gain = chance[rows, other] - chance[rows, own]
                suspected[rows[gain.topk(min(int(counts[other]), len(rows))).indices]] = True
    return suspected
