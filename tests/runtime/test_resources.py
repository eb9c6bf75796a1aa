"""Memory and core limits of a container or a job, read from simulated /proc and /sys."""

import os
from pathlib import Path

import pytest

from inbatch.runtime import resources
from inbatch.runtime.resources import cores, limited_bytes


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine of 64 cores."""
    monkeypatch.setattr(resources, "affine", lambda: 64)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(path: str, limit: str, used: int, cached: int) -> dict[str, str]:
    texts = {"memory.max": limit, "memory.current": f"{used}", "memory.stat": f"anon 5\ninactive_file {cached}\n"}
    return {f"sys/fs/cgroup{path}/{name}": text + "\n" for name, text in texts.items()}


def test_limits_of_version_2(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/job/step\n"} | group("/job", "1000", 700, 100) | group("/job/step", "max", 600, 0)
    assert limited_bytes(tree(tmp_path, files)) == [400]
    files |= group("/job/step", "900", 600, 50) | {"sys/fs/cgroup/job/step/memory.high": "500\n"}
    assert sorted(limited_bytes(tree(tmp_path, files))) == [0, 350, 400]


def test_limits_of_a_container_are_read_from_the_root_group(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n"} | group("", "1000", 200, 0)
    assert limited_bytes(tree(tmp_path, files)) == [800]


def test_limits_of_version_1(tmp_path: Path) -> None:
    texts = {"limit_in_bytes": "1000", "usage_in_bytes": "900", "stat": "inactive_file 1\ntotal_inactive_file 300"}
    files = {f"sys/fs/cgroup/memory/slurm/job/memory.{name}": text for name, text in texts.items()}
    files |= {"proc/self/cgroup": "9:cpuset:/x\n4:memory:/slurm/job\n0::/\n"}
    assert limited_bytes(tree(tmp_path, files)) == [400]


def test_no_limit(tmp_path: Path) -> None:
    assert limited_bytes(tmp_path) == []
    assert limited_bytes(tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.stat": "anon 5"})) == []


# Cores


def test_cores_of_a_quota(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/box/run\n", "sys/fs/cgroup/box/cpu.max": "250000 100000\n"}
    assert cores(tree(tmp_path, files)) == 2  # a third thread would wait half of the time
    files |= {"sys/fs/cgroup/box/run/cpu.max": "50000 100000\n"}
    assert cores(tree(tmp_path, files)) == 1


def test_cores_of_a_quota_of_version_1(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "3:cpu,cpuacct:/box\n1:cpuset:/\n"}
    for folder in ("cpu", "cpu,cpuacct"):  # mounted alone or together with cpuacct
        texts = {f"cpu.cfs_{name}_us": text for name, text in (("quota", "400000\n"), ("period", "100000\n"))}
        place = tree(tmp_path / folder, files | {f"sys/fs/cgroup/{folder}/box/{k}": v for k, v in texts.items()})
        assert cores(place) == 4


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense"])
def test_cores_without_a_quota(tmp_path: Path, text: str) -> None:
    assert cores(tmp_path) == 64
    assert cores(tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})) == 64


def test_cores_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= cores() <= resources.affine() <= (os.cpu_count() or 1)
