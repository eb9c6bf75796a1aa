"""No process is left after a command ends by a signal, a hang-up, or a kill."""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import source_trees
from source_trees import written

import inbatch
from inbatch.data import open_data, write_folder
from inbatch.runtime.child_processes import PARENT

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")

BOUND = 15.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)


def processes() -> dict[int, tuple[int, str]]:
    """Return process id -> parent and state."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        table[int(path.parent.name)] = int(parent), state
    return table


def below(pid: int) -> set[int]:
    """Return the running descendants of a process."""
    known = processes()
    descendants, new = set[int](), {pid}
    while new:
        new = {child for child, (parent, state) in known.items() if parent in new and state not in "ZX"} - descendants
        descendants |= new
    return descendants


def until(true: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def left(pids: set[int]) -> set[int]:
    """Return the processes that still run after a while; they are killed."""
    known: dict[int, tuple[int, str]] = {}

    def running() -> set[int]:
        nonlocal known
        known = processes()
        return {pid for pid in pids if known.get(pid, (0, "X"))[1] not in "ZX"}

    until(lambda: not running(), BOUND)
    remaining = running()
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    return remaining


def launch(words: list[str], folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start in a new session: a signal to it reaches no other process."""
    with open(folder / "console.txt", "a") as console:
        run = subprocess.Popen(
            [sys.executable, *words], stdout=console, stderr=console, text=True, start_new_session=True, cwd=folder,
            env=os.environ | {PARENT: str(os.getpid())} | environment,  # a command also ends with pytest
        )  # fmt: skip
    launched.append(run)
    return run


launched: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    """End all processes of a test, also if it fails."""
    yield
    while launched:
        run = launched.pop()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def script(tmp_path: Path, text: str, number: int = 0) -> list[str]:
    path = tmp_path / f"program{number}.py"
    path.write_text(text)
    return [str(path)]


SLEEPS = """
import multiprocessing, os, signal, time
def work(job):
    import torch
    from inbatch.runtime.child_processes import follow
    loader = torch.utils.data.DataLoader(range(9), num_workers=1, worker_init_fn=follow,
                                         multiprocessing_context="fork")
    batches = iter(loader)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)  # as between two rounds
    return (lambda: time.sleep(600)), {}
"""
COMPARISON = """
from inbatch.apps.bench.runner import BenchmarkRounds, Implementation
job = {"module": "sleeping.workload", "make": "work", "threads": 1, "device": "cpu", "seconds": 0.1}
BenchmarkRounds("sleeping", "s", [Implementation("one", job)]).run(1, {}, show_missing=True)
"""


@pytest.mark.slow
def test_benchmark_processes_end_with_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "sleeping").mkdir()
    (tmp_path / "sleeping" / "workload.py").write_text(SLEEPS)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    runs = {number: launch(script(tmp_path, COMPARISON), tmp_path, PYTHONPATH=path) for number in SIGNALS}
    halted = lambda pid: any(processes().get(child, (0, ""))[1] == "T" for child in below(pid))  # noqa: E731
    for number, run in runs.items():
        assert until(lambda run=run: halted(run.pid), 120), (tmp_path / "console.txt").read_text()
        pids = below(run.pid)
        run.send_signal(number)
        code = run.wait(BOUND)
        assert not left(pids), number
        assert code == (-number if number == signal.SIGKILL else 1)  # a script that does not catch StopRequested


CHILD = """
import sys, time
{before}
from inbatch.runtime.child_processes import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
STARTS = """
import sys, time
from inbatch.runtime.child_processes import start
child = start({words!r})
child.wait()
"""


@pytest.mark.grid(1)
@pytest.mark.parametrize("way", ["kernel", "poll", "wrapper"])
def test_a_program_ends_with_its_parent(tmp_path: Path, way: str) -> None:
    """By the kernel on Linux; by a thread on other systems, or if there is a shell between the two."""
    words = [sys.executable, "-c", CHILD.format(before="sys.platform = 'darwin'" if way == "poll" else "")]
    if way == "wrapper":
        words = ["sh", "-c", f"{shlex.join(words)}; true"]
    run = launch(script(tmp_path, STARTS.format(words=words)), tmp_path)
    console = tmp_path / "console.txt"
    assert until(lambda: "ready" in console.read_text(), 60), console.read_text()
    pids = below(run.pid)
    assert len(pids) == (2 if way == "wrapper" else 1)
    run.kill()
    run.wait()
    assert not left(pids)


def test_program_without_a_parent_ends_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(before="")], env=os.environ | {"INBATCH_PARENT": str(gone.pid)}
    )
    assert child.wait(60) == -signal.SIGKILL


def test_every_child_process_is_bound_to_its_parent() -> None:
    """Processes are started by the functions of child_processes.py, or have a time limit."""
    seen = set()
    names = ("DataLoader", "run", "Popen", "Process", "Pool", "ProcessPoolExecutor", "fork", "spawn")
    called = re.compile(rf"\b({'|'.join(names)})\(")
    for file in source_trees.FILES:
        for call in source_trees.nodes(file) if called.search(file.read_text()) else ():
            if not isinstance(call, ast.Call):
                continue
            name, words = written(call.func).rpartition(".")[2], {word.arg for word in call.keywords}
            where = f"{file.name}:{call.lineno} {name}"
            if name == "DataLoader":
                assert "worker_init_fn" in words, where
            elif name == "run" and written(call.func).startswith("subprocess"):
                assert "timeout" in words, where
            elif name in ("Popen", "Process"):
                assert file.name == "child_processes.py", where
            else:
                assert name not in names[4:], where
                continue
            seen.add(name)
    assert seen == {"DataLoader", "run", "Popen", "Process"}


STREAMS = """
import os, time, torch
from inbatch.runtime import child_processes
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, i):
        if i == 3:
            time.sleep(600)
        return i
