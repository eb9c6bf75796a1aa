import json
import math
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from inbatch.errors import ConfigError, InbatchError
from inbatch.runtime import files
from inbatch.runtime import unfinished as unfinished_module
from inbatch.runtime.unfinished import unfinished_folder

HOLDER = """
import os, sys, time
from pathlib import Path
from inbatch.runtime.files import locked
with locked(Path(sys.argv[1])) as note:
    if os.fork() == 0:  # a data worker that outlives the run
        print("held", flush=True)
        os.close(1)
        time.sleep(20)
        os._exit(0)
    time.sleep(20)
"""


def test_second_writer_is_refused_and_a_dead_ones_lock_is_void(tmp_path):
    """Fault 15."""
    left = tmp_path / "checkpoints" / ".last.pt.1.tmp"
    left.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            left.write_text("half a checkpoint")
            who = f"process {holder.pid} on {socket.gethostname()}"
            with pytest.raises(ConfigError, match=f"is being written by {who}"), files.locked(tmp_path):
                pass
            assert left.exists()
            holder.kill()
            holder.wait()
            with files.locked(tmp_path) as note:
                assert f"last written by {who}, which ended without finishing" in note
                assert not left.exists()
        finally:
            os.killpg(holder.pid, 9)


def test_same_process_is_refused_too_and_release_is_clean(tmp_path):
    with files.locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), files.locked(tmp_path / "run"):
            pass
        with pytest.raises(ConfigError), files.locked(tmp_path / "run"):
            pass
    with files.locked(tmp_path / "run") as note:
        assert note is None


def without_locks(monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_folder_without_locks_is_reported(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    with files.locked(tmp_path) as note:
        assert "cannot be locked ([Errno 95] Operation not supported)" in note


WRITER = """
import os, signal, sys, time
from pathlib import Path
from inbatch.runtime import files, signals
with files.replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    signals.leave(75)  # as the watchdog does
"""


def test_a_writer_leaves_nothing_and_removes_what_dead_ones_left(tmp_path):
    """Fault 1, of every file: a process that is killed, and one that ends without unwinding its stack."""
    target = tmp_path / "features.npz"
    other = tmp_path / ".features.npz.txt.7.tmp"  # of another file
    other.touch()
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", WRITER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with start() as killed, start() as leaving:
        for process in (killed, leaving):
            assert process.stdout.readline() == "writing\n"
        names = {x.pid: next(tmp_path.glob(f".features.npz.{x.pid}.*.tmp")) for x in (killed, leaving)}
        killed.kill()
        killed.wait()
        assert all(name.read_bytes() == b"half" for name in names.values())
        with files.replacing(target) as file:
            file.write(b"whole")
        assert not names[killed.pid].exists() and names[leaving.pid].exists()  # it still writes
        leaving.communicate("\n")
        assert leaving.returncode == 75
    assert target.read_bytes() == b"whole" and sorted(tmp_path.iterdir()) == [other, target]


def test_files_of_a_dead_process_with_the_same_id_are_replaced_without_locks(tmp_path, monkeypatch):
    """In a container, ids start again at 1."""
    without_locks(monkeypatch)
    mine, other = (tmp_path / f".features.npz.{process}.0123abcd.tmp" for process in (os.getpid(), 7))
    mine.touch()
    other.touch()
    with files.replacing(tmp_path / "features.npz") as file:
        file.write(b"whole")
    assert (tmp_path / "features.npz").read_bytes() == b"whole"
    assert not mine.exists() and other.exists()  # it may still write


@pytest.mark.parametrize("locks", [True, False])
def test_two_threads_write_one_file_and_the_last_to_finish_wins(tmp_path, monkeypatch, locks):
    """They shared one name by their process: one failed, or removed what the other was writing."""
    if not locks:
        without_locks(monkeypatch)
    target, own, removed = tmp_path / "features.npz", files.unfinished, []

    def too_late(path):  # another writer takes the new file for abandoned, before it is owned
        if not removed:
            path.unlink()
            removed.append(path)
        return own(path)

    monkeypatch.setattr(files, "unfinished", too_late)
    with files.replacing(target) as first:
        first.write(b"first")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(files.write_json, target, "second").result()
        assert target.read_text() == '"second"\n'
    assert removed and target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_a_folder_is_made_once_and_kept_only_if_it_is_renamed(tmp_path):
    half = tmp_path / "half"
    with unfinished_folder(half) as first, unfinished_folder(half) as second:
        assert (first, second) == (True, False)
        (half / "file").touch()
        half.rename(tmp_path / "whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["whole", "file"]
    with pytest.raises(KeyboardInterrupt), unfinished_folder(half):
        (half / "file").touch()
        raise KeyboardInterrupt
    assert not half.exists()


def test_the_folder_of_another_writer_is_left(tmp_path, monkeypatch):
    """Another thread takes a new folder for abandoned, removes it and makes its own, before the first is locked."""
    half, locked, other = tmp_path / "half", unfinished_module._locked, []

    def late(path, wait):
        monkeypatch.setattr(unfinished_module, "_locked", locked)
        handle = locked(path, wait)
        path.rename(tmp_path / "removed")
        path.mkdir()
        other.append(locked(path, wait))
        return handle

    monkeypatch.setattr(unfinished_module, "_locked", late)
    with unfinished_folder(half) as mine:
        assert not mine and half.is_dir()
    os.close(other[0])


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"knn": 0.5, "bad": [math.nan, (math.inf, 1)], "name": "é"})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "knn": 0.5,
        "bad": [None, [None, 1]],
        "name": "é",
    }
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.write_json(path, {"path": path})
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_json_has_no_character_that_a_terminal_obeys():
    value = {"a\u202eb": "\x9b \u200d", "é图": ["two\nlines", "\udcff"]}
    text = files.to_json(value, indent=2)
    assert text.replace("\n", "").isprintable() and "é图" in text and json.loads(text) == value


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(InbatchError, match=r"Cannot write .*run\.lock: [A-Z][a-z ]+\. Choose another folder"),
        files.locked(tmp_path / "file" / "run"),
    ):
        pass
