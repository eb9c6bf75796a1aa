"""Load by other processes, and the number of threads that a run uses at that load."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inbatch.api import pretrain
from inbatch.runtime import cpu_load, threads, tuning
from inbatch.runtime.threads import Threads, beside_others, threads_beside

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells")
STAT = """cpu  900 0 900 9000 100 0 0 0 0 0
cpu0 10 1 20 4000 5 2 3 0 0 0
cpu1 500 0 100 3000 50 0 0 4 0 0
cpu10 390 0 780 2000 45 0 0 0 0 0
intr 1 2 3
"""


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Simulate two threads on two cores; the list holds the load of others at each decision, the last value repeats."""
    loads = [1.0]

    def now(seconds: float = 0.0) -> float:
        return loads.pop(0) if len(loads) > 1 else loads[0]

    monkeypatch.setattr(tuning, "tuned", True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setattr(threads, "others_busy", now)
    monkeypatch.setattr(threads, "Load", lambda: SimpleNamespace(seconds=2.0, busy=now))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield loads
    torch.set_num_threads(before)


def test_work_of_some_cores() -> None:
    assert cpu_load.worked(STAT, {"cpu0"}) == 36 and cpu_load.worked(STAT, {"cpu1"}) == 604
    assert cpu_load.worked(STAT, {"cpu0", "cpu10"}) == 36 + 1170


@LINUX
def test_busy_cores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time that passes while this process sleeps is the load of others."""
    mine, ticks = min(os.sched_getaffinity(0)), iter((0, 10 * os.sysconf("SC_CLK_TCK"), 5, 5))
    clock = SimpleNamespace(read_text=lambda: f"cpu{mine} {next(ticks)} 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(cpu_load, "_STAT", clock)
    for name in ("cores", "affine"):
        monkeypatch.setattr(cpu_load, name, lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    seen = cpu_load.others_busy(0.05)
    assert seen is not None and seen > 1
    assert cpu_load.others_busy(0.01) == 0
    monkeypatch.setattr(cpu_load, "affine", lambda: 8)
    assert cpu_load.others_busy(0.01) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cpu_load, "affine", lambda: 4)
    assert cpu_load.others_busy(0.01) is None


def compute(seconds: float) -> None:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass


@LINUX
def test_own_work_and_that_of_data_workers_is_not_others() -> None:
    before = cpu_load._own()
    compute(0.1)
    child = multiprocessing.get_context("fork").Process(target=compute, args=(0.3,))
    child.start()
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":  # ended, not yet waited for
        time.sleep(0.02)
    alive = cpu_load._own() - before
    child.join()
    assert alive > 0.35 and cpu_load._own() - before >= alive - 0.05


@pytest.mark.parametrize(
    ("load", "cores", "most", "count"),
    [
        (None, 2, 2, 2), (0.0, 2, 2, 2), (0.4, 2, 2, 2), (0.5, 2, 2, 1), (0.8, 2, 2, 1), (1.3, 2, 2, 1), (2.0, 2, 2, 1),
        (0.3, 1, 1, 1), (5.0, 1, 1, 1), (1.2, 4, 4, 3), (1.0, 8, 4, 4), (5.6, 8, 4, 2), (1.0, 64, 64, 63),
    ],
)  # fmt: skip
def test_a_thread_for_each_core_that_others_leave(load: float | None, cores: int, most: int, count: int) -> None:
    assert threads_beside(load, cores, most) == count


def test_the_number_follows_the_load(beside: list[float]) -> None:
    beside[:] = [0.1, 1.0, 0.9, 0.0, 1.0]
    used: list[int] = []
    with Threads(CPU, used) as chosen:
        sentences, counts = zip(*((chosen.decide(), torch.get_num_threads()) for _ in range(5)), strict=True)
    assert counts == (2, 1, 1, 2, 1) and used == [2, 1]
    assert [bool(sentence) for sentence in sentences] == [False, True, False, False, False], "said once"
    assert (
        "1.0 of 2 cores busy" in sentences[1]
        and "1 instead of 2 threads" in sentences[1]
        and "OMP_NUM_THREADS=2" in sentences[1]
    )
    assert torch.get_num_threads() == 2, "as before the run"


def test_an_epoch_too_short_to_measure_changes_nothing(beside: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "Load", lambda: SimpleNamespace(seconds=0.2))
    with Threads(CPU, []) as chosen:
        assert chosen.decide() and not chosen.decide() and torch.get_num_threads() == 1


@pytest.mark.parametrize("who", ["library", "user", "gpu", "ranks"])
def test_the_number_is_left_alone(who: str, beside: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    if who == "library":
        monkeypatch.setattr(tuning, "tuned", False)
    if who == "user":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if who == "ranks":
        monkeypatch.setattr(threads.distributed, "world", lambda: 2)
    used: list[int] = []
    with Threads(torch.device("cuda" if who == "gpu" else "cpu"), used) as chosen:
        assert not chosen.decide() and torch.get_num_threads() == 2 and used == [2]


def test_steps_are_timed_with_the_threads_of_a_run(beside: list[float]) -> None:
    with beside_others(CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_run_prints_and_records_its_threads(
    beside: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = {"epochs": 2, "subset": 64, "batch_size": 32, "evaluate_every": 2}
    beside[:] = [1.0, 1.0, 1.0, 0.0]  # decisions: before the timed step, the first evaluation, and every epoch
    run = pretrain("digits-canvas", "simclr", out=tmp_path / "beside", **small)
    assert run.result["threads"] == [1, 2] and torch.get_num_threads() == 2
    assert json.loads((run.directory / "run.json").read_text())["threads"] == [1, 2]
    assert " ".join(capsys.readouterr().err.split()).count("this run computes with 1 instead of 2 threads") == 1
    monkeypatch.setattr(tuning, "tuned", False)
    beside[:] = [1.0]
    assert pretrain("digits-canvas", "simclr", out=tmp_path / "library", **small).result["threads"] == [2]
