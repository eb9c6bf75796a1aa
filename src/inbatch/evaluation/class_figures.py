"""Figures of a classifier on labelled images, overall and per class, collected chunk by chunk."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import DataError, listed
from inbatch.evaluation.accuracy import class_name, hit_shares
from inbatch.evaluation.confidence import calibration_error


class ClassFigures:
    """Collects predictions and labels; memory grows by four numbers per image.

    Args:
        classes: names of the classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._chunks: list[tuple[Tensor, ...]] = []

    def add(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> None:
        """Add the predictions for some images; those with a negative label are left out."""
        known = labels >= 0
        logits, labels = logits[known].cpu(), labels[known].cpu()
        confidence, predicted = logits.softmax(1).max(1)
        self._chunks.append((labels, predicted, confidence, hit_shares(logits, labels, 5)))

    def figures(self, most: int = 20) -> dict[str, Any]:
        """Return the figures of all images, in JSON types.

        Args:
            most: largest number of confused pairs.

        Returns:
            "images". "top1", "top5": share of the images. "balanced": mean recall of the classes that occur.
            "calibration_error": see `confidence.calibration_error`. "per_class": for each class that occurs or is
            predicted, the number of "images" and of "predicted" ones, "recall" and "precision" (None without images or
            predictions). "confusions": the pairs with most images, as "class", "predicted", "images", and their "share"
            of the images of the class.

        Raises:
            DataError: if no image is labelled.
        """
        if not sum(len(labels) for labels, *_ in self._chunks):
            raise DataError(
                f"no image has a label of the classes of the classifier: pass labelled images of {listed(self.classes)}"
            )
        labels, predicted, confidence, five = (torch.cat(parts) for parts in zip(*self._chunks, strict=True))
        correct = labels == predicted
        count = max(len(self.classes), int(torch.maximum(labels, predicted).max()) + 1)
        images, chosen, right = (x.bincount(minlength=count) for x in (labels, predicted, labels[correct]))
        recall = right.double() / images
        return {
            "images": len(labels),
            "top1": correct.double().mean().item(),
            "top5": five.mean().item(),
            "balanced": recall[images > 0].mean().item(),
            "calibration_error": calibration_error(confidence, correct),
            "per_class": {
                class_name(i, self.classes): {
                    "images": int(images[i]),
                    "predicted": int(chosen[i]),
                    "recall": recall[i].item() if images[i] else None,
                    "precision": int(right[i]) / int(chosen[i]) if chosen[i] else None,
                }
                for i in (images + chosen).nonzero()[:, 0].tolist()
            },
            "confusions": self._confusions(labels[~correct], predicted[~correct], images, most),
        }

    def _confusions(
        self, labels: Int[Tensor, "m"], predicted: Int[Tensor, "m"], images: Int[Tensor, "c"], most: int
    ) -> list[dict[str, Any]]:
        """Return the pairs of classes that are confused most often, the most frequent first."""
        pairs, counts = (labels * len(images) + predicted).unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:most]
        return [
            {
                "class": class_name(pair // len(images), self.classes),
                "predicted": class_name(pair % len(images), self.classes),
                "images": number,
                "share": number / int(images[pair // len(images)]),
            }
            for pair, number in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        ]
