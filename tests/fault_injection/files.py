"""Faults 1 to 4 and 15 to 17: partial, damaged and malicious files, and files of other runs or users."""

import json
import os
import pickle
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inbatch.training import checkpoint

from .stage import (
    MAIN,
    TORCHRUN,
    Ended,
    Injection,
    copied,
    end,
    going,
    orphans,
    pretrain,
    report,
    run,
    same,
    script,
    steps,
    until,
)


def stopped(out: Path, *words: str, epochs: int = 40) -> Path:
    """Return the directory of a run that was stopped by a signal, with two checkpoints."""
    with going(out, *words, epochs=epochs, method="moco") as process:
        until(lambda: (out / "checkpoints" / "previous.pt").exists(), "no second checkpoint came", tick=0.01)
        process.send_signal(signal.SIGTERM)
        ended = end(process)
    assert ended.code == 75, ended.seen
    return out


def whole(out: Path, *words: str, epochs: int = 40) -> Path:
    """Return the directory of the same run without interruption."""
    ended = run(pretrain(out, *words, epochs=epochs, method="moco"))
    assert ended.code == 0, ended.err
    return out


def resumed(out: Path, *words: str, **options: Any) -> Ended:
    return run(["pretrain", "--resume", str(out), *words], **options)


def killed_while_saving(folder: Path) -> dict[str, Any]:
    out, halves = folder / "killed", 0
    for _ in range(4):
        with going(out, "--resume", "auto", epochs=200, method="moco", lines=3) as process:
            until(lambda: (out / "checkpoints" / "last.pt").exists(), "no checkpoint was saved", tick=0.0003)
            until(lambda: bool(list(out.glob("checkpoints/.*.tmp"))), "no second checkpoint was begun", tick=0.0003)
            process.kill()
            end(process)
        halves += len(list(out.glob("checkpoints/.*.tmp")))
    assert halves, "no kill fell into a save"
    ended = resumed(out, "--quiet")
    left = len(list(out.rglob(".*.tmp")))
    return ended.seen | {"state": same(out, whole(folder / "whole", epochs=200)), "half-written files": left}


def disk_full(folder: Path) -> dict[str, Any]:
    out = stopped(folder / "run")
    before = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    size = len(before["last.pt"]) // 2
    full = resumed(out, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)))
    after = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    return full.seen | {"checkpoints": "untouched" if before == after else "changed"}


