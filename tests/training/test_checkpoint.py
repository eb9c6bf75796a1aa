import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_pool import _context
from torch import nn

from inbatch.errors import ConfigError, InbatchError
from inbatch.runtime import files
from inbatch.training import checkpoint


def state(step):
    return {
        "model": {"weight": torch.full((300, 40), float(step)), "count": torch.tensor(step)},
        "queue": [torch.arange(step + 3), {"pointer": step, "name": "q", "none": None, "pair": (1, 2.5)}],
    }


def assert_whole(loaded):
    step, model = loaded.step, loaded.state["model"]
    assert torch.equal(model["weight"], torch.full((300, 40), float(step))) and model["count"] == step
    assert torch.equal(loaded.state["queue"][0], torch.arange(step + 3))
    assert loaded.state["queue"][1] == {"pointer": step, "name": "q", "none": None, "pair": (1, 2.5)}


@pytest.fixture
def two(tmp_path):
    """Return a folder with `previous.pt` at step 1 and `last.pt` at step 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), step=step)
    return tmp_path


def test_last_previous_and_best(tmp_path):
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        checkpoint.save(tmp_path, state(step), step=step, best=best)
    for name, step in (("last.pt", 4), ("previous.pt", 3), ("best.pt", 2)):
        loaded = checkpoint.load(tmp_path, name)
        assert (loaded.step, loaded.path, loaded.note) == (step, tmp_path / name, None)
        assert_whole(loaded)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_torch_and_zip_tools_open_the_file(two):
    assert torch.load(two / "last.pt", weights_only=True)["step"] == 2
    assert subprocess.run([sys.executable, "-m", "zipfile", "-t", two / "last.pt"], check=False).returncode == 0


def test_training_state_survives_bit_for_bit(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer}
    saved = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.save(tmp_path, saved | {"rng": torch.get_rng_state()}, step=1)
    loaded = checkpoint.load(tmp_path).state
    assert torch.equal(loaded.pop("rng"), torch.get_rng_state())

    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fresh = torch.optim.AdamW(other.parameters())
    checkpoint.restore({"model": other, "optimizer": fresh}, loaded)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for a, b in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("captured", [False, True])
def test_the_network_of_earlier_versions_is_read(tmp_path, captured):
    state = {"tower": {"weight": torch.arange(3)}, "method": {}}
    checkpoint.save(tmp_path, {"parts": state} if captured else state, step=1)
    loaded = checkpoint.load(tmp_path).state
    parts = loaded["parts"] if captured else loaded
    assert parts.keys() == {"network", "method"} and parts["network"]["weight"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("key", ["0.weight", "1.running_mean", "1.num_batches_tracked"])
def test_a_missing_tensor_is_named(tmp_path, key):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    saved = model.state_dict()
    del saved[key]
    checkpoint.save(tmp_path, {"model": saved}, step=1)
    with pytest.raises(InbatchError, match=f"'model'(?s:.*){key}"):
        checkpoint.restore({"model": model}, checkpoint.load(tmp_path).state)


def test_a_missing_part_is_named():
    with pytest.raises(InbatchError, match="missing queue, target, too much head"):
        checkpoint.restore({"model": nn.ReLU(), "queue": None, "target": None}, {"model": {}, "head": {}})


# Fault 1: killed while saving.


def save_forever(folder, first):
    """Save without end, with random delays of every write and every file system operation."""
    rng = random.Random(first)

    def slow(call, seconds):
        def slowly(*arguments):
            time.sleep(rng.random() * seconds)
            result = call(*arguments)
            time.sleep(rng.random() * seconds)
            return result

        return slowly

    checkpoint._Hashing.write = slow(checkpoint._Hashing.write, 0.001)
    files.os.fsync, files.os.replace = slow(os.fsync, 0.01), slow(os.replace, 0.03)
    with files.locked(folder):
        for step in range(first, first + 1000):
            checkpoint.save(folder, state(step), step=step)


def test_killed_while_saving(two):
    rng, step, stuck = random.Random(0), 2, 0
    for _ in range(8):
        process = _context.Process(target=save_forever, args=(two, step + 1))
        process.start()
        while checkpoint.load(two).step == step:  # saving has started
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = checkpoint.load(two)
        assert_whole(loaded)
        assert loaded.step > step
        step = loaded.step
        stuck += len(list(two.glob(".*.tmp")))
    assert stuck > 0, "no kill fell into a save: the test has lost its point"
    with files.locked(two) as note:
        assert "ended without finishing" in note
    assert sorted(p.name for p in two.iterdir()) == ["last.pt", "previous.pt", "run.lock"]


def test_killed_between_the_two_renames(two, monkeypatch, left=2):
    real = os.replace

    def die_at_the_second(source, target):
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(two, state(3), step=3)
    loaded = checkpoint.load(two)
    assert loaded.step == left and "last.pt is missing" in loaded.note
    assert_whole(loaded)


def test_best_is_written_again_after_a_kill_between_best_and_last(two, monkeypatch):
    real = os.replace

    def die_after_best(source, target):
        real(source, target)
        if Path(target).name == "best.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", die_after_best)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(two, state(3), step=3, best=True)
    assert checkpoint.load(two).step == 2, "what is resumed knows of a best that is not there"
    checkpoint.save(two, state(3), step=3, best=True)
    assert checkpoint.load(two, "best.pt").step == checkpoint.load(two).step == 3
    assert (two / "best.pt").read_bytes() == (two / "last.pt").read_bytes()


# Fault 2: the disk is full.


@contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1, 30_000, -100, -1], ids=["open", "body", "end of body", "checksum"])
def test_disk_full(two, size):
    before = {p.name: p.read_bytes() for p in two.iterdir()}
    if size < 0:
        size += len(before["last.pt"])
    with file_size_limit(size), pytest.raises(InbatchError, match=r"last\.pt: File too large \(.* MB are free"):
        checkpoint.save(two, state(3), step=3)
    assert {p.name: p.read_bytes() for p in two.iterdir()} == before


def test_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InbatchError, match=r"Cannot write .*last\.pt: Not a directory"):
        checkpoint.save(tmp_path / "file", state(1), step=1)


# Fault 3: a damaged file.


def flip(data):
    return [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 700, len(data) // 2, -70, -66, -2)]


def damaged(data):
    return {f"flip {i}": d for i, d in enumerate(flip(data))} | {
        "truncated": data[:-1],
        "half": data[: len(data) // 2],
        "tail lost": data[:-66],
        "only a tail": data[-66:],
        "longer": data + b"\0",
        "empty": b"",
    }


@pytest.mark.parametrize("kind", damaged(bytes(1000)))
def test_previous_checkpoint_replaces_a_damaged_one(two, kind):
    last = two / "last.pt"
    last.write_bytes(damaged(last.read_bytes())[kind])
    loaded = checkpoint.load(two)
    assert loaded.step == 1 and loaded.path == two / "previous.pt"
    assert f"{last} is {'empty' if kind == 'empty' else 'damaged'}" in loaded.note
    assert "Resuming from" in loaded.note and "step 1" in loaded.note
    assert_whole(loaded)


def test_a_save_never_keeps_a_damaged_file_in_the_place_of_a_whole_one(two, monkeypatch):
    (two / "last.pt").write_bytes(b"x" * 100)
    checkpoint.set_aside(checkpoint.load(two))
    with monkeypatch.context() as patch:
        test_killed_between_the_two_renames(two, patch, left=1)
    checkpoint.save(two, state(4), step=4)
    (two / "last.pt").write_bytes(b"")  # damaged a second time
    assert checkpoint.load(two).step == 1 and (two / "damaged.pt").read_bytes() == b"x" * 100


def test_only_damaged_files(two):
    for name in ("last.pt", "previous.pt"):
        (two / name).write_bytes(b"x" * 100)
    with pytest.raises(InbatchError, match=r"last\.pt is damaged.*previous\.pt is damaged.*Start a new run"):
        checkpoint.load(two)


def test_missing_best_is_an_error(two):
    with pytest.raises(ConfigError, match=r"No checkpoint best\.pt"):
        checkpoint.load(two, "best.pt")


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"No checkpoint last\.pt in .*: pass the folder of a run"):
        checkpoint.load(tmp_path / "nowhere")


# Fault 4: a malicious file.


class Malicious:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_malicious_checkpoint_is_refused(two, tmp_path_factory, monkeypatch):
    sentinel = tmp_path_factory.mktemp("sentinel") / "executed"
    # An attacker can also compute a checksum.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: None)
        checkpoint.save(two, {"model": Malicious(sentinel)}, step=3)
    torch.load(two / "last.pt", weights_only=False)
    assert sentinel.exists(), "the file is not malicious: the test has lost its point"
    sentinel.unlink()

    loaded = checkpoint.load(two)
    assert loaded.step == 2 and "last.pt holds more than plain values" in loaded.note
    (two / "last.pt").write_bytes(pickle.dumps(Malicious(sentinel)))
    assert checkpoint.load(two).step == 2
    assert not sentinel.exists()


@pytest.mark.parametrize("value", [np.float64(0.5), np.zeros(2), Path("x")], ids=lambda v: type(v).__name__)
def test_state_that_could_not_be_loaded_is_not_saved(two, value):
    with pytest.raises(TypeError, match="plain values and tensors only"):
        checkpoint.save(two, {"value": value}, step=3)
    assert checkpoint.load(two).step == 2
    assert sorted(p.name for p in two.iterdir()) == ["last.pt", "previous.pt"]
