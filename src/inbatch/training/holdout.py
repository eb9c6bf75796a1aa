"""Select the labelled images on which features are evaluated."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from inbatch.data import NO_LABELS, Source, Subset, find_split, open_data, splits
from inbatch.errors import DataError, listed
from inbatch.evaluation import Kept
from inbatch.evaluation.embeddings import matched_labels
from inbatch.methods import METHODS
from inbatch.rng import permutation
from inbatch.runtime import own_parts
from inbatch.training.presets import method_named
from inbatch.training.recipe import Recipe

Images = Source | Kept
"""A source, or a source whose decoded images are kept in memory."""


@dataclass(frozen=True)
class EvaluationSplit:
    """Labelled images on which features are evaluated.

    Attributes:
        bank: Images of the k-NN bank, on which the probes are trained.
        queries: Images that are classified.
        description: Origin of the queries, for the result.
    """

    bank: Images
    queries: Images
    description: str


def evaluation_split(
    recipe: Recipe, source: Source, data: Any, test: Any = None, download: bool = False
) -> EvaluationSplit | None:
    """Return the labelled images for the evaluation of a run; None without labels of at least two classes.

    The queries are the test data that are passed or named in the recipe, else the test split of the data (without one
    that is labelled, the validation split), else a tenth of the images. The bank is the training data or, if these have
    no labels, the rest of the test data.

    Args:
        recipe: Recipe of the run.
        source: Images that the run learns from.
        data: Data set that `source` was opened from.
        test: Test data; None for those of the recipe.
        download: Whether missing data may be downloaded.

    Raises:
        DataError: If the test data have no labels, or classes that the bank does not have.
    """
    test = recipe.test if test is None else test
    labelled = _has_classes(source, least=2)
    if test is None and not labelled:
        return None
    where, columns = (data, recipe.columns) if test is None else (test, columns_of_other(recipe, test))
    reading: dict[str, Any] = recipe.reading | columns | {"download": download}
    names = splits(where, **columns)
    any_class = reading | {"classes": None}  # test data may lack some of the listed classes
    if test is None:
        used = find_split(recipe.split, names)
        held_out = [
            name for name in dict.fromkeys((find_split("test", names), "val")) if name in names and name != used
        ]
        split, queries = next(_labelled(where, held_out, any_class), (None, None))
    else:
        divided = find_split("test", names) is not None and (labelled or "train" in names)
        split = find_split("test", names) if divided else names[0] if labelled else None
        queries = None if split is None else open_data(where, split, **any_class)
    if queries is None:
        whole = source if test is None else open_data(test, names[0], **reading)
        seen = "; their labels were trained on" if test is None and _learns_labels(recipe) else ""
        return _tenth(whole, f"a tenth of {whole.name}, held out from the bank{seen}")
    bank = source if labelled else open_data(where, "train", **reading)
    _check_classes(queries)
    if recipe.classes is not None:
        queries = _of_classes(queries, bank.classes)
    matched_labels(bank, queries)
    known = "" if test is None else _in_bank(bank, queries)
    return EvaluationSplit(bank, queries, f"{split} split of {queries.name}{known}")


def _in_bank(bank: Source, queries: Source) -> str:
    """Return the end of a description if queries are also in the bank: the same files, or all of the same data."""
    files = {file for i in range(len(bank)) if (file := bank.file_of(i)) is not None}
    number = sum(queries.file_of(i) in files for i in range(len(queries))) if files else 0
    if not files and (same := bank.whole.fingerprint()) is not None and same == queries.whole.fingerprint():
        number = len(queries)
    which = "all of them" if number == len(queries) else f"{number:,} of them"
    return f"; {which} are also in the bank, so that the figures are too high" if number else ""


def _labelled(data: Any, names: Iterable[str], reading: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    """Yield the splits with labels among these, by name."""
    for name in names:
        source = open_data(data, name, **reading)
        if _has_classes(source):
            yield name, source


def columns_of_other(recipe: Recipe, data: Any) -> dict[str, Any]:
    """Return the columns of other data than the run's: those of the recipe if these data have them, else the usual."""
    usual: dict[str, Any] = {"image_column": None, "label_column": None}
    own: dict[str, Any] = {key: None if column == NO_LABELS else column for key, column in recipe.columns.items()}
    if own == usual:
        return usual
    try:
        open_data(data, splits(data, **own)[0], levels=recipe.levels, **own)
    except DataError:
        return usual
    return own


def _learns_labels(recipe: Recipe) -> bool:
    name = recipe.method.name
    return (name in METHODS or own_parts.find("method", name) is not None) and method_named(name).labels


def _tenth(source: Source, how: str) -> EvaluationSplit:
    """Return nine tenths of the images as the bank and one tenth as queries, selected by a fixed permutation.

    Images of a class that would not be in the bank stay there. Images that cannot be read do not change the
    selection: a run leaves them out before, its later evaluation does not.
    """
    _check_classes(source)
    order = permutation(0, 0, len(source.whole))
    labels, tenth = source.whole.labels[order], torch.arange(len(order)) < max(1, len(order) // 10)
    tenth &= (labels < 0) | torch.isin(labels, labels[~tenth])
    order = source.numbers_here(order)
    rest, held_out = (order[part & (order >= 0)] for part in (~tenth, tenth))
    if not len(held_out):
        rest, held_out = rest[1:], rest[:1]
    bank, queries = (Subset(source, part.sort().values, how) for part in (rest, held_out))
    return EvaluationSplit(bank, queries, how)


def _of_classes(source: Source, classes: tuple[str, ...]) -> Source:
    """Return the images of these classes, numbered by them; images of some of the classes are enough."""
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for name in source.classes] + [-1])[source.labels]
    chosen = Subset(source, (labels >= 0).nonzero()[:, 0], "the listed classes")
    if not len(chosen):
        raise DataError(
            f"{source.name} has no image of the {len(classes)} classes of the training data: pass images of "
            f"{listed(classes)}"
        )
    chosen.labels, chosen.classes = labels[labels >= 0], classes
    return chosen


def _has_classes(source: Source, least: int = 1) -> bool:
    """Return whether there are so many classes; several labels per image, (N, L), are not classes."""
    return source.labels.ndim == 1 and len(source.labels[source.labels >= 0].unique()) >= least


def lack_of_classes(source: Source) -> str:
    """Return what images lack for which `evaluation_split` returns None, for the middle of a sentence."""
    if _has_classes(source):
        return "has images of one class only"
    return f"has no labels for the evaluation{source.why_unlabelled()}"


def _check_classes(source: Source) -> None:
    """Raise DataError if no image has a class."""
    if not _has_classes(source):
        raise DataError(
            f"{source.name} has no labels{source.why_unlabelled()}, which the evaluation needs: use class sub-folders"
        )
