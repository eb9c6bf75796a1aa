"""Save and load checkpoints: one file each, with plain values and tensors only, and its checksum inside.

A directory holds `last.pt`, `previous.pt` and `best.pt`. Each is a zip archive as `torch.save` writes it, with the
SHA-256 of its bytes as the archive's comment. `torch.load(path, weights_only=True)` opens it, and a file cannot be
separated from its checksum.

Tensors that are divided over ranks are in a folder `shards-STEP` of safetensors files, one per rank, that is complete
before the checkpoint with the names and checksums of these files is.
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from inbatch.errors import ConfigError, InbatchError, listed
from inbatch.runtime import distributed
from inbatch.runtime.files import replacing
from inbatch.training.checkpoint_contents import problems_in
from inbatch.training.checkpoint_shards import check_shards, names_shards, remove_unused, write_shards
from inbatch.training.sharded_state import assemble, divide, is_divided

LAST, PREVIOUS, BEST, DAMAGED = "last.pt", "previous.pt", "best.pt", "damaged.pt"

# A zip archive ends with the length of its comment (two bytes) and the comment; torch writes an empty one.
_NO_COMMENT = b"\0\0"
_COMMENT = (64).to_bytes(2, "little")
_TAIL = len(_COMMENT) + 64
_EARLIER = "tower"
"""Name of the part "network" in checkpoints of earlier versions."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        state: Saved state.
        step: Number of completed steps.
        path: The file.
        note: A sentence for the user if it is not the requested file.
        run: What the run was computed with (`checkpoint_recipe.run_facts`); empty in files of earlier versions.
    """

    state: dict[str, Any]
    step: int
    path: Path
    note: str | None
    run: dict[str, Any] = field(default_factory=dict)


class _Hashing:
    """A file for `torch.save` that hashes its data and keeps the OSError that torch would replace by its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(
    directory: Path, state: dict[str, Any], *, step: int, best: bool = False, run: Mapping[str, Any] | None = None
) -> Path:
    """Write `last.pt` and keep the one before as `previous.pt`; with `best`, also write `best.pt`.

    At every moment at least one of `last.pt` and `previous.pt` is complete. If an error is raised, both are unchanged.

    Args:
        directory: Directory of the checkpoints.
        state: Tensors and plain Python values, in dicts and lists. If some are divided over ranks, every rank must call
            this, and rank 0 writes the file; otherwise rank 0 alone.
        step: Number of completed steps.
        best: Whether this is the best checkpoint so far.
        run: What the run is computed with (`checkpoint_recipe.run_facts`).

    Returns:
        The path of `last.pt`.

    Raises:
        InbatchError: If the file cannot be written.
        TypeError: If the state holds something that a safe load (`weights_only=True`) would refuse.
    """
    last = directory / LAST
    state, shards = divide(state)
    payload = {"step": step, "state": state, "run": dict(run or {})}
    if shards:
        payload["shards"] = write_shards(directory, step, shards)
        if distributed.rank():
            return last
    with replacing(last, keep=directory / PREVIOUS) as file:
        hashing = _Hashing(file)
        try:
            torch.save(payload, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.flush()
        try:
            torch.load(file.name, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise TypeError(f"A checkpoint holds plain values and tensors only: {error}") from None
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_COMMENT + hashing.sha256.hexdigest().encode())
        if best:  # before `last.pt`, which refers to it: after a kill in between, the best is determined again
            file.seek(0)
            with replacing(directory / BEST) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
    if shards:
        remove_unused(directory, (LAST, PREVIOUS, BEST, DAMAGED))
    return last


def load(
    directory: Path, name: str = LAST, *, mapped: bool = False, parts: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Read `last.pt` to the CPU; if it is missing or damaged, read `previous.pt` and state so in `note`.

    No content of a file is ever executed.

    Args:
        directory: Directory of the checkpoints.
        name: Another file of the directory, which has no fallback.
        mapped: Map the tensors to memory instead of reading them, to use the plain values alone.
        parts: Parts of the run that is to be restored, by name: the tensors are divided over ranks as those of the
            parts, every rank must call this, and all get the same file. By default, they are whole.

    Raises:
        ConfigError: If there is no checkpoint.
        InbatchError: If all checkpoints are damaged.
    """
    candidates = [directory / file for file in ((LAST, PREVIOUS) if name == LAST else (name,))]
    if not any(path.exists() for path in candidates):
        raise ConfigError(f"No checkpoint {name} in {directory}: pass the folder of a run that has saved one")
    problems: list[str] = []
    for path in candidates:
        try:
            payload = _read_together(path, mapped, parts)
        except (OSError, ValueError) as error:
            problems.append(f"{path} {error}")
            continue
        note = f"{'; '.join(problems)}. Resuming from {path}, step {payload['step']}." if problems else None
        return Checkpoint(payload["state"], payload["step"], path, note, payload.get("run", {}))
    raise InbatchError(f"No checkpoint can be used: {'; '.join(problems)}. Start a new run.")


def set_aside(loaded: Checkpoint) -> None:
    """Rename a damaged `last.pt` to `damaged.pt` if `previous.pt` was loaded instead.

    Otherwise the next `save` would replace `previous.pt`, the only complete checkpoint, by the damaged file.
    """
    last = loaded.path.with_name(LAST)
    if loaded.path != last and last.exists():
        os.replace(last, loaded.path.with_name(DAMAGED))


def _read_together(path: Path, mapped: bool, parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the payload of a file with its tensors; if it is for the parts of a run, on all ranks or on none."""
    payload, problem = dict[str, Any](), None
    try:
        payload = _read(path, mapped or (parts is not None and is_divided(parts)))
        if "shards" in payload and not mapped:
            check_shards(path, payload["shards"], shared=parts is not None)
    except (OSError, ValueError) as error:
        problem = error
    if parts is not None and distributed.all_reduce_max(int(problem is not None)) and problem is None:
        problem = ValueError("cannot be read by another rank")
    if problem is not None:
        raise problem
    if not mapped and ("shards" in payload or (parts is not None and is_divided(parts))):
        from inbatch.runtime import shard_files  # imports DCP, which takes a second

        folder = path.with_name(str(payload.get("shards", {}).get("folder")))
        payload["state"] = assemble(payload["state"], parts, lambda tensors: shard_files.read(folder, tensors))
    return payload


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    """Return the payload of a file; raise ValueError with the problem if it is invalid."""
    if not path.exists():
        raise ValueError("is missing")
    size = path.stat().st_size
    with open(path, "rb") as file:
        sha256, left = hashlib.sha256(), size - _TAIL
        while left > 0:
            block = file.read(min(left, 1 << 20))
            sha256.update(block)
            left -= len(block)
        sha256.update(_NO_COMMENT)
        if file.read() != _COMMENT + sha256.hexdigest().encode():
            raise ValueError(f"is damaged ({size:,} bytes, and their checksum is wrong)" if size else "is empty")
    try:
        payload = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:  # a crafted file can make torch's reader raise any exception
        raise ValueError(f"holds more than plain values and tensors, and is refused ({error})") from None
    kinds = {key: type(value) for key, value in payload.items()} if isinstance(payload, dict) else {}
    # earlier versions have no "run"
    if {"run": dict, "shards": dict} | kinds != {"step": int, "state": dict, "run": dict, "shards": dict}:
        raise ValueError("is not a checkpoint of a run")
    if "shards" in payload and not names_shards(payload["shards"]):
        raise ValueError("is not a checkpoint of a run: its shards have other names")
    if payload["step"] < 0:
        raise ValueError(f"is not a checkpoint of a run: its step is {payload['step']}")
    for state in (payload["state"], payload["state"].get("parts")):  # "parts" is that of a captured step
        if isinstance(state, dict) and _EARLIER in state and "network" not in state:
            state["network"] = state.pop(_EARLIER)
    return payload


def restore(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Load the saved state of every part through its own `load_state_dict`.

    Raises:
        InbatchError: If entries are missing or unexpected, in the whole state or within a part, or have another type,
            shape or range (`checkpoint_contents`); it lists them. No part has been changed then.
    """
    missing, extra = [k for k in parts if k not in state], [k for k in state if k not in parts]
    if missing or extra:
        raise InbatchError(
            f"The checkpoint does not fit this run: missing {', '.join(missing) or 'nothing'}, "
            f"too much {', '.join(extra) or 'nothing'}. Resume with the recipe that it was saved with."
        )
    if problems := problems_in(parts, state):
        raise InbatchError(
            f"The checkpoint does not fit this run {listed(problems, separator='; ')}. Resume with the recipe that it "
            "was saved with, or start a new run."
        )
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InbatchError(f"The checkpoint does not fit this run in {name!r}: {error}") from error
