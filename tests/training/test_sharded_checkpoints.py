"""Checkpoints of sharded runs: whole on another number of ranks, never taken half, and without a pickle."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_pool import on_ranks
from small_methods import create, optimizer_of
from torch import Tensor, nn

from inbatch.errors import InbatchError
from inbatch.models.network import Network
from inbatch.runtime import distributed, shard_files, sharding
from inbatch.training import checkpoint
from inbatch.training.sharded_state import assemble, divide


def parts(divided: bool, steps: int = 0) -> dict[str, Any]:
    """Return a network with uneven tensors and its optimiser after some steps, the same on every rank."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 7))
    network = Network(encoder, create("simclr").heads(7), ("projection",))
    if divided:
        sharding.shard(encoder, [encoder[2]], torch.device("cpu"))
    optimizer = optimizer_of("adamw", network)
    for number in range(steps):
        g = torch.Generator().manual_seed(number)
        network([torch.randn(6, 5, generator=g)])["projection"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"network": network, "optimizer": optimizer}


def numbers(state: Any) -> Any:
    """Return a state with arrays in place of tensors, gathered."""
    if isinstance(state, dict):
        return {key: numbers(x) for key, x in state.items()}
    if isinstance(state, list):
        return [numbers(x) for x in state]
    return sharding.whole(state).numpy().copy() if isinstance(state, Tensor) else state


def of(components: dict[str, Any]) -> dict[str, Any]:
    """Return the state of parts as a checkpoint holds it without shards."""
    state = {name: part.state_dict() for name, part in components.items()}
    plain, shards = divide(state)

    def read(targets: dict[str, Tensor]) -> None:
        for name, x in targets.items():
            x.copy_(sharding.whole(shards[name]))

    return numbers(assemble(plain, None, read))


def saved(folder: Path, steps: int, divided: bool = True) -> dict[str, Any]:
    components = parts(divided, steps)
    state = {name: part.state_dict() for name, part in components.items()}
    if divided or distributed.rank() == 0:
        checkpoint.save(folder, state, step=steps, best=steps == 2)
    return of(components)


def restored(folder: Path, divided: bool = True) -> tuple[int, str | None, dict[str, Any]]:
    components = parts(divided, 1)  # other values than those saved
    loaded = checkpoint.load(folder, parts=components)
    checkpoint.restore(components, loaded.state)
    return loaded.step, loaded.note, of(components)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(np.array_equal(a, b))


def there_and_back(folder: Path) -> dict[str, bool]:
    """Save and restore on these ranks, with and without shards; return what is as it should be."""
    first, second = saved(folder, 1), saved(folder, 2)
    results = {"same ranks": restored(folder)[0] == 2 and equal(restored(folder)[2], second)}
    third = saved(folder, 3)
    folders = sorted(path.name for path in folder.glob("shards-*"))
    results["unused folders are removed"] = folders == ["shards-00000002", "shards-00000003"]
    distributed.broadcast_object(None)
    if distributed.rank() == 0:
        victim = sorted((folder / "shards-00000003").glob("*.safetensors"))[-1]
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    distributed.broadcast_object(None)
    step, note, state = restored(folder)
    results["a damaged file of another rank"] = step == 2 and equal(state, second) and "previous.pt" in str(note)
    plain = saved(folder / "plain", 2, divided=False)
    results["without shards before"] = equal(restored(folder / "plain")[2], plain)
    results["states differ"] = not equal(first, second) and not equal(second, third)
    return results


def test_states_come_back_on_the_same_and_on_other_ranks(tmp_path: Path) -> None:
    for results in on_ranks(2, there_and_back, tmp_path):
        assert all(results.values()), results
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".pt", ".safetensors"}  # no index of DCP, which is a pickle
    alone = parts(False, 1)
    before = copy.deepcopy(of(alone))
    loaded = checkpoint.load(tmp_path, "previous.pt", parts=alone)
    checkpoint.restore(alone, loaded.state)
    expected = saved(tmp_path / "one", 2, divided=False)
    assert loaded.step == 2
    assert not equal(of(alone), before)
    close = [np.allclose(x, y, atol=1e-6) for x, y in zip(leaves(of(alone)), leaves(expected), strict=True)]
    assert all(close)
    whole = checkpoint.load(tmp_path, "best.pt")  # as `inbatch.load` reads an unfinished run
    assert whole.state["network"]["encoder.2.weight"].shape == (7, 3)


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict | list):
        items = [state[key] for key in sorted(state, key=str)] if isinstance(state, dict) else state
        return [leaf for x in items for leaf in leaves(x)]
    return [] if isinstance(state, str | bool | None) else [state]


@pytest.mark.parametrize("problem", ["folder", "file", "size"])
def test_a_checkpoint_that_lacks_its_shards_is_refused(tmp_path: Path, problem: str) -> None:
    payload = {"step": 1, "state": {"network": {"w": {"tensor in shards": "a", "shape": [2], "dtype": "float32"}}}}
    shards = {"folder": "shards-1", "files": {"a.safetensors": [1, "0" * 64]}}
    if problem == "folder":
        shards["folder"] = "../shards-1"
    if problem == "size":
        (tmp_path / "shards-1").mkdir()
        (tmp_path / "shards-1" / "a.safetensors").write_bytes(b"xx")
    checkpoint.save(tmp_path, payload["state"], step=1)
    real = checkpoint._read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_read", lambda *args: real(*args) | {"shards": shards})
        with pytest.raises(InbatchError, match="No checkpoint can be used"):
            checkpoint.load(tmp_path)


def test_a_crafted_file_of_shards_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x04crafted")
    with pytest.raises(ValueError, match="cannot be read"):
        shard_files.read(tmp_path, {"a": torch.zeros(2)})


def test_reading_shards_without_a_process_group_warns_of_nothing(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    read = torch.zeros(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard_files.read(tmp_path, {"a": read})
    assert read.tolist() == [1, 1]
