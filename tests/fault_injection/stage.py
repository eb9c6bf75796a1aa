"""Tools of the fault injection suite: small runs by the command line in processes of their own, and their results."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small_runs import assert_same_state, saved

WAIT = 180
"""Seconds to wait for an event, with a margin for a busy machine."""
DIGITS = ["--data", "digits-canvas", "--set", "subset=200", "--batch", "40", "--context", "20"]  # 5 steps an epoch
INBATCH = [sys.executable, "-m", "inbatch"]
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
    "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
]  # fmt: skip
MAIN = "from inbatch.apps.cli import main\nmain()\n"


@dataclass(frozen=True)
class Injection:
    """One fault. act: inject it in an empty folder and return the results.

    expected: required results by name; for `says`, words that the output must contain.
    quick: also run by the tests.
    """

    number: int
    fault: str
    injected: str
    expected: dict[str, Any]
    act: Callable[[Path], dict[str, Any]]
    quick: bool = False


@dataclass
class Ended:
    """Result of a process that has ended."""

    code: int
    out: str
    err: str

    @property
    def seen(self) -> dict[str, Any]:
        return {"exit": self.code, "says": self.out + self.err}


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "INBATCH_CACHE": "off", "COLUMNS": "200"} | more


def start(words: Sequence[str], *, by: Sequence[str] = INBATCH, **options: Any) -> subprocess.Popen[str]:
    """Start a process without waiting for it; bytes that are not valid text are kept as escapes."""
    options = {"env": environment()} | options
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*by, *words], text=True, errors="backslashreplace", **(pipes | options))


def end(process: subprocess.Popen[str], seconds: float = WAIT) -> Ended:
    """Wait for the end of a process; fail if it does not end."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it did not end in {seconds:.0f} seconds") from None
    return Ended(process.returncode, out or "", err or "")


def run(words: Sequence[str], **options: Any) -> Ended:
    return end(start(words, **options))


def script(folder: Path, name: str, text: str) -> list[str]:
    """Write a Python program to be started instead of `python -m inbatch`."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return [str(path)]


def pretrain(
    out: Path, *words: str, method: str = "simclr", epochs: int = 2, data: Sequence[str] = DIGITS, quiet: bool = True
) -> list[str]:
    """Return the command line of a small run."""
    fixed = ["--epochs", str(epochs), "--set", f"evaluate_every={epochs}", *(["--quiet"] if quiet else [])]
    return ["pretrain", method, *data, *fixed, "--out", str(out), *words]


@contextmanager
def going(out: Path, *words: str, lines: int = 6, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Yield an unlimited run after it has logged this many lines; end all of its processes afterwards."""
    by = {key: options.pop(key) for key in ("by", "env", "start_new_session", "preexec_fn") if key in options}
    began = time.time()
    process = start(pretrain(out, *words, epochs=options.pop("epochs", 4000), **options), **by)
    log = out / "metrics.jsonl"
    try:
        until(
            lambda: (
                process.poll() is not None
                or (log.exists() and log.stat().st_mtime > began and len(log.read_text().splitlines()) >= lines)
            ),
            "it did not begin to train",
        )
        assert process.poll() is None, f"it ended with {process.returncode}: {end(process).err[-500:]}"
        yield process
    finally:
        for pid in processes(out):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()


def until(true: Callable[[], bool], otherwise: str, seconds: float = WAIT, tick: float = 0.05) -> None:
    """Wait until a condition holds."""
    stop = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < stop, f"{otherwise} in {seconds:.0f} seconds"
        time.sleep(tick)


def processes(out: Path) -> list[int]:
    """Return the processes whose command line names the run directory: the run, launcher, ranks and data workers."""
    pids = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in file.read_bytes().split(b"\0"):
                pids.append(int(file.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return pids


def orphans(out: Path, seconds: float = 30) -> int:
    """Return the number of processes of a run that are left after some time."""
    stop = time.monotonic() + seconds
    while (left := processes(out)) and time.monotonic() < stop:
        time.sleep(0.2)
    return len(left)


def below(pid: int) -> list[int]:
    """Return the child processes of a process."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                children.append(int(stat.parent.name))
        except OSError:
            continue
    return children


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def steps(out: Path) -> list[int]:
    """Return the steps of a run's log that contain a loss."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def same(a: Path, b: Path) -> str:
    """Return whether two runs left the same state and encoder."""
    try:
        assert_same_state(saved(a), saved(b))
    except AssertionError as error:
        return f"differ in {error}"
    files = ("encoder/model.safetensors", "encoder/config.json")
    return "equal" if all((a / f).read_bytes() == (b / f).read_bytes() for f in files) else "encoders differ"


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def pictures(folder: Path, count: int = 60, size: int = 24) -> Path:
    """Write a folder of small images, all different."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


def images(folder: Path, *words: str) -> list[str]:
    """Return the options to train on that folder."""
    tiny = ["--encoder", "tiny", "--batch", "20", "--set", "image_size=20"]
    tiny += ["--set", "preset=none", "--set", "schedule.warmup_epochs=0"]
    return ["--data", str(folder), *tiny, *words]