loader = torch.utils.data.DataLoader(Images(), batch_size=None, num_workers=2,
                                     worker_init_fn=child_processes.begin_worker)
batches = child_processes.batches(loader)
next(batches)
print("ready", flush=True)
if {exits}:
    raise SystemExit(7)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_that_ignore_signals_end_with_their_trainer(tmp_path: Path) -> None:
    """One of them is stuck in an image; a global name keeps the batches alive until the interpreter ends."""
    console = tmp_path / "console.txt"
    for tries, number in enumerate((signal.SIGHUP, signal.SIGKILL, None), start=1):
        run = launch(script(tmp_path, STREAMS.format(exits=number is None)), tmp_path)
        assert until(lambda tries=tries: console.read_text().count("ready") == tries, 120), console.read_text()
        pids = below(run.pid)
        if number is not None:
            assert len(pids) >= 2
            run.send_signal(number)
        assert run.wait(60) == (7 if number is None else -number)
        assert not left(pids), number


def test_a_hang_up_is_ignored_under_nohup(tmp_path: Path) -> None:
    text = """
import os, signal
from inbatch.runtime.signals import ending, stop_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stop_on_signals() as stop, ending():
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested is None
"""
    run = launch(script(tmp_path, text), tmp_path)
    assert run.wait(60) == 0, (tmp_path / "console.txt").read_text()


# Whole commands


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run, and images."""
    folder = tmp_path_factory.mktemp("learned")
    write_folder(open_data("digits-canvas-colour", subset=200), folder / "images")
    inbatch.pretrain(folder / "images", out=folder / "run", encoder="tiny", batch_size=50, epochs=1, quiet=True)
    return folder


PRETRAIN = (
    "pretrain --data {learned}/images --encoder tiny --batch 20 --epochs 4000 --workers 2 --out run --quiet"
    " --set cache_on_device=false --set image_size=32 --set evaluate_every=4000"
)
COMMANDS = {  # words, number of its processes while it works, exit codes
    "doctor": ("doctor", 1, {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}),
    "bench": ("bench step --quick --no-peers", 1, {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}),
    "table": (
        "table ba-ssl-3 --scale smoke --row SimCLR --seed 0 --jobs 1 --device cpu",
        1,
        {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75},
    ),
    "pretrain": (PRETRAIN, 2, {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}),
    "evaluate": ("evaluate {learned}/run --protocol finetune", 0, {}),
    "embed": ("embed {learned}/run {learned}/images -o features.npz", 0, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", COMMANDS)
def test_command_leaves_no_process_behind(name: str, number: signal.Signals, learned: Path, tmp_path: Path) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and stays ignored")
    text, several, codes = COMMANDS[name]
    run = launch(["-m", "inbatch", *text.format(learned=learned).split()], tmp_path)
    if several:
        assert until(lambda: len(below(run.pid)) >= several or run.poll() is not None, 120)
    time.sleep(1 if several else 4)
    if name == "pretrain":
        log = tmp_path / "run" / "metrics.jsonl"
        assert until(lambda: log.exists() and '"lr"' in log.read_text(), 120)  # of a step
    pids = below(run.pid)
    assert run.poll() is None and len(pids) >= several, (tmp_path / "console.txt").read_text()
    run.send_signal(number)
    code = run.wait(60)
    assert not left(pids)
    expected = -number if number == signal.SIGKILL else codes.get(number)
    assert expected is None or code == expected, (tmp_path / "console.txt").read_text()
    if name == "pretrain" and number != signal.SIGKILL:
        assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
