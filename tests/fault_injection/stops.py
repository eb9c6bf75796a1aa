"""Faults 5 to 8, 14 and 23: a signal, a kill or a hang, in one process, in a rank, in a data worker."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from inbatch.errors import InbatchError
from inbatch.training import checkpoint

from .stage import (
    INBATCH,
    MAIN,
    TORCHRUN,
    Injection,
    below,
    end,
    going,
    images,
    orphans,
    pictures,
    pretrain,
    processes,
    report,
    run,
    script,
    steps,
)

AT = (
    """
import os, signal, sys, time
from inbatch.training.metric_logger import Log
real = Log.step
def step(self, at, *rest):
    real(self, at, *rest)
    if at == {at} and {when}:
        {what}
Log.step = step
"""
    + MAIN
)
"""The program with an action at one step, on every rank; `when` can select a rank."""


def whole(out: Path) -> str:
    """Return whether the checkpoint is of the step at which the run reports that it stopped."""
    try:
        step = checkpoint.load(out / "checkpoints").step
    except InbatchError as error:
        return str(error)
    last_step = report(out)["last_step"]
    return "of the last step" if step == last_step > 0 else f"of step {step}, not {last_step}"


def asked(number: int, to: str, folder: Path) -> dict[str, Any]:
    """Send a signal to the process, to one rank, or to the launcher."""
    out, by = folder / "run", INBATCH if to == "process" else [*TORCHRUN, "-m", "inbatch"]
    with going(out, by=by) as process:
        target = process.pid
        if to == "one rank":
            target = next(pid for pid in below(process.pid) if pid in processes(out))
        os.kill(target, number)
        ended = end(process)
        left = orphans(out)
    return ended.seen | {"status": report(out)["status"], "checkpoint": whole(out), "processes left": left}


def twice(folder: Path) -> dict[str, Any]:
    out = folder / "run"
    with going(out) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = end(process).code
    # The second signal may arrive after the process has saved and restored the default signal handlers.
    return {"exit": 75 if code == -signal.SIGTERM else code, "checkpoint": whole(out)}


def three_interrupts(folder: Path) -> dict[str, Any]:
    """The first interrupt is handled within a step of many seconds; the third ends the process."""
    out, words = folder / "run", ["--encoder", "resnet18", "--batch", "1280", "--context", "1280"]
    with going(out, *words, data=["--data", "digits-canvas"], lines=2) as process:
        for _ in range(3):
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code = end(process).code
    return {"exit": 130 if code == -signal.SIGINT else code, "at once": time.monotonic() - began < 5}


def rank_fails(what: str, folder: Path) -> dict[str, Any]:
    out = folder / "run"
    text = AT.format(at=3, when="os.environ['RANK'] == '1'", what=what)
    words = pretrain(out, "--dist-timeout", "10", epochs=400)
    began = time.monotonic()
    ended = run(words, by=[*TORCHRUN, *script(folder, "fails", text)])
    in_time = time.monotonic() - began < 120
    return ended.seen | {"in time": in_time, "processes left": orphans(out)}


def ranks_disagree(folder: Path) -> dict[str, Any]:
    text = "import os, sys\nsys.argv += ['--seed', os.environ['RANK']]\n" + MAIN
    return run(pretrain(folder / "run"), by=[*TORCHRUN, *script(folder, "seeds", text)]).seen


def worker_killed(folder: Path) -> dict[str, Any]:
    out = folder / "run"
    with going(out, "--workers", "1", "--set", "cache_on_device=false") as process:
        for pid in below(process.pid):
            os.kill(pid, signal.SIGKILL)
        return end(process).seen


def no_shared_memory(folder: Path) -> dict[str, Any]:
    """Run in a mount namespace where /dev/shm holds 64 kB."""
    data = images(
        pictures(folder / "images", size=64),
        "--workers",
        "1",
        "--set",
        "cache_on_device=false",
        "--set",
        "image_size=64",
    )
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"'
    return run(pretrain(folder / "run", data=data), by=["unshare", "-m", "sh", "-c", mount, *INBATCH]).seen


def restarted(at: int, folder: Path) -> dict[str, Any]:
    """Both ranks exit once, at a step, and torchrun restarts them."""
    out, once = folder / "run", folder / "died"
    when = f"not os.path.exists({str(once)!r} + os.environ['RANK'])"
    what = f"open({str(once)!r} + os.environ['RANK'], 'w').close(); os._exit(9)"
    by = [*TORCHRUN, "--max-restarts", "1", *script(folder, "dies", AT.format(at=at, when=when, what=what))]
    ended = run(pretrain(out, "--resume", "auto", epochs=4), by=by)
    logged = steps(out) if ended.code == 0 else []
    return ended.seen | {"status": report(out)["status"], "steps logged": logged}


PREEMPTED = {"status": "preempted", "checkpoint": "of the last step", "processes left": 0}

INJECTIONS = [
    *(
        Injection(
            5, "a signal to stop", f"{name} to the process",
            {"exit": code, "says": ("checkpoint saved",)} | PREEMPTED | status, partial(asked, number, "process"),
        )
        for name, number, code, status in (
            ("SIGTERM", signal.SIGTERM, 75, {}), ("SIGUSR1", signal.SIGUSR1, 75, {}),
            ("SIGHUP", signal.SIGHUP, 75, {}), ("SIGUSR2", signal.SIGUSR2, 75, {}),
            ("SIGXCPU", signal.SIGXCPU, 75, {}),
            ("SIGINT", signal.SIGINT, 130, {"status": "interrupted"}),
        )
    ),
    *(
        Injection(
            5, "a signal to stop, 2 ranks", f"{signal.Signals(number).name} to {to}",
            {"exit": 1} | PREEMPTED, partial(asked, number, to),
        )
        for number, to in (
            (signal.SIGTERM, "torchrun"), (signal.SIGUSR1, "torchrun"), (signal.SIGTERM, "one rank")
        )
    ),
    Injection(
        6, "a second signal", "SIGTERM twice, 0.1 s apart", {"exit": 75, "checkpoint": "of the last step"}, twice
    ),
    Injection(
        6, "Ctrl-C three times", "SIGINT three times in a step", {"exit": 130, "at once": True}, three_interrupts,
    ),
    Injection(
        7, "a rank dies", "os._exit(9) on rank 1; --dist-timeout 10",
        {"exit": 1, "in time": True, "processes left": 0, "says": ("rank 1",)}, partial(rank_fails, "os._exit(9)"),
    ),
    Injection(
        7, "a rank hangs", "sleep on rank 1; --dist-timeout 10",
        {"exit": 1, "in time": True, "processes left": 0, "says": ("rank 1", "--dist-timeout")},
        partial(rank_fails, "time.sleep(1000)"),
    ),
    Injection(
        8, "ranks disagree", "another --seed on each",
        {"exit": 1, "says": ("rank 1 has a different one from rank 0", "exitcode : 2")}, ranks_disagree,
    ),
    Injection(14, "a data worker killed", "SIGKILL", {"exit": 1, "says": ("--workers 0",)}, worker_killed),
    Injection(14, "no shared memory", "/dev/shm of 64 kB", {"exit": 1, "says": ("--workers 0",)}, no_shared_memory),
    Injection(
        23, "torchrun starts again", "both ranks die at step 12; --max-restarts 1 --resume auto",
        {"exit": 0, "status": "finished", "steps logged": [1, 10, 20]}, partial(restarted, 12),
    ),
    Injection(
        23, "torchrun starts again", "both ranks die before the first checkpoint",
        {"exit": 0, "status": "finished", "steps logged": [1, 10, 20]}, partial(restarted, 3),
    ),
]  # fmt: skip
