"""Under torchrun: signals to the launcher and to single ranks, a killed rank and its restart, and no orphans."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from small_runs import assert_same_state, saved

from inbatch.data import open_data, write_folder
from inbatch.training import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = {"subset": 200, "batch_size": 40, "context": 20, "epochs": 40, "evaluate_every": 40, "precision": "float32"}
LAST = 200  # steps


def words(out: Path, **more: object) -> list[str]:
    arguments = [
        "pretrain",
        "moco",
        "--data",
        "digits-canvas",
        "--out",
        str(out),
        "--quiet",
        "--set",
        "method.queue_size=64",
    ]
    for key, value in (RUN | more).items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


class Started(subprocess.Popen[str]):
    """Process whose descendants are found by an environment variable: torchrun starts workers in new sessions."""

    _count = itertools.count()

    def __init__(self, *command: str, **variables: str) -> None:
        self.mark = f"{os.getpid()}.{next(self._count)}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "INBATCH_TEST": self.mark} | variables
        super().__init__(command, stderr=subprocess.PIPE, text=True, env=environment)

    def family(self) -> dict[int, dict[str, str]]:
        """Return this process and its running descendants, each with its initial environment."""
        processes = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                if environment.get("INBATCH_TEST") == self.mark:
                    processes[int(entry.name)] = environment
        return processes

    def rank(self, number: int) -> int:
        """Return the process of a rank: the oldest of those with its number."""
        return min(pid for pid, environment in self.family().items() if environment.get("RANK") == str(number))


def torchrun(out: Path, *launcher: str, **more: object) -> Started:
    return Started(
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", *launcher,
        "-m", "inbatch", *words(out, **more), "--expect-world-size", "2", "--resume", "auto", "--dist-timeout", "60",
    )  # fmt: skip


@contextmanager
def ended(process: Started) -> Iterator[None]:
    """End all of its processes on exit."""
    try:
        yield
    finally:
        for pid in process.family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def after(process: Started, file: Path, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[1]
        time.sleep(0.01)


def alone(process: Started, seconds: float = 20) -> None:
    """Check that no process of it is left soon after its end."""
    end = time.monotonic() + seconds
    while left := process.family():
        assert time.monotonic() < end, f"orphans: {list(left)}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(out)
    with ended(process):
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
    return out


def same(out: Path, whole: Path) -> None:
    assert_same_state(saved(out), saved(whole))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    other = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == other, "the log has steps twice, or lacks some"


@pytest.mark.parametrize(
    ("whom", "number", "status"),
    [
        ("launcher", signal.SIGTERM, "preempted"),
        ("launcher", signal.SIGUSR1, "preempted"),
        ("rank 0", signal.SIGUSR1, "preempted"),
        ("rank 1", signal.SIGTERM, "preempted"),
        ("rank 1", signal.SIGINT, "interrupted"),
    ],
)
def test_signal_stops_all_ranks_at_one_step_and_the_run_resumes(
    whom: str, number: signal.Signals, status: str, whole: Path, tmp_path: Path
) -> None:
    """Fault 5."""
    out = tmp_path / "run"
    process = torchrun(out)
    with ended(process):
        after(process, out / "checkpoints" / "last.pt")
        os.kill(process.pid if whom == "launcher" else process.rank(int(whom[-1])), number)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode not in (0, None)
        alone(process)
    report = json.loads((out / "run.json").read_text())
    assert report["status"] == status and number.name in report["reason"], stderr
    assert 0 < report["last_step"] == checkpoint.load(out / "checkpoints").step < LAST
    process = torchrun(out)
    with ended(process):
        assert process.wait(400) == 0
    same(out, whole)


def test_a_killed_rank_is_restarted_by_the_launcher_and_the_run_ends_the_same(whole: Path, tmp_path: Path) -> None:
    """Fault 23: kill -9, then torchrun's restart with --resume auto."""
    out = tmp_path / "run"
    process = torchrun(out, "--max-restarts", "1")
    with ended(process):
        after(process, out / "checkpoints" / "previous.pt")
        os.kill(process.rank(1), signal.SIGKILL)
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr
        assert "lost rank 1" in stderr
        alone(process)
    same(out, whole)


def elastic(out: Path, port: int) -> Started:
    """Start one of at most two machines; --resume is not typed."""
    return Started(
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts",
        "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", f"job {port}",
        "--rdzv-conf", "last_call_timeout=30", "-m", "inbatch", *words(out, epochs=30), "--dist-timeout", "60",
    )  # fmt: skip


def test_a_machine_that_is_lost_leaves_the_run_to_the_other(tmp_path: Path) -> None:
    """`--nnodes 1:2`: two ranks begin, and one goes on from the last checkpoint with the same context groups."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    first, second = elastic(out, port), None
    with ended(first):
        time.sleep(5)  # the first one holds the store
        second = elastic(out, port)
        with ended(second):
            after(first, out / "checkpoints" / "previous.pt")
            assert json.loads((out / "run.json").read_text())["world"] == 2
        _, stderr = first.communicate(timeout=800)
        assert first.returncode == 0, stderr
    report = json.loads((out / "run.json").read_text())
    assert report["status"] == "finished" and report["world"] == 1
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["step"] for line in steps if "loss" in line and "epoch" in line and "lr" in line]
    assert losses == sorted(set(losses)) and losses[-1] == 150


def test_data_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    write_folder(open_data("digits-canvas", subset=200), tmp_path / "images")
    command = [sys.executable, "-m", "inbatch", "pretrain", "--data", str(tmp_path / "images"), "--out"]
    command += [
        str(tmp_path / "run"),
        "--batch",
        "40",
        "--epochs",
        "400",
        "--set",
        "cache_on_device=false",
        "--workers",
        "2",
    ]
    process = Started(*command)
    with ended(process):
        after(process, tmp_path / "run" / "checkpoints" / "last.pt")
        assert len(process.family()) >= 3
        process.kill()
        process.wait()
        alone(process)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_other_number_of_ranks_resumes_with_the_same_images(first: int, then: int, whole: Path, tmp_path: Path) -> None:
    """The same order, the same groups: equal to rounding."""
    out = tmp_path / "run"
    for world in (first, then):
        single = [sys.executable, "-m", "inbatch", *words(out), "--resume", "auto"]
        process = torchrun(out) if world == 2 else Started(*single)
        with ended(process):
            if world == first:
                after(process, out / "checkpoints" / "last.pt")
                process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=400)
            assert (process.returncode == 0) == (world == then), stderr
    assert json.loads((out / "run.json").read_text())["world"] == then
    losses = []
    for folder in (out, whole):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert losses[0].keys() == losses[1].keys()
    assert max(abs(losses[0][step] - losses[1][step]) for step in losses[0]) < 0.05


@pytest.mark.parametrize("arguments", [["nomethod"], ["simclr", "--compare", "nowhere"]], ids=["method", "reference"])
def test_errors_of_all_ranks_are_printed_once(arguments: list[str], tmp_path: Path) -> None:
    """The launcher ends all ranks when one has ended: rank 0, which prints the error, ends first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "inbatch"]
    command = [*launch, "pretrain", *arguments, "--data", "digits-canvas", "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode and ended.stderr.count("\nerror: ") + ended.stderr.startswith("error: ") == 1, ended.stderr
    assert not (tmp_path / "run").exists()
