"""Accuracy of class scores: overall, per class, and with a rule for equal scores."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def hit_shares(
    scores: Float[Tensor, "n c"], labels: Int[Tensor, "n"], top: int = 1, equal: float = 0.0
) -> Float[Tensor, "n"]:
    """Return the share of each sample that counts as a hit, float64 on the CPU: 1 if the label is among the best.

    Classes of equal score share the places that they reach together: one of two classes with the highest score is half
    a hit. This is the expected accuracy if ties are drawn by chance, for any order of the classes. A class with the
    score -inf (no vote) is never a hit, and a sample with a NaN score (a classifier that has diverged) neither.

    Args:
        scores: score of every class.
        labels: true class.
        top: number of places.
        equal: largest difference of scores that count as equal.
    """
    scores, labels = scores.cpu(), labels.cpu()
    own = scores.gather(1, labels[:, None])
    better = scores > own + equal
    tied = (scores >= own - equal) & ~better
    share = (top - better.sum(1)).double() / tied.sum(1)
    return share.clamp(0, 1).masked_fill((own[:, 0] == -torch.inf) | scores.isnan().any(1), 0)


def hits(
    scores: Float[Tensor, "n c"], labels: Int[Tensor, "n"], classes: Sequence[str] = (), equal: float = 0.0
) -> dict[str, Any]:
    """Return top1 and top5 in [0, 1] by the rule of `hit_shares`, and top1 per class.

    Args:
        scores: score of every class.
        labels: true class.
        classes: names of the classes; their numbers by default.
        equal: see `hit_shares`.

    Returns:
        "top1", "top5": share of the samples. "balanced": mean of top1 over the classes that occur in `labels`.
        "per_class": top1 of each of these classes by its name. "halves": see `halves`.
    """
    first, five = (hit_shares(scores, labels, top, equal) for top in (1, 5))
    labels = labels.cpu()
    counts = labels.bincount()
    rates = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, first) / counts
    present = counts.nonzero()[:, 0]
    return {
        "top1": first.mean().item(),
        "top5": five.mean().item(),
        "balanced": rates[present].mean().item(),
        "per_class": {class_name(i, classes): rates[i].item() for i in present.tolist()},
        "halves": halves(first),
    }


def halves(figures: Float[Tensor, "n"]) -> list[float | None]:
    """Return the means over the samples at even and at odd places; None for a half without samples.

    A choice by one half leaves the other for the figure of what was chosen.
    """
    return [part.mean().item() if len(part) else None for part in (figures[0::2], figures[1::2])]


def class_name(number: int, classes: Sequence[str]) -> str:
    """Return the name of a class, or its number if it has none."""
    return classes[number] if number < len(classes) else str(number)
