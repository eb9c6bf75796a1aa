"""The folders of a run's checkpoints that hold tensors in shards."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.errors import InbatchError
from inbatch.runtime import distributed
from inbatch.runtime.files import cannot_write


def write_shards(directory: Path, step: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write divided tensors to a new folder, on every rank; return its name and the checksums of its files."""
    from inbatch.runtime import shard_files  # imports DCP, which takes a second

    name, problem = f"shards-{step:08d}", None
    if distributed.rank() == 0:
        try:
            number = 1
            while (directory / name).exists():  # of this step, by an evaluation or a killed process
                number += 1
                name = f"shards-{step:08d}-{number}"
            (directory / name).mkdir(parents=True)
        except OSError as error:
            problem = str(cannot_write(directory / name, error))
    name, problem = distributed.broadcast_object((name, problem))
    if problem:
        raise InbatchError(problem)
    return {"folder": name, "files": shard_files.write(directory / name, tensors)}


def check_shards(path: Path, shards: Mapping[str, Any], shared: bool) -> None:
    """Raise ValueError if a file of the shards is missing or damaged; if shared, every rank reads a part of them."""
    from inbatch.runtime import shard_files

    for i, (name, facts) in enumerate(sorted(shards["files"].items())):
        file = path.with_name(shards["folder"]) / name
        if not file.is_file():
            raise ValueError(f"lacks its file {file}")
        mine = not shared or i % distributed.world() == distributed.rank()
        if file.stat().st_size != facts[0] or (mine and shard_files.fingerprint(file) != facts):
            raise ValueError(f"is incomplete: {file} is damaged")


def remove_unused(directory: Path, checkpoints: Iterable[str]) -> None:
    """Remove the folders of shards that no checkpoint refers to."""
    used = set[str]()
    for name in checkpoints:
        try:
            used.add(torch.load(directory / name, weights_only=True, map_location="cpu", mmap=True)["shards"]["folder"])
        except FileNotFoundError:
            continue
        except Exception:  # a damaged file, or one without shards, refers to none
            continue
    for folder in directory.glob("shards-*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def names_shards(shards: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint names a folder next to it, and files in it with size and checksum."""
    files = shards.get("files")
    return (
        re.fullmatch(r"shards-[0-9-]+", str(shards.get("folder"))) is not None
        and isinstance(files, dict)
        and all(re.fullmatch(r"[a-z0-9-]+\.safetensors", str(name)) for name in files)
        and all(isinstance(x, list) and len(x) == 2 for x in files.values())
    )
