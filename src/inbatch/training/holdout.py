"""Select the labelled images on which features are evaluated."""

from typing import Any

from inbatch.data import Source, Subset, open_data, splits
from inbatch.errors import DataError
from inbatch.methods import METHODS
from inbatch.rng import permutation
from inbatch.training.recipe import Recipe


def evaluation_split(
    recipe: Recipe, source: Source, data: Any, test: Any = None, download: bool = False
) -> tuple[Source, Source, str] | None:
    """Return the bank, the queries, and a description of their origin for evaluation; None without labels.

    The queries are the test data that are passed or named in the recipe, else the test split of the data, else a tenth
    of the images. The bank is the training data or, if these have no labels, the rest of the test data.

    Args:
        recipe: Recipe of the run.
        source: Images that the run learns from.
        data: Data set that `source` was opened from.
        test: Test data; None for those of the recipe.
        download: Whether missing data may be downloaded.

    Raises:
        DataError: If the test data have no labels or other classes.
    """
    given = test if test is not None else recipe.test
    labelled = bool((source.labels >= 0).any())
    if given is None and not labelled:
        return None
    where, reading = data if given is None else given, recipe.reading | {"download": download}
    own = "test" in splits(where) and (given is not None or recipe.split != "test")
    if not own and (given is None or not labelled):
        whole = source if given is None else open_data(given, splits(given)[0], **reading)
        seen = "; their labels were trained on" if given is None and METHODS[recipe.method.name].labels else ""
        return _tenth(whole, f"a tenth of {whole.name}, held out from the bank{seen}")
    split = "test" if own else splits(where)[0]
    bank = source if labelled else open_data(where, "train", **reading)
    queries = open_data(where, split, **reading)
    if queries.classes != bank.classes:
        raise DataError(f"{queries.name} has other classes than {bank.name}: pass test data with the same classes")
    return bank, queries, f"{split} split of {queries.name}"


def _tenth(source: Source, how: str) -> tuple[Source, Source, str]:
    """Return nine tenths of the images as the bank and one tenth as queries, selected by a fixed permutation."""
    if not bool((source.labels >= 0).any()):
        raise DataError(f"{source.name} has no labels, which the evaluation needs: use class sub-folders")
    order = permutation(0, 0, len(source))
    cut = max(1, len(source) // 10)
    bank, queries = (Subset(source, part.sort().values, how) for part in (order[cut:], order[:cut]))
    return bank, queries, how
