"""Select the labelled images on which features are evaluated."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inbatch.data import NO_LABELS, Source, Subset, find_split, open_data, renumbered, splits
from inbatch.errors import DataError
from inbatch.evaluation import Kept
from inbatch.methods import METHODS
from inbatch.rng import permutation
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
    """Return the labelled images for the evaluation of a run; None without labels.

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
        DataError: If the test data have no labels or other classes.
    """
    test = recipe.test if test is None else test
    labelled = bool((source.labels >= 0).any())
    if test is None and not labelled:
        return None
    where, columns = (data, recipe.columns) if test is None else (test, columns_of_other(recipe, test))
    reading: dict[str, Any] = recipe.reading | columns | {"download": download}
    names = splits(where, **columns)
    if test is None:
        used = find_split(recipe.split, names)
        held_out = [
            name for name in dict.fromkeys((find_split("test", names), "val")) if name in names and name != used
        ]
        split, queries = next(_labelled(where, held_out, reading), (None, None))
    else:
        divided = find_split("test", names) is not None and (labelled or "train" in names)
        split = find_split("test", names) if divided else names[0] if labelled else None
        queries = None if split is None else open_data(where, split, **reading)
    if queries is None:
        whole = source if test is None else open_data(test, names[0], **reading)
        seen = "; their labels were trained on" if test is None and METHODS[recipe.method.name].labels else ""
        return _tenth(whole, f"a tenth of {whole.name}, held out from the bank{seen}")
    bank = source if labelled else open_data(where, "train", **reading)
    queries = renumbered(queries, bank)
    if queries.classes != bank.classes:
        raise DataError(f"{queries.name} has other classes than {bank.name}: pass test data with the same classes")
    return EvaluationSplit(bank, queries, f"{split} split of {queries.name}")


def _labelled(data: Any, names: Iterable[str], reading: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    """Yield the splits with labels among these, by name."""
    for name in names:
        source = open_data(data, name, **reading)
        if bool((source.labels >= 0).any()):
            yield name, source


def columns_of_other(recipe: Recipe, data: Any) -> dict[str, Any]:
    """Return the columns of other data than the run's: those of the recipe if these data have them, else the usual."""
    usual: dict[str, Any] = {"image_column": None, "label_column": None}
    own: dict[str, Any] = {key: None if column == NO_LABELS else column for key, column in recipe.columns.items()}
    if own == usual:
        return usual
    try:
        open_data(data, splits(data, **own)[0], **own)
    except DataError:
        return usual
    return own


def _tenth(source: Source, how: str) -> EvaluationSplit:
    """Return nine tenths of the images as the bank and one tenth as queries, selected by a fixed permutation."""
    if not bool((source.labels >= 0).any()):
        raise DataError(
            f"{source.name} has no labels{source.why_unlabelled()}, which the evaluation needs: use class sub-folders"
        )
    order = permutation(0, 0, len(source))
    cut = max(1, len(source) // 10)
    bank, queries = (Subset(source, part.sort().values, how) for part in (order[cut:], order[:cut]))
    return EvaluationSplit(bank, queries, how)
