"""Any combination of terminals, pipes and closed streams (fault 24): plain lines, right exit code, no traceback."""

import io
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from rank_pool import _context

TINY = "pretrain --data digits-canvas --set subset=200 --batch 40 --epochs 1"
PLAIN = {"TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "", "PYTHONIOENCODING": ""}


def _end(line: str, folder: str, ends: dict[str, str | None], env: dict[str, str], background: bool) -> None:
    """Run the program in this forked process as if it had been started with these streams; None closes a stream."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(env)
    for name in [name for name, value in env.items() if not value]:
        os.environ.pop(name, None)
    encoding = env.get("PYTHONIOENCODING") or "utf-8"
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if (path := ends.get(name, os.devnull)) is None:
            os.close(number)
            setattr(sys, name, None)
            continue
        opened = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
        raw = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115 - open until exit
        errors = "backslashreplace" if number == 2 else "strict"
        lines = os.isatty(number)
        setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=lines))
    if background and (child := os.fork()):
        _, status = os.waitpid(child, os.WUNTRACED)
        os._exit(99 if os.WIFSTOPPED(status) else os.WEXITSTATUS(status))
    elif background:
        os.setpgid(0, 0)  # leave the terminal's process group
    code = 98
    try:
        from inbatch.apps.cli import main

        sys.argv = ["inbatch", *shlex.split(line)]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        Path(folder, "traceback").write_text(traceback.format_exc())
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120  # Python's exit code for this error
    os._exit(code)


def ended(line: str, folder: Path, env: dict[str, str] | None = None, background: bool = False, **ends: Any) -> int:
    """Return the exit code of a command line."""
    process = _context.Process(target=_end, args=(line, str(folder), ends, PLAIN | (env or {}), background))
    process.start()
    process.join(200)
    crash = folder / "traceback"
    assert not crash.exists(), crash.read_text()
    assert process.exitcode is not None
    return process.exitcode


def on_a_terminal(line: str, folder: Path, columns: int, **options: Any) -> tuple[int, str]:
    """Return the exit code of a command line, and the output that a terminal of this width received."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    sent: list[bytes] = []

    def listen() -> None:
        try:
            while piece := os.read(ours, 65536):
                sent.append(piece)
        except OSError:  # the last process that had it open has ended
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    name = os.ttyname(theirs)
    code = ended(line, folder, stdin=name, stdout=name, stderr=name, **options)
    os.close(theirs)
    listener.join(10)
    os.close(ours)
    return code, b"".join(sent).decode("utf-8")


# Terminals


@pytest.mark.grid(2)
@pytest.mark.parametrize("columns", [20, 5000])
@pytest.mark.parametrize("line", ["methods nosuch", "--help", "crops --pairs 100"])
def test_any_width(line: str, columns: int, tmp_path: Path) -> None:
    code, sent = on_a_terminal(line, tmp_path, columns)
    assert code == (2 if "nosuch" in line else 0) and "Traceback" not in sent and sent.strip()


@pytest.mark.slow
def test_a_wide_table_is_cut_between_columns(tmp_path: Path) -> None:
    """Figures are never split: columns that do not fit follow below, next to the row names."""
    _, wide = on_a_terminal("table ba-ssl-3", tmp_path, 5000)
    _, narrow = on_a_terminal("table ba-ssl-3", tmp_path, 80)
    figure = re.compile(r"[+-]?\d+\.\d+ ± \d+\.\d+(?: \(p \d\.\d+\))?")
    figures, again = (figure.findall(sent.partition("at cpu scale")[0]) for sent in (wide, narrow))
    assert len(figures) > 20 and sorted(figures) == sorted(again)
    rows = [line for line in narrow.partition("at cpu scale")[0].splitlines() if line.startswith("SimCLR + BA")]
    assert len(rows) > 2 and all(len(row) <= 80 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_terminals_without_colours_or_movement(env: dict[str, str], tmp_path: Path) -> None:
    code, sent = on_a_terminal(f"{TINY} --out run", tmp_path, 80, env=env)
    assert code == 0 and "k-NN" in sent, sent
    if "NO_COLOR" in env:
        assert not re.search(r"\x1b\[[0-9;]*[34][0-9]", sent)
    if env.get("TERM") == "dumb":
        assert "\x1b" not in sent


@pytest.mark.slow
def test_run_in_the_background_has_no_progress_bar(tmp_path: Path) -> None:
    """A background job is not stopped by its terminal (SIGTTOU, SIGTTIN)."""
    code, sent = on_a_terminal(f"{TINY} --out run", tmp_path, 80, background=True)
    assert code == 0 and "k-NN" in sent, code


# No terminal


@pytest.mark.grid(1)
@pytest.mark.parametrize("closed", [("stdin",), ("stdout",), ("stderr",), ("stdin", "stdout", "stderr")])
def test_closed_ends(closed: tuple[str, ...], tmp_path: Path) -> None:
    ends: dict[str, Any] = {"stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")} | dict.fromkeys(closed)
    assert ended("crops --pairs 100 -o c.png", tmp_path, **ends) == 0 and (tmp_path / "c.png").is_file()
    assert ended("methods nosuch", tmp_path, **ends) == 2
    if "stderr" not in closed:
        assert (tmp_path / "err").read_text().startswith("error: ")
    if closed == ("stderr",):
        assert "error" not in (tmp_path / "out").read_text()


@pytest.mark.grid(1)
@pytest.mark.parametrize("line", ["crops --pairs 100", "crops --pairs 100 --json", "--help", "methods"])
def test_result_that_cannot_be_written_is_a_failure(line: str, tmp_path: Path) -> None:
    assert ended(line, tmp_path, stdout="/dev/full", stderr=str(tmp_path / "err")) == 1
    assert "the result cannot be written to stdout: No space left on device\n" in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_run_continues_if_its_progress_cannot_be_shown(tmp_path: Path) -> None:
    assert ended(f"{TINY} --out run", tmp_path, stderr="/dev/full", stdout=str(tmp_path / "out")) == 0
    assert "k-NN" in (tmp_path / "out").read_text()
    assert ended("methods nosuch", tmp_path, stderr="/dev/full") == 2


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "é图").mkdir()
    ends = {"stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")}
    for line, code in (("crops --pairs 100", 0), ("methods vicreg", 0), ("views é图", 3), (f"{TINY} --out é/图", 0)):
        assert ended(line, tmp_path, env={"PYTHONIOENCODING": encoding}, **ends) == code
    assert (tmp_path / "out").read_bytes().decode(encoding) and (tmp_path / "err").read_bytes().decode(encoding)
    assert (tmp_path / "é" / "图" / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_a_home_that_is_none(home: str, tmp_path: Path) -> None:
    """The child's libraries were loaded with a home directory, unlike in test_run_as_a_background_job_of_a_shell."""
    ends = {"stdout": str(tmp_path / "out"), "stderr": str(tmp_path / "err")}
    env = {"HOME": home, "DISPLAY": "", "INBATCH_CACHE": "", "XDG_CACHE_HOME": ""}
    assert ended("views digits-canvas -o v.png", tmp_path, env=env, **ends) == 0
    assert (tmp_path / "err").read_text() == ""


# As a shell starts it


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("--help | head -1", 0, ""),
        ("--help > /dev/full", 1, "error: the result cannot be written to stdout: No space left on device\n"),
        ("--help >&-", 0, ""),
        ("--version <&- >&- 2>&-", 0, ""),
        ("nosuch 2>&-", 2, ""),
    ],
)
def test_run_as_a_background_job_of_a_shell(words: str, code: int, error: str) -> None:
    call = f"{shlex.quote(sys.executable)} -m inbatch {words}"
    done = subprocess.run(["sh", "-c", call], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, error)


@pytest.mark.slow
def test_minimal_environment_prints_only_the_result(tmp_path: Path) -> None:
    """Without home directory, locale, terminal and input, warnings of libraries about these are not shown to users."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    env = kept | {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "INBATCH_CACHE": "off"}
    call = [sys.executable, "-m", "inbatch", "crops", "--pairs", "100", "-o", "c.png"]
    done = subprocess.run(call, capture_output=True, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert done.stdout.decode("ascii") and (tmp_path / "c.png").is_file()


def test_closed_pipe_prints_no_message(tmp_path: Path) -> None:
    """`inbatch methods | head -1` closes the pipe before the first line is written."""
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-m", "inbatch", "--help"]
    done = subprocess.run(call, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.returncode in (1, 128 + signal.SIGPIPE) and done.stderr == ""
