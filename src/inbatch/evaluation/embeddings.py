"""Embeddings of a data set."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import DataError


@dataclass(frozen=True)
class Embeddings:
    """One embedding per clean image that can be read.

    Attributes:
        vectors: (N, F) float32 on the CPU.
        labels: (N,) int64, -1 if unknown.
        identities: path or number of each image.
        name: the data set.
        feature: the layer of the vectors.
        index: (N,) int64, each image's number in the data set; 0, 1, ... by default.
        missing: a message for each image that cannot be read.
        split: the split of the images; empty if it is unknown.
        classes: names of the labels; empty if unknown.
        ids: integers of the classes in the data, if these are not 0, 1, 2, ...
    """

    vectors: Float[Tensor, "n f"]
    labels: Int[Tensor, "n"]
    identities: tuple[str, ...]
    name: str
    feature: str
    index: Int[Tensor, "n"] = None  # type: ignore[assignment] # set below
    missing: tuple[str, ...] = ()
    split: str = ""
    classes: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(len(self.vectors)))

    def __len__(self) -> int:
        return len(self.vectors)

    def labelled(self) -> "Embeddings":
        """Return only the images with a known label; DataError if there is none, or a feature is not finite."""
        known = self.labels >= 0
        if not known.any():
            raise DataError(f"{self.name} has no labels, and evaluation needs them: give labelled images.")
        # A sum is much faster to check; it may overflow although the features are finite.
        if not self.vectors.sum().isfinite() and not self.vectors.isfinite().all():
            raise DataError(f"the features of {self.name} hold NaN or infinity: the encoder has diverged.")
        return self if known.all() else self.take(known.nonzero()[:, 0])

    def take(self, places: Int[Tensor, "m"]) -> "Embeddings":
        """Return the images at these positions."""
        identities = tuple(self.identities[i] for i in places.tolist())
        return replace(
            self,
            vectors=self.vectors[places],
            labels=self.labels[places],
            identities=identities,
            index=self.index[places],
        )


def hits(scores: Float[Tensor, "n c"], labels: Int[Tensor, "n"]) -> dict[str, float]:
    """Return the share of samples with a label among the highest score (top1) and the five highest (top5).

    Equal scores rank by class, the smallest first.
    """
    ranking = scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
    right = ranking == labels[:, None].to(ranking.device)
    return {"top1": right[:, 0].double().mean().item(), "top5": right.any(1).double().mean().item()}


def class_count(train: Embeddings, test: Embeddings) -> int:
    """Return the number of class ids, 0 to the largest; DataError if there are fewer than two classes in training."""
    if len(train.labels.unique()) < 2:
        raise DataError(f"{train.name} has one class only: at least two are needed.")
    return int(torch.maximum(train.labels.max(), test.labels.max())) + 1
