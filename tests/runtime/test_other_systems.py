"""Systems without POSIX: every module imports, and what differs there is done or said (docs/faults.md)."""

import ast
import contextlib
import ctypes
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import inbatch
from inbatch.errors import ConfigError
from inbatch.runtime.device import device_for

MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "curses", "crypt", "spwd")
OF_OS = (
    "fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "nice", "uname", "sysconf",
    "getloadavg", "sched_getaffinity", "register_at_fork", "set_blocking", "mkfifo", "fchmod", "chown",
    "pread", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "WNOHANG", "wait3",
)  # fmt: skip
OF_SIGNAL = (
    "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGSTOP", "SIGCONT", "SIGXCPU", "SIGALRM", "SIGPIPE", "SIGQUIT",
    "SIGCHLD", "SIGTSTP", "SIGWINCH", "setitimer", "alarm", "pthread_kill", "pthread_sigmask", "sigwait",
    "siginterrupt",
)  # fmt: skip
ROOT = Path(inbatch.__file__).parent
NAMES = [
    ".".join(("inbatch", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for file in ROOT.rglob("*.py")
    if file.name != "__main__.py"
]  # fmt: skip


@contextlib.contextmanager
def elsewhere(package: str) -> Iterator[dict[str, ModuleType]]:
    """Import the modules of a package again, in a Python without POSIX modules, functions and signals."""
    names = [name for name in NAMES if name == package or name.startswith(f"{package}.")]
    for name in names:  # libraries import their own modules now
        importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        load = ctypes.CDLL

        def no_process_library(name: str | None, *rest: Any, **options: Any) -> ctypes.CDLL:
            if name is None:
                raise TypeError("bad argument type for built-in operation")
            return load(name, *rest, **options)

        patch.setattr(ctypes, "CDLL", no_process_library)
        for name in MODULES:
            patch.setitem(sys.modules, name, None)
        for module, missing in ((os, OF_OS), (signal, OF_SIGNAL)):
            for name in missing:
                patch.delattr(module, name, raising=False)
        above, _, leaf = package.rpartition(".")
        if above:  # an import also sets the attribute of the package above
            patch.setattr(sys.modules[above], leaf, sys.modules[package])
        for name in names:
            patch.delitem(sys.modules, name)
        yield {name: importlib.import_module(name) for name in names}


def test_posix_modules_are_imported_only_if_they_exist() -> None:
    for file in ROOT.rglob("*.py"):
        text = file.read_text()
        if not re.search(rf"(import|from) ({'|'.join(MODULES)})\b", text):
            continue
        tree = ast.parse(text)
        guarded = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.Try | ast.With) and "ImportError" in ast.unparse(block)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
                named = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not set(named) & set(MODULES), f"{file.name}, line {node.lineno}"


def test_the_runtime_works_without_posix(tmp_path: Path) -> None:
    with elsewhere("inbatch.runtime") as modules:
        memory, signals, files, resources, load, child = (
            modules[f"inbatch.runtime.{name}"]
            for name in ("memory", "signals", "files", "resources", "cpu_load", "child_processes")
        )
        cpu = torch.device("cpu")
        memory.release_memory(cpu)
        assert memory.peak_memory(cpu) is None and memory.free_bytes(cpu) > 0
        assert [s.name for s in signals.SIGNALS] == ["SIGTERM", "SIGINT"]
        with files.locked(tmp_path / "run") as note:
            assert "cannot be locked" in note and "no second run" in note
        files.write_json(tmp_path / "a.json", {"a": 1})
        with files.open_regular(tmp_path / "a.json") as file:
            assert file.read().startswith(b"{")
        child.end_with_parent()
        assert resources.cores() >= 1 and load.others_busy(0.001) is None
        with signals.stop_on_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested == signal.SIGTERM
        with pytest.MonkeyPatch.context() as patch:  # POSIX refuses a blocking pipe, Windows does not ask
            patch.setattr(signal, "set_wakeup_fd", lambda *_, **__: -1)
            with signals.Watchdog().watching():
                pass
    assert hasattr(signal, "SIGHUP") and sys.modules["inbatch.runtime.memory"].resource is not None


@pytest.mark.slow
def test_every_module_imports_without_posix() -> None:
    code = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_other_systems as t\n"
    code += "with t.elsewhere('inbatch') as found:\n"
    code += "    assert len(found) > 150 and found['inbatch.runtime.memory'].resource is None\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_mps_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"float64.*--device cpu"):
        device_for("mps")
