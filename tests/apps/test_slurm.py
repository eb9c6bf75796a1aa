"""Batch script for SLURM, run by bash with stand-ins for SLURM's programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inbatch.apps.cli import app

SRUN = """#!/bin/bash
# As the real one: what it is told to run, and signals handed on to that.
"$@" &
trap 'kill -USR1 $!' USR1
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.log
"""


def cluster(folder: Path, srun: str) -> dict[str, str]:
    """Write the script and stand-ins for SLURM's programs to a folder; return the environment of its job."""
    script = CliRunner().invoke(app, ["slurm"])
    assert script.exit_code == 0
    programs = {"job.sbatch": script.output, "bin/srun": srun, "bin/scontrol": SCONTROL}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join((str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "test", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    return os.environ | job | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("status", "warn", "requeued", "code"),
    [("preempted", True, True, 0), ("preempted", False, False, 1), ("failed", True, False, 1)],
)
def test_only_a_run_that_was_warned_and_saved_is_queued_again(
    status: str, warn: bool, requeued: bool, code: int, tmp_path: Path
) -> None:
    """A run.json of an earlier start and a failed run do not cause a requeue."""
    srun = f"""#!/bin/bash
trap 'warned=1' USR1
touch started
for i in $(seq 200); do [ -n "$warned" ] && break; [ {int(warn)} = 0 ] && break; sleep 0.05; done
mkdir -p runs/test-17; echo '{{"status": "{status}"}}' > runs/test-17/run.json
echo "$@" > srun.log
exit 1
"""
    job = subprocess.Popen(["bash", "job.sbatch", "simclr"], cwd=tmp_path, env=cluster(tmp_path, srun))
    end = time.monotonic() + 60
    while warn and not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    if warn:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == code
    assert (tmp_path / "scontrol.log").exists() == requeued
    words = (tmp_path / "srun.log").read_text().split()
    assert words[0] == "torchrun" and words[-5:] == ["runs/test-17", "--resume", "auto", "--expect-world-size", "2"]
    assert "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" in words


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_stopped_queued_again_and_finishes(tmp_path: Path) -> None:
    words = ["simclr", "--data", "digits-canvas", "--batch", "40", "--context", "20", "--epochs", "30", "--quiet"]
    words += ["--set", "subset=200", "--set", "evaluate_every=30", "--set", "precision=float32"]
    environment, out = cluster(tmp_path, SRUN), tmp_path / "runs" / "test-17"
    job = subprocess.Popen(["bash", "job.sbatch", *words], cwd=tmp_path, env=environment)
    end = time.monotonic() + 240
    while not (out / "checkpoints" / "last.pt").exists():
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    stopped = json.loads((out / "run.json").read_text())
    assert stopped["status"] == "preempted" and 0 < stopped["last_step"] < 150

    again = subprocess.run(["bash", "job.sbatch", *words], cwd=tmp_path, env=environment, timeout=300)
    assert again.returncode == 0
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 150
