"""Folders of `torch.distributed.checkpoint` (FSDP, torchtitan), read by torch's reader without executing anything."""

import pickle
import re
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem, metadata

from inbatch.errors import DataError
from inbatch.runtime.shard_files import quiet_checkpoints

_OF_TRAINING = re.compile(r"optim\w*|lr_scheduler|dataloader|train_state")
"""First words of names of what a training program keeps besides the weights."""


def read_sharded(index_file: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by their names, without those of an optimiser.

    Args:
        index_file: File of the folder that names its tensors and where their parts are.

    Raises:
        DataError: If it holds other objects than the index of a checkpoint, or names files elsewhere.
    """
    reader = _Reader(index_file.parent)
    reader.index_file = index_file
    index = reader.read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, metadata.TensorStorageMetadata) and not _OF_TRAINING.fullmatch(name.split(".")[0])
    }
    state: dict[str, Any] = dict(tensors)  # tensors only: of other entries the reader would run pickles
    with quiet_checkpoints():
        checkpoint.load(state, storage_reader=reader, no_dist=True)
    return tensors


class _Reader(checkpoint.FileSystemReader):
    """Torch's reader with an index of which only names of data classes are resolved."""

    index_file: Path

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        with open(self.index_file, "rb") as file:
            index = _Index(file).load()
        if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise DataError(f"{self.index_file.name} is not the index of a checkpoint. Copy the whole folder again")
        for place in index.storage_data.values():
            if PurePath(place.relative_path).name != place.relative_path:
                raise DataError(
                    f"its index names a file outside of the folder: {place.relative_path}. Save the checkpoint again"
                )
        return index


class _Index(pickle.Unpickler):
    """Unpickler that resolves data classes of an index and types of tensors, which run no code, and refuses others."""

    _MODULES = {
        "torch.distributed.checkpoint.metadata": metadata,
        "torch.distributed.checkpoint.filesystem": filesystem,
    }
    _KNOWN = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): dict,
        **{("pathlib", name): PurePath for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
        **{("pathlib._local", name): PurePath for name in ("PosixPath", "WindowsPath")},
    }
    _CLASSES = (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo",
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return the class with a name."""
        if (module, name) in self._KNOWN:
            return self._KNOWN[module, name]
        if module in self._MODULES and name in self._CLASSES:
            return getattr(self._MODULES[module], name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise DataError(
            f"its index refers to {module}.{name}, which is not part of the index of a checkpoint. Save it again with "
            "torch.distributed.checkpoint"
        )
