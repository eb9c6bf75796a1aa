"""No test and no process that it starts can reach a network, and no command needs one (fault 20)."""

import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rank_pool import on_ranks
from ways import ways_out

TINY = "--data digits-canvas --set subset=200 --batch 40 --epochs 1"
LINES = (
    f"pretrain {TINY} --out run --quiet", "evaluate run --protocol knn", "embed run digits-canvas -o f.npz",
    "inspect run", "views digits-canvas", "crops --pairs 1000 -o crops.png", "methods moco", "plugins conv",
    "bench views --quick", "doctor --no-measure", f"pretrain {TINY} --dry-run",
    "quickstart --epochs 1 --margin=-100 --quiet",
)  # fmt: skip
"""Every command once."""

SCRIPT = "import ways; print(ways.ways_out())"  # in the folder of sitecustomize.py, on PYTHONPATH


def test_this_process_cannot_get_out() -> None:
    assert ways_out() == []


def test_a_child_cannot_get_out() -> None:
    assert subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_rank_of_the_pool_cannot_get_out() -> None:
    assert on_ranks(2, ways_out) == [[], []]


@pytest.mark.slow
def test_a_child_of_torchrun_cannot_get_out(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(tmp_path / "script.py")]
    done = subprocess.run([sys.executable, *call], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_processes_of_one_machine_can_connect() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        call = f"import socket; socket.create_connection(('localhost', {server.server_port}), 5).close(); print('met')"
        assert subprocess.run([sys.executable, "-c", call], capture_output=True, text=True).stdout == "met\n"
        thread.join()


# No command needs a network


def apart() -> list[str]:
    """Return the words that start a command in a network namespace without a device that is up; [] if unavailable."""
    for flags in (["-n"], ["-r", "-n"]):
        call = ["unshare", *flags]
        if shutil.which("unshare") and subprocess.run([*call, "true"], capture_output=True).returncode == 0:
            return call
    return []


PROGRAM = """
import shlex, socket, sys
from inbatch.apps.cli import app
asked = []
def refuse(*args, **options):
    asked.append(args)
    raise OSError("there is no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for line in sys.argv[1:]:
    try:
        app(shlex.split(line))
    except SystemExit as end:
        if end.code or asked:
            sys.exit(f"{line}: {end.code}, {asked}")
print("done")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_command_needs_a_network(tmp_path: Path) -> None:
    """Commands run in a network namespace without a network if this system allows one."""
    call = [*apart(), sys.executable, "-c", PROGRAM, *LINES]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("\ndone\n"), done.stderr


WANTED = (
    "pretrain --data digits-canvas --backbone resnet18 --size 224 --init timm --dry-run --set encoder.stem=imagenet",
    "pretrain --data digits-canvas --encoder hf-hub:timm/resnet18.a1_in1k --dry-run",
)


@pytest.mark.slow
@pytest.mark.parametrize("line", WANTED)
def test_weights_from_the_network_are_refused_at_once(line: str, tmp_path: Path) -> None:
    """No wait and no retry; empty folders prevent an answer from this machine's cache."""
    if not apart():
        pytest.skip("this system gives no network namespaces (unshare -n)")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # without the hook
    folders = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    folders["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and not path.endswith("offline"))
    waits = "import sys, time; time.sleep = lambda _: sys.exit('it waited'); from inbatch.apps.cli import main; main()"
    call = [*apart(), sys.executable, "-c", waits, *shlex.split(line), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, env=kept | folders, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
