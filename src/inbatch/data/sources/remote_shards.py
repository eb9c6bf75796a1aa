"""Tar and Parquet files behind URLs, such as s3://bucket/train-{000..146}.tar."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from inbatch.data.source import Reading, Source
from inbatch.data.sources.several import PACKED
from inbatch.data.sources.shards import Shards, divided, has_range, ranges
from inbatch.errors import DataError, listed
from inbatch.runtime.remote import Url, files, is_url, public


def find_remote(data: object, reading: Reading) -> dict[str, Callable[[], Source]] | None:
    """Find the splits of the files behind a URL: one file, a range, a pattern, or a folder.

    The files of a folder are divided by the names of splits; a file, a range and a pattern are training images.
    """
    if not isinstance(data, str) or not is_url(data):
        return None
    urls = [Url(one) for one in ranges(data)] if has_range(data) else files(data)
    by_ending = {ending: [one for one in urls if _ending(one) == ending] for ending in PACKED}
    kinds = {ending: group for ending, group in by_ending.items() if group}
    if not kinds:
        others = f", only {listed([_name(one) for one in urls], 3)}" if urls else ""
        raise DataError(f"{public(data)!r} names no .tar or .parquet file{others}: correct the URL")
    if len(kinds) > 1:
        raise DataError(f"{public(data)!r} names .tar and .parquet files: choose one kind by a pattern (*.tar)")
    ending, chosen = next(iter(kinds.items()))
    is_folder = chosen[0].path is not None and "*" not in data and "[" not in data
    shards = _divided(chosen, public(data)) if is_folder else Shards({"train": chosen}, {})
    return PACKED[ending](shards, public(data), reading)


def _divided(urls: Sequence[Url], where: str) -> Shards:
    """Return the files of a folder by the splits that their names hold."""
    by_name = {_name(url): url for url in urls}
    shards = divided([Path(name) for name in by_name], Path(where))
    files = {split: [by_name[str(path)] for path in paths] for split, paths in shards.files.items()}
    return Shards(files, shards.names, shards.unused)


def _name(url: Url) -> str:
    return PurePosixPath(url).name


def _ending(url: Url) -> str:
    return PurePosixPath(url).suffix.lower()
