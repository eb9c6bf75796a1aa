"""Settings for speed that a process makes, each tested in its own process."""

import os
import subprocess
import sys

import pytest

OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
FAULTS = """
import resource, torch
torch.set_num_threads(1)
def work():
    for _ in range(8):
        torch.ones(1 << 24)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def environment(**more: str) -> dict[str, str]:
    """Return the environment of this process without the variables that the program sets."""
    return {key: value for key, value in os.environ.items() if key not in ("INBATCH_ALLOCATOR", *OPENMP)} | more


def printed(code: str, **more: str) -> str:
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env=environment(**more), capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@LINUX
def test_freed_memory_is_kept() -> None:
    kept = int(
        printed(
            "from inbatch.runtime import tuning; tuning.begin(); tuning.keep_memory(); assert tuning.keeps_memory\n"
            + FAULTS
        )
    )
    left_alone = (
        "from inbatch.runtime import tuning; tuning.begin(); tuning.keep_memory(); assert not tuning.keeps_memory\n"
        + FAULTS
    )
    assert int(printed(left_alone, INBATCH_ALLOCATOR="system")) > 4 * kept + 100  # large pages cause few page faults


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_no_more_threads_than_a_quota_gives_cores() -> None:
    code = "import sys; from inbatch.runtime import tuning; tuning.affine = lambda: 64; tuning.cores = lambda: 1; "
    threads = "tuning.begin(); import torch; print(torch.get_num_threads())"
    assert printed(code + threads) == "1"
    kept = "tuning.begin(); import os; print(os.environ['OMP_NUM_THREADS'])"
    assert printed(code + kept, OMP_NUM_THREADS="2") == "2"
    assert printed(
        code + "tuning.cores = lambda: 64; tuning.begin(); import os; print(os.environ.get('OMP_NUM_THREADS'))"
    ) == ("None")


WAITING = """
import os
print(*(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")))
"""


@pytest.mark.slow
def test_waiting_threads_sleep() -> None:
    """Spinning threads would compete with other processes, so OpenMP is configured before torch is loaded."""
    begin = "import sys; from inbatch.runtime import tuning; tuning.begin(); assert 'torch' not in sys.modules"
    assert printed(begin + WAITING) == "passive 1000 None"
    assert printed(begin + WAITING, OMP_WAIT_POLICY="active") == "active None None"
    assert printed(begin + WAITING, GOMP_SPINCOUNT="7") == "None 7 None"
    assert printed(begin + WAITING, KMP_BLOCKTIME="3") == "None None 3"
    assert printed("import torch; from inbatch.runtime import tuning; tuning.begin()" + WAITING) == "None None None"


@pytest.mark.slow
@LINUX
def test_openmp_of_torch_has_a_passive_wait_policy() -> None:
    code = "from inbatch.runtime import tuning; tuning.begin(); import torch"
    run = [sys.executable, "-c", code]
    seen = subprocess.run(run, env=environment(OMP_DISPLAY_ENV="verbose"), capture_output=True, text=True).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in seen and "GOMP_SPINCOUNT = '1000'" in seen


@pytest.mark.slow
def test_denormal_numbers_are_zero_on_every_thread() -> None:
    code = "import torch; torch.set_num_threads(2)\n"
    half = "print(int((torch.full((1 << 20,), 1e-39) * 0.5).count_nonzero()))"
    assert printed("import inbatch; inbatch.tune(); inbatch.tune()\n" + code + half) == "0"
    assert printed(code + half) == str(1 << 20)


@pytest.mark.slow
def test_a_library_leaves_the_process_alone() -> None:
    """Training in a user's process changes only settings that the user requested."""
    code = "import inbatch.api; from inbatch.runtime import tuning; tuning.ready(); import torch\n"
    assert printed(
        code + "print(tuning.tuned, tuning.keeps_memory, float(torch.tensor(1e-39) * 0.5) > 0)" + WAITING
    ) == ("False False True\nNone None None")


def test_other_programs_keep_their_wait_policy() -> None:
    """Implementations compared in a benchmark do not inherit this program's thread settings, only the user's."""
    code = "from inbatch.runtime import tuning; tuning.begin(); import os; os.environ = tuning.without_tuning()"
    assert printed(code + WAITING) == "None None None"
    assert printed(code + WAITING, GOMP_SPINCOUNT="7") == "None 7 None"
