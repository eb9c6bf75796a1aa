"""Ranks that Ray Train or SLURM start: a lost worker is restarted, and tasks of srun form one run."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from rank_pool import on_ranks
from test_torchrun import Started, after, ended, same, words

import inbatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
RAY = Path(__file__).parents[2] / "examples" / "ray_train.py"


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "inbatch", *words(out, epochs=3, evaluate_every=3), "--workers", "0"]


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def worker(process: Started) -> int:
    """Return one of Ray's two workers."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    workers = {int(pid) for pid, name in (line.split(maxsplit=1) for line in listed) if "RayTrainWorker" in name}
    return max(workers & set(process.family()))


def undisturbed(out: Path) -> None:
    """Train as the script does."""
    inbatch.pretrain("digits-canvas", "simclr", out=str(out), epochs=3, device="cpu", quiet=True)


def test_run_under_ray_continues_after_a_lost_worker(tmp_path: Path) -> None:
    """Ray starts both workers again, and the run ends as one without Ray that nothing disturbs."""
    pytest.importorskip("ray")
    lost, whole = tmp_path / "lost", tmp_path / "whole"
    patient = {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"}  # on a machine with other work
    # Ray's processes talk to each other by the machine's own address.
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout
    patient["INBATCH_TEST_ADDRESSES"] = own
    process = Started(sys.executable, str(RAY), "--out", str(lost), "--epochs", "3", **patient)
    with ended(process):
        after(process, lost / "checkpoints" / "last.pt", 600)
        assert json.loads((lost / "run.json").read_text())["world"] == 2
        os.kill(worker(process), signal.SIGKILL)
        _, stderr = process.communicate(timeout=700)
        assert process.returncode == 0, stderr
    on_ranks(2, undisturbed, whole)
    same(lost, whole)


def tasks(out: Path, count: int) -> list[Started]:
    """Start the tasks of a job as `srun python -m inbatch` does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = {"SLURM_NTASKS": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Started(*command(out), **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(count)]


def test_two_tasks_of_slurm_are_one_run_with_the_figures_of_one_process(tmp_path: Path) -> None:
    logs = []
    for name, count in (("one", 1), ("two", 2)):
        started = tasks(tmp_path / name, count)
        with ExitStack() as stack:
            for process in started:
                stack.enter_context(ended(process))
            assert [process.wait(400) for process in started] == [0] * count
        assert json.loads((tmp_path / name / "run.json").read_text())["world"] == count
        logs.append(losses(tmp_path / name))
    assert logs[0].keys() == logs[1].keys() and 15 in logs[0]
    assert max(abs(logs[0][step] / logs[1][step] - 1) for step in logs[0]) < 1e-5
