"""Files that the commands for a collection write: a list of images, which `--data` reads, and a picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inbatch.apps.collection.features import Collection
from inbatch.apps.reports.view_grid import check_picture, check_place
from inbatch.data.sources.labels import changed_names
from inbatch.errors import ConfigError, DataError, InbatchError, Unwritten
from inbatch.runtime.files import check_writable
from inbatch.runtime.path_list import check_not_read
from inbatch.runtime.paths import path_of
from inbatch.runtime.table_file import write_table


def check_outputs(write: str | Path | None, picture: str | Path | None, data: Any, labelled: Any = None) -> None:
    """Raise, before any work, if the files cannot be written.

    Args:
        write: List of images, or None.
        picture: Picture, or None.
        data: The images, among which the picture must not lie.
        labelled: List of labelled images, or None.

    Raises:
        ConfigError: For a file extension that is not written, a picture that would become an image of the data, or a
            file that the command reads.
        InbatchError: If a file cannot be written.
    """
    if write is not None:
        check_writable(_list_path(write))
        check_not_read(write, data, labelled)
    if picture is not None:
        check_picture(picture)
        check_place(picture, data)


def check_images(collection: Collection, write: str | Path | None, picture: str | Path | None) -> None:
    """Raise, before any computation, if a list or a picture needs images that are not available.

    Raises:
        ConfigError: If there are features without their images.
        DataError: If the images have no files that a list could name, or a class that a list cannot hold.
    """
    if not collection.has_images and (write is not None or picture is not None):
        what = "a list of their files" if write is not None else "a picture"
        raise ConfigError(f"{collection.name} holds features without their images, and {what} needs them: pass DATA")
    if write is not None and len(collection) and collection.file_of(0) is None:
        raise _without_files(collection)
    if write is not None:
        check_not_read(write, collection.origin.get("data"))
        labels = collection.labels.unique().tolist()
        _check_classes(collection, [collection.classes[label] for label in labels if label >= 0])


def write_list(
    path: str | Path, collection: Collection, rows: Sequence[int], columns: Mapping[str, Sequence[Any]] | None = None
) -> int:
    """Write images to a CSV file that `--data` reads: path, class (if any is known), split, and further columns.

    Args:
        path: File to write; replaced if it exists.
        collection: The images.
        rows: Positions of the images in the collection.
        columns: Further columns, each with one value per row.

    Returns:
        The number of images.

    Raises:
        ConfigError: If the file does not end in .csv.
        DataError: If images have no files of their own, because they are parts of an archive or an array, or if a list
            cannot hold their classes.
        InbatchError: If the file cannot be written.
    """
    files = [collection.file_of(i) for i in rows]
    if None in files:
        raise _without_files(collection)
    classes = [collection.class_of(i) for i in rows]
    _check_classes(collection, [*dict.fromkeys(name for name in classes if name is not None)])
    table: dict[str, Sequence[Any]] = {"path": files}
    if any(classes):
        table["class"] = ["" if name is None else name for name in classes]
    table["split"] = [collection.splits[i] or "train" for i in rows]
    return write_table(_list_path(path), [table | dict(columns or {})])


def with_files(
    result: dict[str, Any], files: Mapping[str, tuple[str | Path | None, Callable[[Path], Any]]]
) -> dict[str, Any]:
    """Write files of a result, and return the result with their paths, None for those that are not requested.

    Args:
        result: The result; the paths are added to it.
        files: Path and writing function of each key of the result.

    Raises:
        Unwritten: If a file cannot be written, after the others have been; the error holds the result.
    """
    errors = []
    for key, (path, write) in files.items():
        result[key] = None
        if path is None:
            continue
        try:
            write(file := path_of(path, key))
            result[key] = str(file)
        except InbatchError as error:
            errors.append(error)
    if errors:
        raise Unwritten(str(errors[0]), result) from errors[0]
    return result


def _list_path(path: str | Path) -> Path:
    file = path_of(path, "write")
    if file.suffix.lower() != ".csv":
        raise ConfigError(f"{file}: a list of images is written to a file that ends in .csv")
    return file


def _check_classes(collection: Collection, names: Sequence[str]) -> None:
    """Raise DataError if the names of classes mean something else when a list with them is read."""
    if changed := changed_names(names):
        raise DataError(
            f"{collection.name} has the class {changed[0]!r}, which a list of images cannot hold: it would be read as "
            "no label or as another class; rename the class, which is a folder or a label of the data"
        )


def _without_files(collection: Collection) -> DataError:
    return DataError(f"the images of {collection.origin['data']} have no files of their own that a list could name")
