"""Embeddings of a data set."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import DIVERGED, ConfigError, DataError, listed, type_name


@dataclass(frozen=True)
class Embeddings:
    """One embedding per clean image that can be read.

    Attributes:
        vectors: (N, F) float32 on the CPU.
        labels: (N,) int64, -1 if unknown; several per image, (N, L), can be neither evaluated nor written to a file.
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
    labels: Int[Tensor, "n ..."]
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
        """Return only the images with a known label.

        Raises:
            DataError: if there is none, if images have several labels each, or if a feature is not finite.
        """
        check_one_label(self.labels, self.name)
        known = self.labels >= 0
        if not known.any():
            raise DataError(f"{self.name} has no labels, and evaluation needs them: give labelled images.")
        check_finite(self.vectors, f"the features of {self.name}")
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


def matched(train: Embeddings, test: Embeddings) -> tuple[Embeddings, Embeddings, int]:
    """Return the labelled images of both, numbered by the classes of `train`, and the number of class ids.

    Raises:
        ConfigError: if one of them is not `Embeddings`.
        DataError: as `labelled` and `matched_labels`, if there are fewer than two classes in training, or if the two
            have vectors of different widths.
    """
    for features in (train, test):
        if not isinstance(features, Embeddings):
            raise ConfigError(f"features must be Embeddings, as inbatch.embed returns, not {type_name(features)}")
    train, test = train.labelled(), test.labelled()
    if train.vectors.shape[1] != test.vectors.shape[1]:
        raise DataError(
            f"the features of {train.name} have {train.vectors.shape[1]} numbers and those of {test.name} "
            f"{test.vectors.shape[1]}: pass features of one encoder"
        )
    if len(train.labels.unique()) < 2:
        raise DataError(f"{train.name} has one class only: at least two are needed.")
    test = replace(test, labels=matched_labels(train, test), classes=train.classes or test.classes)
    return train, test, int(torch.maximum(train.labels.max(), test.labels.max())) + 1


@runtime_checkable
class Labelled(Protocol):
    """Interface of images with labels: `Embeddings` or a source; `classes` (names of the labels) may be missing."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> Int[Tensor, "n"]: ...


def matched_labels(train: Labelled, test: Labelled) -> Int[Tensor, "n"]:
    """Return the labels of `test` in the numbering of `train`, by the names of the classes if both have names.

    `test` may lack some of the classes.

    Raises:
        DataError: if an image of `test` has a class that `train` does not have.
    """
    names, wanted = getattr(test, "classes", ()), getattr(train, "classes", ())
    if tuple(names) == tuple(wanted) or not names or not wanted:
        return test.labels
    number = {name: i for i, name in enumerate(wanted)}
    used = [i for i in test.labels.unique().tolist() if i >= 0]
    if unknown := [names[i] for i in used if names[i] not in number]:
        raise DataError(
            f"{test.name} has other classes than {train.name}: {listed(unknown)}; pass test data with "
            f"the same classes or some of them ({', '.join(wanted[:5])}{', ...' * (len(wanted) > 5)})."
        )
    table = torch.full((len(names) + 1,), -1)  # the last entry is for the label -1
    table[used] = torch.tensor([number[names[i]] for i in used], dtype=torch.long)
    return table[test.labels]


def check_one_label(
    labels: Tensor, name: str, reason: str = "k-NN, probes and clustering compare one class per image"
) -> None:
    """Raise DataError, with the reason, if images have several labels each, labels (N, L)."""
    if labels.ndim != 1:
        raise DataError(
            f"the labels of {name} have the shape {tuple(labels.shape)}: {reason} and take no images with several "
            "labels; pass one column, such as labels[:, 0], at a time."
        )


def check_finite(vectors: Float[Tensor, "n f"], name: str = "the features") -> None:
    """Raise DataError if a value is not finite; vectors that are memory-mapped are read in tiles."""
    for rows in vectors.split(1 << 14):
        # A sum is much faster to check; it may overflow although the features are finite.
        if not rows.sum().isfinite() and not rows.isfinite().all():
            raise DataError(f"{name} hold NaN or infinity: {DIVERGED}")
