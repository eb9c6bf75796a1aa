"""Tensors of a file of weights from any program, recognised by its content. No code of a file is executed."""

import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from inbatch.errors import ConfigError, DataError, listed, reason

SUFFIXES = (".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")
KINDS = (
    'a run, "timm", hub:REPOSITORY, an encoder\'s folder, a folder of torch.distributed.checkpoint, a file of '
    "safetensors or of torch.save (.safetensors, .pt, .pth, .pth.tar, .ckpt, .bin), or an index of such files "
    "(.index.json)"
)
_SAVE = "Save the weights: torch.save(model.state_dict(), FILE), or safetensors"
_CONVERT = "Save its tensors with safetensors.torch.save_file, or torch.save a state dict of PyTorch"

_BEGINNINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "it is a picture. Pass a file of weights"),
    (0, b"\x89PNG", "it is a picture. Pass a file of weights"),
    (0, b"GIF8", "it is a picture. Pass a file of weights"),
    (8, b"WEBP", "it is a picture. Pass a file of weights"),
    (0, b"\x89HDF", f"it is an HDF5 file, as Keras writes it. {_CONVERT}"),
    (0, b"\x93NUMPY", f"it is one array of NumPy. {_CONVERT}"),
    (257, b"ustar", "it is a tar archive. Unpack it, and pass the file of weights in it"),
    (0, b"\x1f\x8b", "it is compressed by gzip. Decompress it first"),
    (0, b"version https://git-lfs", "it is a Git LFS pointer, not the file itself. Download it with git lfs pull"),
    (0, b"<!DOCTYPE", "it is a web page. Download the file itself"),
    (0, b"<html", "it is a web page. Download the file itself"),
)
"""Offset, bytes, and the sentence for a file that has them there."""
INDEX = ".metadata"
"""File of a folder of `torch.distributed.checkpoint` that names its tensors and where their parts are."""
_TENSORFLOW = bytes.fromhex("57fb808b247547db")
"""Last bytes of the index of a TensorFlow checkpoint."""
_OF_TENSORFLOW = f"it belongs to a TensorFlow checkpoint. {_CONVERT}"

_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Modules that FSDP and activation checkpointing put between others; wrappers around all are found as prefixes."""
_INERT = re.compile(
    r"(argparse|numpy|omegaconf|pytorch_lightning|lightning|lightning_fabric|pathlib|yacs|easydict|ml_collections"
    r"|addict|typing|enum|datetime|uuid|collections|copyreg|torch\.optim|torch\.torch_version)\..+"
    r"|_codecs\.encode|builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|set|slice|str|tuple)"
)
"""Names of the settings and numbers that published checkpoints hold besides tensors; stand-ins are read for them."""
_TORCHS = re.compile(
    r"torch\.(\w+|(cuda|_utils|_tensor|storage)\.\w+|nn\.parameter\.Parameter|serialization\._get_layout)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)
"""Names of which torch's safe load decides itself."""


@dataclass(frozen=True)
class Contents:
    """The content of a file of weights.

    Attributes:
        tensors: Its tensors by their names; names within nested dicts are joined by dots.
        values: Its other top-level entries that are text or numbers.
    """

    tensors: dict[str, Tensor]
    values: dict[str, str | int | float]


class _StandIn:
    """Replacement of an object of another library in a checkpoint: it ignores its content and executes nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Return an empty dict instead of a `defaultdict`, which a safe load cannot fill."""
    return {}


