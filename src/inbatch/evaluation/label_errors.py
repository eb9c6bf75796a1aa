"""Likely label errors from features: a cross-validated linear probe and the nearest neighbours against the labels.

A sample is suspected by the rule of confident learning (Northcutt, Jiang and Chuang 2021, section 3.1).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.errors import ConfigError, DataError, check_whole, many
from inbatch.evaluation.embeddings import Embeddings, check_one_label
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.neighbours import nearest, nearest_others
from inbatch.evaluation.probe_presets import Lbfgs
from inbatch.rng import permutation
from inbatch.runtime.isolation import usual_numerics

FITTED = 50_000
"""Images, at most, to which the probe of a fold is fitted."""
BANK = 50_000
"""Images, at most, among which neighbours are searched."""
_TILE = 1 << 14
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class LabelErrors:
    """Judgement of every image that could be judged.

    Attributes:
        rows: (m,) int64, positions of the suspects, the most likely error first.
        judged: (n,) bool: rows with a label of a class that has enough images.
        suggested: (n,) int64, most probable class; -1 if not judged.
        scores: (n,) float32 in [0, 1]: probability of the given label less the largest other one, scaled; small values
            are likely errors. 1 if not judged.
        probe: (n, c) float32, out-of-fold probabilities of the probe.
        votes: (n, c) float32, shares of the nearest neighbours.
        neighbours: (n, k) int64, positions of the nearest judged images; -1 if not judged.
        notes: Sentences about images that are left out, and about sub-samples.
    """

    rows: Int[Tensor, "m"]
    judged: Bool[Tensor, "n"]
    suggested: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    probe: Float[Tensor, "n c"]
    votes: Float[Tensor, "n c"]
    neighbours: Int[Tensor, "n k"]
    notes: tuple[str, ...] = field(default=())


def folds_of(labels: Int[Tensor, "n"], folds: int, seed: int) -> Int[Tensor, "n"]:
    """Return the fold of each sample, 0 to `folds` - 1: every class is spread evenly, drawn by the seed."""
    order = permutation(seed, 23, len(labels))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def out_of_fold(
    vectors: Float[Tensor, "n f"], labels: Int[Tensor, "n"], classes: int, folds: int, seed: int, c: float = 1.0
) -> Float[Tensor, "n c"]:
    """Return the probabilities of linear probes, each fitted to the samples of the other folds."""
    fold = folds_of(labels, folds, seed)
    probabilities = torch.empty(len(labels), classes)
    for number in range(folds):
        rest = (fold != number).nonzero()[:, 0]
        if len(rest) > FITTED:
            rest = rest[permutation(seed, 24 + number, len(rest))[:FITTED].sort().values]
        train = Embeddings(vectors[rest], labels[rest], ("",) * len(rest), "the other folds", "")
        probe = fit(train, classes, Lbfgs(c=c))
        for at in (fold == number).nonzero()[:, 0].split(_TILE):
            probabilities[at] = probe.scores(vectors[at]).softmax(1)
    return probabilities


def neighbour_votes(
    similarity: Float[Tensor, "n k"], neighbour_labels: Int[Tensor, "n k"], classes: int
) -> Float[Tensor, "n c"]:
    """Return the shares of the classes among the neighbours, weighted by exp(similarity / 0.1)."""
    weight = (similarity / _TEMPERATURE).softmax(1)
    return torch.zeros(len(similarity), classes).scatter_add_(1, neighbour_labels, weight)


def confident_suspects(probabilities: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> Bool[Tensor, "n"]:
    """Return the samples that confidently belong to another class than their label.

    A sample belongs confidently to a class if its probability reaches the mean of the probabilities that the samples
    with this label have for it (Northcutt et al. 2021, Eq. 1 and 2); of several, to the most probable one.
    """
    classes = probabilities.shape[1]
    counts = labels.bincount(minlength=classes)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    threshold = torch.zeros(classes).index_add_(0, labels, own) / counts.clamp(min=1)
    threshold[counts == 0] = torch.inf
    confident = torch.where(probabilities >= threshold, probabilities, -1.0)
    best = confident.max(1)
    return (best.values >= 0) & (best.indices != labels)
