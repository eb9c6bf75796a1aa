"""Predictions of a classifier for the images of a data set, written to a file."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from inbatch.data import Source
from inbatch.errors import DataError, check_whole
from inbatch.evaluation import Embeddings
from inbatch.evaluation.class_figures import ClassFigures
from inbatch.models.classifier import Classifier, load_classifier
from inbatch.runtime.device import device_for
from inbatch.runtime.files import check_writable
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import check_not_read, joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.table_file import Table, check_table_file, write_table
from inbatch.runtime.terminal import counted
from inbatch.training.run_embedding import embed_splits, images_for


@isolated
def predict(
    classifier: str | Path | Classifier, data: Any, out: str | Path, *, split: str | None = None, top: int = 5,
    device: str = "auto", quiet: bool = True, image_column: str | None = None, label_column: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the predicted class of every image to a .csv, .jsonl or .parquet file, in little memory.

    Columns: "path", "split", "class" (the most probable one), "probability", "margin" (the difference to the second
    probability), "class_2", "probability_2", ... for the next ones, and, if the data are labelled, "true_class".

    Args:
        classifier: The folder that `train_classifier` wrote, or what `load_classifier` returns.
        data: Images to classify.
        out: File to write; replaced if it exists.
        split: The only split; None for every image.
        top: Number of classes per image, at most all of them.
        device: Name of the device, or "auto".
        quiet: Print no progress to stderr.
        image_column: Column of the images; None for the usual names.
        label_column: Column of the labels, likewise.

    Returns:
        "images", "predicted" (number of images by predicted class), "unreadable" (a message for each image that cannot
        be read and is left out), and, if the data are labelled with classes of the classifier, "figures" (see
        `ClassFigures`); "unknown_classes" counts images with labels of other classes, which the figures leave out, and
        "trained_on" lists the splits that have the names and labels of the training images.

    Raises:
        ConfigError: For another ending of `out`, a folder without a classifier, or `top` below 1.
        DataError: If the data cannot be opened, or if no image can be read.
    """
    check_whole("top", top, least=1)
    out = path_of(out, "out")
    check_table_file(out)
    check_writable(out)
    check_not_read(out, data)
    model = classifier if isinstance(classifier, Classifier) else load_classifier(classifier)
    model = model.to(device_for(device))
    data = joined_paths(data)
    sources = images_for(None, model.encoder, data, split, image_column, label_column)
    labelled = any(source.labels.ndim == 1 and (source.labels >= 0).any() for source in sources.values())
    bad: dict[int, str] = {}
    count = sum(map(len, sources.values()))
    chunks: Iterable[Embeddings] = embed_splits(model, sources, bad)
    seen = _Seen(model, min(top, len(model.classes)), labelled)
    write_table(out, seen.tables(chunks if quiet else counted(chunks, count, "classified"), bad))
    return {
        "classifier": None if isinstance(classifier, Classifier) else str(classifier),
        "out": str(out),
        "images": int(seen.predicted.sum()),
        "splits": {name: len(source) for name, source in sources.items()},
        "predicted": {name: count for name, count in zip(model.classes, seen.predicted.tolist(), strict=True) if count},
        "unreadable": list(bad.values()),
        "trained_on": _trained_on(model, sources),
        "figures": seen.figures.figures() if seen.known else None,
        "unknown_classes": seen.unknown,
    }


def _trained_on(model: Classifier, sources: Mapping[str, Source]) -> list[str]:
    """Return the splits that have the names and labels of the images with which the classifier was trained."""
    known = model.figures.get("train", {}).get("signatures", [])
    return [name for name, source in sources.items() if source.signature() in known]


class _Seen:
    """Converts logits to columns of the table, and collects the figures."""

    def __init__(self, model: Classifier, top: int, labelled: bool) -> None:
        self.classes, self.top, self.labelled = model.classes, top, labelled
        self.predicted = torch.zeros(len(model.classes), dtype=torch.long)
        self.figures, self.known, self.unknown = ClassFigures(model.classes), 0, dict[str, int]()

    def tables(self, chunks: Iterable[Embeddings], bad: dict[int, str]) -> Iterator[Table]:
        """Yield the columns of each chunk; DataError at the end if there is none."""
        for chunk in chunks:
            yield self._table(chunk)
        if not self.predicted.sum():
            raise DataError(f"none of {len(bad):,} images can be read: {'; '.join(list(bad.values())[:3])}")

    def _table(self, chunk: Embeddings) -> Table:
        logits = chunk.vectors
        if not logits.isfinite().all():
            raise DataError(
                "the classifier gives NaN or infinity for some images: its weights are damaged; train it again "
                "(inbatch train-classifier)"
            )
        likely, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        names = [[self.classes[i] for i in row] for row in order[:, : self.top].T.tolist()]
        self.predicted += order[:, 0].bincount(minlength=len(self.classes))
        second = likely[:, 1] if likely.shape[1] > 1 else torch.zeros(len(likely))
        table: dict[str, list[Any]] = {
            "path": list(chunk.identities),
            "split": [chunk.split] * len(chunk),
            "class": names[0],
            "probability": _rounded(likely[:, 0]),
            "margin": _rounded(likely[:, 0] - second),
        }
        for place in range(1, self.top):
            table |= {f"class_{place + 1}": names[place], f"probability_{place + 1}": _rounded(likely[:, place])}
        if self.labelled:
            table["true_class"] = self._add_labelled(chunk, logits)
        return table

    def _add_labelled(self, chunk: Embeddings, logits: Tensor) -> list[str | None]:
        """Add the labelled images of a chunk to the figures; return the names of their classes."""
        if chunk.labels.ndim != 1:
            return [None] * len(chunk)
        names = [*(chunk.classes or map(str, range(int(chunk.labels.max()) + 1))), None]
        own: list[str | None] = [names[i] for i in chunk.labels.tolist()]
        labels = _matched(own, self.classes)
        for name, label in zip(own, labels.tolist(), strict=True):
            if name is not None and label < 0:
                self.unknown[name] = self.unknown.get(name, 0) + 1
        self.known += int((labels >= 0).sum())
        self.figures.add(logits, labels)
        return own


def _matched(names: list[str | None], classes: tuple[str, ...]) -> Int[Tensor, "n"]:
    """Return the numbers of classes by name, -1 for others."""
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number.get(name, -1) if name is not None else -1 for name in names])


def _rounded(values: Tensor) -> list[float]:
    """Return probabilities with six decimals."""
    return [round(value, 6) for value in values.tolist()]