def read_contents(path: Path) -> Contents:
    """Return the tensors of a file of weights, or of a folder of `torch.distributed.checkpoint`; names do not matter.

    Raises:
        ConfigError: If there is no such file, and its name is not that of a file of weights.
        DataError: If it is not a file of weights, is damaged, or holds objects that cannot be read without code.
    """
    if not path.exists() and path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} does not exist: weights come from {KINDS}.")
    try:
        if is_sharded(path):
            from inbatch.models.sharded_weights import read_sharded  # imports a part of torch that few need

            loaded: Any = read_sharded(path / INDEX)
        else:
            loaded = _load_indexed(path) if is_index(path) else _load(path)
        if not isinstance(loaded, Mapping):
            raise DataError(f"it holds a {type(loaded).__name__} instead of named tensors. {_SAVE}")
        tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in _named(loaded)}
        if not tensors:
            raise DataError(f"it holds no tensors. {_SAVE}")
    except DataError as error:
        raise DataError(f"{path} cannot be read as weights: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read as weights: {error.strerror or reason(error)}") from None
    except Exception as error:  # a crafted file makes a reader raise any exception; torch's text advises an unsafe load
        kind = type(error).__name__
        raise DataError(
            f"{path} cannot be read as weights: it is damaged ({kind}). Copy or download it again"
        ) from error
    return Contents(tensors, {str(k): v for k, v in loaded.items() if isinstance(v, str | int | float)})


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder that `torch.distributed.checkpoint` wrote."""
    return (path / INDEX).is_file()


def is_index(path: Path) -> bool:
    """Return whether a file is JSON, as the index of transformers is that names the files of a model."""
    with path.open("rb") as file:
        head = file.read(9)
    return head.lstrip()[:1] == b"{" and head[8:] != b"{"  # a file of safetensors has its header there


def indexed_files(path: Path) -> dict[str, list[str]]:
    """Return the files that an index names, and the names of the tensors in each; DataError if it is not an index."""
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        named = [(str(name), str(file)) for name, file in places.items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DataError(
            'it is JSON, but not an index of weights with a "weight_map". Pass the file of weights'
        ) from None
    files: dict[str, list[str]] = {}
    for name, file in named:
        if PurePath(file).name != file:
            raise DataError(f"its index names a file outside of the folder: {file}. Put all files of the model into it")
        files.setdefault(file, []).append(name)
    return files


def _load_indexed(path: Path) -> dict[str, Any]:
    """Return the tensors of an index from the files next to it."""
    tensors: dict[str, Any] = {}
    for file, names in indexed_files(path).items():
        place = path.parent / file
        if not place.is_file():
            raise DataError(f"its index names {file}, which is not in the same folder. Download all files of the model")
        try:
            part = _load(place)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        except safetensors.SafetensorError:
            raise DataError(f"{file} is damaged. Copy or download it again") from None
        if not isinstance(part, Mapping):
            raise DataError(f"{file} holds a {type(part).__name__} instead of named tensors. {_SAVE}")
        if missing := [name for name in names if name not in part]:
            raise DataError(
                f"{file} lacks {listed(missing, 3)}, which its index places there. Download all files of the model"
            )
        tensors |= {name: part[name] for name in names}
    return tensors


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise DataError("it is empty. Copy or download it again")
        if head[4:9] == b"\0\0\0\0{":  # before all others: the length of its header can begin as a pickle or a zip file
            return safetensors.torch.load_file(path)
        for offset, beginning, sentence in _BEGINNINGS:
            if head[offset:].startswith(beginning):
                raise DataError(sentence)
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - 8))
        if file.read(8) == _TENSORFLOW:
            raise DataError(_OF_TENSORFLOW)
        file.seek(0)
        if head.startswith(b"PK"):
            return _load_torch(path, _names_in_archive(file))
        if head.startswith(b"\x80"):
            return _load_torch(path, _names_in_pickles(file), mapped=False)
    if head[8:9] == b"{":  # damaged: no header is this long
        return safetensors.torch.load_file(path)
    if b".data-0" in path.name.encode() or head.startswith(b"model_checkpoint_path:"):
        raise DataError(_OF_TENSORFLOW)
    raise DataError(f"it is neither a file of safetensors nor one of torch.save. {_SAVE}")


def _load_torch(path: Path, names: set[str], mapped: bool = True) -> Any:
    """Return the content of a file of torch.save that refers to these classes and functions."""
    refused = sorted(name for name in names if not _INERT.fullmatch(name))
    if refused:
        raise DataError(
            f"it holds objects that cannot be read without running code of others: {listed(refused, 3)}. In the "
            "program that wrote it, save only the weights: torch.save(model.state_dict(), FILE), or safetensors"
        )
    substitutes: list[Any] = [
        (_plain_dict if name == "collections.defaultdict" else _StandIn, name) for name in sorted(names)
    ]
    with torch.serialization.safe_globals(substitutes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickle protocols
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except OSError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise DataError(
                f"a safe load of its content fails ({kind}); it is damaged. Copy or download it again"
            ) from error


def _names_in_archive(file: BinaryIO) -> set[str]:
    """Return the classes and functions that a zip archive of torch.save refers to, except those that torch allows."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile:
        raise DataError("it is an incomplete or damaged archive. Copy or download it again") from None
    if any("/code/" in member or member.endswith("/constants.pkl") for member in members):
        raise DataError(
            "it is a TorchScript archive, which holds code. Load it with torch.jit.load where you trust it, and "
            "torch.save its state_dict()"
        )
    if members and all(member.endswith(".npy") for member in members):
        raise DataError(f"it is an archive of NumPy arrays (.npz), as JAX programs write it. {_CONVERT}")
    if not any(member.endswith("data.pkl") for member in members):
        raise DataError("it is a zip archive, but not one of torch.save. Unpack it, and pass the file of weights")
    file.seek(0)
    return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def _names_in_pickles(file: BinaryIO) -> set[str]:
    """Return the classes and functions that a file of torch.save before version 1.6 refers to, without executing it."""
    names: set[str] = set()
    texts: list[str] = []
    for _ in range(4):  # magic number, protocol, system, and the object; then come the tensors
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.add(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    renamed = {name.replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.") for name in names}
    return {name for name in renamed if not _TORCHS.fullmatch(name)}


def _named(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors of nested dicts and lists by their names, joined by dots."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_quantized and not value.is_meta and not value.is_complex():
            yield name, value.detach()
    elif depth < 12 and isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in parts:
            yield from _named(part, f"{name}.{key}" if name else str(key), depth + 1)