def no_folder(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("in the way")
    return run(pretrain(folder / "file" / "run")).seen


def damaged(kind: str, folder: Path) -> dict[str, Any]:
    out = stopped(folder / "run")
    last = out / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes({"flipped": bytes(data), "truncated": bytes(data[:1000]), "emptied": b""}[kind])
    ended = resumed(out)
    return ended.seen | {"state": same(out, whole(folder / "whole"))}


class Malicious:
    """Pickle that runs a command when it is loaded."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


def malicious_checkpoint(folder: Path) -> dict[str, Any]:
    out, sentinel = stopped(folder / "run"), folder / "executed"
    real, torch.load = torch.load, lambda *_, **__: None  # the attacker's library checks nothing
    try:
        checkpoint.save(out / "checkpoints", {"network": Malicious(sentinel)}, step=3)
    finally:
        torch.load = real
    return resumed(out).seen | {"executed": sentinel.exists()}


def malicious_recipe(folder: Path) -> dict[str, Any]:
    file, sentinel = folder / "recipe.yaml", folder / "executed"
    file.write_text(f"epochs: !!python/object/apply:os.system ['touch {sentinel}']\n")
    return run(pretrain(folder / "run", "--config", str(file))).seen | {"executed": sentinel.exists()}


def malicious_weights(folder: Path) -> dict[str, Any]:
    file, sentinel = folder / "weights.pt", folder / "executed"
    file.write_bytes(pickle.dumps(Malicious(sentinel)))
    return run(pretrain(folder / "run", "--init", str(file))).seen | {"executed": sentinel.exists()}


def malicious_data(folder: Path) -> dict[str, Any]:
    file, sentinel = folder / "images.npy", folder / "executed"
    file.write_bytes(pickle.dumps(Malicious(sentinel)))
    words = pretrain(folder / "run", data=["--data", str(file)])
    return {"exit": run(words).code, "executed": sentinel.exists()}


def two_writers(folder: Path) -> dict[str, Any]:
    out = folder / "run"
    with going(out):
        return run(pretrain(out, "--overwrite")).seen


def stale_lock(folder: Path) -> dict[str, Any]:
    out = folder / "run"
    with going(out, epochs=40) as process:
        until(lambda: (out / "checkpoints" / "last.pt").exists(), "no checkpoint came", tick=0.01)
        process.kill()
        end(process)
    return resumed(out).seen


def resumed_twice(folder: Path) -> dict[str, Any]:
    out = stopped(folder / "run")
    with going(out, "--resume", "auto", epochs=40, method="moco", lines=steps(out)[-1] // 10 + 6) as process:
        process.send_signal(signal.SIGTERM)
        assert end(process).code == 75
    return {"exit": resumed(out).code, "state": same(out, whole(folder / "whole"))}


def at_an_epochs_end(folder: Path) -> dict[str, Any]:
    """Step 5 is the last of the first epoch of 5 steps."""
    at = f"""
    import os, signal
    from inbatch.training.metric_logger import Log
    real = Log.step
    def step(self, at, *rest):
        if at == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, at, *rest)
    Log.step = step
    {MAIN.replace(chr(10), chr(10) + "    ")}"""
    first = run(pretrain(folder / "run", method="moco"), by=[TORCHRUN[0], *script(folder, "at", at)])
    assert first.code == 75 and report(folder / "run")["last_step"] == 5, first.seen
    return {"exit": resumed(folder / "run").code, "state": same(folder / "run", whole(folder / "whole", epochs=2))}


def other_workers(folder: Path) -> dict[str, Any]:
    out = stopped(folder / "run", "--workers", "0", "--set", "cache_on_device=false")
    ended = resumed(out, "--workers", "2")
    return {"exit": ended.code, "state": same(out, whole(folder / "whole", "--set", "cache_on_device=false"))}


def other_world(folder: Path) -> dict[str, Any]:
    """Two ranks, then one: the same images in the same order, so the losses agree to rounding with one process."""
    out, one = folder / "run", ["--set", "precision=float32"]
    with going(out, *one, epochs=10, lines=3, by=[*TORCHRUN, "-m", "inbatch"]) as process:
        process.send_signal(signal.SIGTERM)
        end(process)
    assert report(out)["status"] == "preempted" and not orphans(out)
    code = resumed(out).code
    losses = [_last_loss(path) for path in (out, Path(_alone(folder / "whole", one)))]
    order = "same order" if abs(losses[0] - losses[1]) < 0.05 * losses[1] else f"losses {losses}"
    return {"exit": code, "images": order}


def _alone(out: Path, words: list[str]) -> Path:
    assert run(pretrain(out, *words, epochs=10)).code == 0
    return out


def _last_loss(out: Path) -> float:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line][-1]


def state_dropped(folder: Path) -> dict[str, Any]:
    out = stopped(folder / "run")
    keys = sorted(checkpoint.load(out / "checkpoints").state)
    named = []
    for key in keys:
        hurt = copied(out, folder / key)
        loaded = checkpoint.load(hurt / "checkpoints")
        del loaded.state[key]
        checkpoint.save(hurt / "checkpoints", loaded.state, step=loaded.step)
        (hurt / "checkpoints" / "previous.pt").unlink()
        ended = resumed(hurt)
        if ended.code == 1 and f"missing {key}" in ended.err and "Traceback" not in ended.err:
            named.append(key)
    return {"refused, and named": ", ".join(named)}


BITS = {"exit": 0, "state": "equal"}
QUIET = {"executed": False}

INJECTIONS = [
    Injection(
        1, "killed while saving", "SIGKILL when a half-written checkpoint is there, 4 times; --resume",
        BITS | {"half-written files": 0}, killed_while_saving,
    ),
    Injection(
        2, "disk full", "RLIMIT_FSIZE of half a checkpoint",
        {"exit": 1, "checkpoints": "untouched", "says": ("Cannot write", "last.pt", "MB are free")}, disk_full,
    ),
    Injection(
        2, "a folder that cannot be", "a file in its place", {"exit": 1, "says": ("Cannot write", "Not a directory")},
        no_folder, quick=True,
    ),
    *(
        Injection(
            3, f"a checkpoint {kind}", "last.pt edited; --resume",
            BITS | {"says": (word, "Resuming from", "previous.pt")}, partial(damaged, kind),
        )
        for kind, word in (("flipped", "is damaged"), ("truncated", "is damaged"), ("emptied", "is empty"))
    ),
    Injection(
        4, "a pickle as a checkpoint", "os.system in last.pt, its checksum right; --resume",
        QUIET | {"exit": 0, "says": ("holds more than plain values", "Resuming from")}, malicious_checkpoint,
    ),
    Injection(
        4, "code in a recipe", "a YAML tag !!python/object", QUIET | {"exit": 2, "says": ("is not valid YAML",)},
        malicious_recipe, quick=True,
    ),
    Injection(
        4, "a pickle as weights", "os.system in --init", QUIET | {"exit": 3, "says": ("weights.pt",)},
        malicious_weights, quick=True,
    ),
    Injection(4, "a pickle as data", "os.system in images.npy", QUIET | {"exit": 3}, malicious_data, quick=True),
    Injection(
        15, "two runs, one folder", "started twice", {"exit": 2, "says": ("is being written by process",)}, two_writers
    ),
    Injection(
        15, "a stale lock", "SIGKILL, then --resume",
        {"exit": 0, "says": ("was last written by process", "its lock is void")}, stale_lock,
    ),
    Injection(16, "resumed twice", "SIGTERM, SIGTERM", BITS, resumed_twice),
    Injection(16, "resumed at an epoch's end", "SIGTERM in its last step", BITS, at_an_epochs_end),
    Injection(16, "resumed with other data workers", "--workers 0, then 2", BITS, other_workers),
    Injection(16, "resumed by fewer processes", "2 ranks, then 1", {"exit": 0, "images": "same order"}, other_world),
    Injection(
        17, "state dropped", "each part deleted from last.pt in turn",
        {"refused, and named": "method, network, optimizer, progress, target"}, state_dropped,
    ),
]  # fmt: skip
