"""Files of tensors that are divided over ranks, by `torch.distributed.checkpoint`: safetensors, one file per rank.

DCP's own format has an index that is a pickle. Its safetensors storage has none: every file states in its header which
part of which tensor it holds, so that another number of ranks can read them.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from inbatch.errors import InbatchError, reason
from inbatch.runtime.files import cannot_write
from inbatch.runtime.sharding import local

Files = dict[str, list[int | str]]
"""Size and SHA-256 of files, by name."""


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Files:
    """Write every rank's parts of divided tensors to a new folder; all ranks must call it.

    Returns:
        The files of all ranks.

    Raises:
        InbatchError: On every rank, if one of them cannot write, or the ranks do not share the folder.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _named_failures(folder), quiet_checkpoints():
        dcp.save(dict(tensors), storage_writer=writer)
    mine = {}
    if any(local(x).numel() for x in tensors.values()):
        start = f"shard-{dist.get_rank() + 1:05d}-"
        mine = {path.name: fingerprint(path) for path in folder.glob(f"{start}*.safetensors")}
    parts: list[Files] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    files = {name: facts for part in parts for name, facts in part.items()}
    hidden = [name for name in files if not (folder / name).is_file()]
    seen_by: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(seen_by, hidden[0] if hidden else None)
    for rank, name in enumerate(seen_by):
        if name is not None:
            raise InbatchError(
                f"rank {rank} does not find {folder / name}, which another rank has written: choose an --output-dir on "
                "a file system that all ranks share"
            )
    return files


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, divided or not, from the files of a folder, whatever the number of ranks that wrote them.

    Ranks do not communicate: each reads what it holds.

    Raises:
        ValueError: If a tensor is missing or has another shape, or a file has other content.
    """
    try:
        with quiet_checkpoints():
            dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise ValueError(f"cannot be read ({reason(_first(error)[1])})") from None
    except Exception as error:  # the reader raises any exception for a crafted file
        raise ValueError(f"cannot be read ({reason(error)})") from None


def fingerprint(path: Path) -> list[int | str]:
    """Return the size and the SHA-256 of a file."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


@contextmanager
def _named_failures(folder: Path) -> Iterator[None]:
    """Raise what failed on a rank as an error that names it; a lost rank as the error of the collective."""
    try:
        yield
    except CheckpointException as error:
        rank, failure = _first(error)
        if isinstance(failure, OSError):
            raise InbatchError(f"rank {rank}: {cannot_write(folder, failure)}") from error
        raise RuntimeError(f"rank {rank}: {failure}") from error


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    rank, (failure, _) = next(iter(error.failures.items()))
    return rank, failure


@contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Leave out the warnings of torch on reading without a process group and on files that are not merged."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    finally:
        logger.setLevel(level)
