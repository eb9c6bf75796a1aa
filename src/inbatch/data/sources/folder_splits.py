"""Division of a folder into splits by the names of its sub-folders."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from inbatch.data.sources.folder_contents import has_loose_images, holds_images, loose_images, sub_folders
from inbatch.data.sources.split_names import arranged, split_of, split_within, word_within
from inbatch.errors import DataError, listed, many


@dataclass(frozen=True)
class Layout:
    """Folders of the splits of a folder.

    Attributes:
        root: The folder that holds the folders of the splits, or all images.
        names: Name of the sub-folder by split; empty if the images are not divided.
        notes: Sentence parts on what else was found.
    """

    root: Path
    names: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_layout(root: Path) -> Layout:
    """Return the splits of a folder: its sub-folders named as splits, or those of the only sub-folder with images.

    Raises:
        DataError: If a sub-folder may be a split or a class.
    """
    place = root
    while (layout := _divided(place, folders := sub_folders(place))) is None:
        only = None if has_loose_images(place) else _only_with_images(place, folders)
        if only is None:
            return Layout(root)
        place /= only
    return layout if place == root or layout.names else Layout(root)


def _divided(root: Path, folders: list[str]) -> Layout | None:
    """Return the splits by the names of these sub-folders; None if no name is that of a split."""
    named = _named_within(root, folders) or [name for name in folders if split_of(name)]
    named = [name for name in named if _split(name) == "train" or holds_images(root / name)]
    if not named:
        return None
    others = [name for name in folders if name not in named and holds_images(root / name)]
    loose = loose_images(root)
    training = [name for name in named if _split(name) == "train"]
    if len(training) > 1:
        raise DataError(
            f"{str(root)!r} holds {listed([*map(repr, training)], 3)}, which are all named as training images: "
            f"pass one of them or several as the data (--data {root / training[0]}), and the "
            "test images with --set test=FOLDER"
        )
    one_kind = not training or named == training  # a class may have such a name
    if one_kind and (others or (loose and not (training and _has_folders_of_images(root / training[0])))):
        return _undivided(root, named[0], others, loose)
    words: dict[str, str] = {}
    for name in named:
        word = name if split_of(name) else word_within(name)
        words[name if word is None or word in words else word] = name
    names = {split: _without_doubling(root, name) for split, name in arranged(words).items()}
    names |= {name: _without_doubling(root, name) for name in others}
    return Layout(root, names, (f"{many(loose, 'image')} next to the splits not used",) if loose else ())


def _undivided(root: Path, name: str, others: list[str], loose: int) -> Layout:
    """Return the folder as one split, with a class or photographs of trains; DataError for every other case."""
    if name.lower() == "train" and not _has_folders_of_images(root / name):
        return Layout(root, notes=(f"the folder {name!r} is not taken as a split",))
    rest = listed([*map(repr, others)], 3) if others else many(loose, "image")
    hint = f"pass --data {root / name}" if _split(name) == "train" else f"move the other images into {root / 'train'}"
    raise DataError(
        f"{str(root)!r} holds the folder {name!r} next to {rest}: it may be a split or a class. If it is a split, "
        f"{hint}; if it is a class, rename it, or pass --data '{root / '**'}'"
    )


def check_inner_splits(root: Path, folders: list[bytes]) -> None:
    """Raise DataError if sub-folders of a folder are themselves divided into training and test images.

    Args:
        root: The folder.
        folders: Paths of all folders in it, with "/" at the end.
    """
    inside: dict[str, set[str]] = {}
    for folder in folders:
        if folder.count(b"/") == 2:
            outer, name, _ = os.fsdecode(folder).split("/")
            inside.setdefault(outer, set()).add(name)
    for outer, names in inside.items():
        splits = {split: name for name in sorted(names) if (split := split_of(name))}
        if "train" in splits and len(splits) > 1:
            place = os.path.join(root, outer)
            raise DataError(
                f"{str(root)!r} holds folders that are divided into splits ({outer}/{splits['train']} and others): "
                f"training on all of it would include test images. Name one of them as the data (--data {place}), or "
                f"the training images of several (--data '{os.path.join(root, '*', splits['train'])}')"
            )


def _split(name: str) -> str | None:
    return split_of(name) or split_within(name)


def _named_within(root: Path, folders: list[str]) -> list[str]:
    """Return the folders with a split in their name, if there are training and other ones.

    If there are images elsewhere, only folders of equal names apart from the split, such as `seg_train` and `seg_test`.
    """
    named = [name for name in folders if split_within(name)]
    splits = {split_within(name) for name in named}
    if "train" not in splits or len(splits) < 2:
        return []
    if not any(holds_images(root / name) for name in folders if name not in named):
        return named
    rests = {name: name.replace(word_within(name) or "", "", 1).lower() for name in named}
    training = {rests[name] for name in named if _split(name) == "train"}
    shared = training & {rests[name] for name in named if _split(name) != "train"}
    return [name for name in named if rests[name] in shared]


def _without_doubling(root: Path, name: str) -> str:
    """Return the path of a split below `root`: of a folder that holds only one of the same name, the inner one."""
    folder = root / name
    if _only_with_images(folder, sub_folders(folder)) == name and not has_loose_images(folder):
        return os.path.join(name, name)
    return name


def _only_with_images(root: Path, folders: list[str]) -> str | None:
    """Return the only folder that holds images, None if there are none or several."""
    only = None
    for name in folders:
        if holds_images(root / name):
            if only is not None:
                return None
            only = name
    return only


def _has_folders_of_images(folder: Path) -> bool:
    return any(holds_images(folder / name) for name in sub_folders(folder))
