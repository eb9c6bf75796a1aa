"""Processes that torchrun restarts find the run that they began, without --resume."""

import json
import os
import socket
from pathlib import Path

import pytest

from inbatch.runtime.resources import launch_id
from inbatch.training.resume import restarted


def begin(folder: Path, launch: str, status: str = "running") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "launch": launch}))
    return folder


def test_only_a_run_of_the_same_launch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine, other = begin(Path("runs/simclr-b-2"), "job 1"), begin(Path("runs/simclr-a-1"), "job 0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_id() is None and restarted(mine) is None and restarted(None) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    assert restarted(mine) == restarted(None) == mine
    assert restarted(other) is None and restarted(tmp_path / "new") is None


def test_a_finished_run_is_found_only_by_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path / "run", "job 1", "finished")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    assert restarted(run) is None  # the same command a second time: refused as without torchrun
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(run) == run


def test_launcher_process_is_the_identity_if_torchrun_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_id() == f"{socket.gethostname()} {os.getppid()}"
