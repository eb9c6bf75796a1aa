"""Names of splits: the words that are used for training, validation and test images, in any letter case."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
}
"""Split -> the words that name it: as a folder, in the name of a file or shard, in a list, or as a split of a set."""

_SPLITS = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # "trainA", "seg_train" and "TRAIN-001" hold the word train, "trainval" not
_CONTENT = re.compile(r"(?:sets?|data|images?|imgs?)$", re.IGNORECASE)  # "trainset" and "testdata" hold a word, too

Value = TypeVar("Value")


def split_of(word: str) -> str | None:
    """Return the split that a word names, "train", "val" or "test"; None for other words."""
    return _SPLITS.get(word.lower())


def word_within(name: str) -> str | None:
    """Return the first word of a name that names a split ("train" of "train2017", "test" of "seg_test"), or None."""
    words = (_CONTENT.sub("", word) for word in _WORD.findall(name))
    return next(filter(split_of, words), None)


def split_within(name: str) -> str | None:
    """Return the split that the first such word of a name names, or None."""
    word = word_within(name)
    return word and split_of(word)


def arranged(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return values by split instead of by name: train, val and test first, then those with other names.

    Of several names for one split, the first in `WORDS` stands for it; the others keep their own name.
    """
    order = {word: i for i, word in enumerate(_SPLITS)}
    result: dict[str, Value] = {}
    for name in sorted(values, key=lambda name: (order.get(name.lower(), len(order)), name != name.lower())):
        split = split_of(name)
        result[split if split is not None and split not in result else name] = values[name]
    return dict(sorted(result.items(), key=lambda item: [*WORDS, item[0]].index(item[0])))


def find_split(word: str, splits: Iterable[str]) -> str | None:
    """Return which of the splits a word means, None for none of them.

    Any word of `WORDS` names its split. Validation images are also the test images if there are no others.
    """
    known = set(splits)
    split = split_of(word)
    places = (word, split, "val" if split == "test" else None)
    return next((place for place in places if place in known), None)


def naming(names: Mapping[str, str]) -> str:
    """Return a sentence part on what was taken as which split: "splits: train = Training, test = Testing"."""
    parts = (split if split == name else f"{split} = {name}" for split, name in names.items())
    return f"splits: {', '.join(parts)}"


def distinct(splits: Iterable[str]) -> list[str]:
    """Return the splits without those that only unite others, such as `trainval` and `train+unlabeled`."""
    names = list(splits)
    united = {"trainval"} if {"train", "val"} <= set(names) else set()
    united |= {name for name in names if "+" in name and set(name.split("+")) <= set(names)}
    return [name for name in names if name not in united]
