import importlib.util
import io
import json
import math
import os
import pty
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from inbatch.errors import InbatchError
from inbatch.training.metric_logger import Log
from inbatch.training.trackers.tensorboard import TensorBoard


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain():
    return Console(file=io.StringIO(), width=80)


def steps(log, numbers):
    for step in numbers:
        log.step(step, step // 10, {"loss": torch.tensor(float(step)), "lr": 0.5}, images=64)


class Unread:
    """A value on a device that counts how often it is read."""

    def __init__(self):
        self.reads = 0

    def __float__(self):
        self.reads += 1
        return 1.0


def test_values_are_read_only_when_recorded(tmp_path):
    value = Unread()
    with Log(tmp_path, total_steps=25, quiet=True, every=10, console=plain()) as log:
        for step in range(1, 26):
            log.step(step, 0, {"std": value}, images=8)
    assert [r["step"] for r in lines(tmp_path)] == [1, 10, 20, 25]
    assert value.reads == 4


def test_records(tmp_path):
    with Log(tmp_path, total_steps=20, quiet=True, console=plain()) as log:
        steps(log, range(1, 21))
        log.evaluation(20, {"knn": torch.tensor(0.75)})
    first, *_, last, evaluation = lines(tmp_path)
    assert (first["step"], first["epoch"], first["loss"], first["lr"]) == (1, 0, 1.0, 0.5)
    assert last["step"] == 20 and last["epoch"] == 2 and last["images_per_second"] > 0
    assert evaluation == {"step": 20, "knn": 0.75}


def test_images_per_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("inbatch.training.metric_logger.time.perf_counter", lambda: now[0])
    console = plain()
    with Log(tmp_path, total_steps=30, interval=0, console=console) as log:
        for step in range(1, 31):
            now[0] += 2.0
            log.step(step, 0, {"loss": 1.0}, images=64)
            if step == 15:
                now[0] += 114.0
                log.evaluation(15, {"knn": 0.5})
    assert {r["images_per_second"] for r in lines(tmp_path) if "knn" not in r} == {32.0}
    assert "step 20/30  loss 1  32 images/s  k-NN 50.0%  0:01:20 left" in console.file.getvalue()


def test_every_record_is_on_disk_at_once_and_strict_json(tmp_path):
    with Log(tmp_path, total_steps=20, quiet=True, console=plain()) as log:
        log.step(10, 0, {"loss": math.nan}, images=1)
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_resume_leaves_no_step_twice(tmp_path, monkeypatch):
    # TensorBoard sorts its files by name; within a second the names end in a counter, and "10" sorts before "9".
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0))
    with Log(tmp_path, total_steps=100, quiet=True, console=plain()) as log:
        steps(log, range(1, 46))
        log.evaluation(45, {"knn": 0.1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 46, "lo')  # killed while writing
    with Log(tmp_path, total_steps=100, quiet=True, resume_step=25, console=plain()) as log:
        steps(log, range(26, 101))
    assert [r["step"] for r in lines(tmp_path)] == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == [r["step"] for r in lines(tmp_path)]
    assert "knn" not in board.Tags()["scalars"] or not board.Scalars("knn")

    with Log(tmp_path, total_steps=100, quiet=True, console=plain()):
        assert lines(tmp_path) == []


def test_plain_lines_without_a_terminal(tmp_path):
    console = plain()
    with Log(tmp_path, total_steps=200, interval=3600, console=console) as log:
        steps(log, range(1, 101))
        log.evaluation(100, {"knn": 0.5})
        log.note("[bold]" + "long " * 40)
        steps(log, range(101, 201))
    first, evaluation, note, last = console.file.getvalue().splitlines()
    assert first.startswith("epoch 1  step 1/200  loss 1  ")
    assert evaluation == "step 100: knn 0.5"
    assert note.strip() == ("[bold]" + "long " * 40).strip()
    assert last.startswith("epoch 21  step 200/200  loss 200  ") and last.endswith("k-NN 50.0%")


def test_quiet_is_quiet(tmp_path):
    for console in (plain(), Console(file=io.StringIO(), force_terminal=True)):
        with Log(tmp_path, total_steps=20, quiet=True, console=console) as log:
            steps(log, range(1, 21))
            log.evaluation(20, {"knn": 0.5})
            log.note("text")
        assert console.file.getvalue() == ""
        assert len(lines(tmp_path)) == 4


def test_missing_tensorboard_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    console = plain()
    with Log(tmp_path, total_steps=20, console=console):
        pass
    assert "No TensorBoard log" in console.file.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failure_of_tensorboard_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "log", fail)
    console, untracked = plain(), {}
    with Log(tmp_path, total_steps=20, untracked=untracked, interval=3600, console=console) as log:
        steps(log, range(1, 21))
    assert len(lines(tmp_path)) == 3
    assert untracked == {"tensorboard": "OSError: [Errno 28] No space left on device"}
    assert console.file.getvalue().count("tensorboard no longer records this run, which continues: OSError") == 1


def test_a_run_can_do_without_tensorboard(tmp_path):
    console = plain()
    with Log(tmp_path, total_steps=20, tensorboard=False, console=console):
        pass
    assert console.file.getvalue() == "" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(InbatchError, match=r"Cannot write .*metrics\.jsonl"):
        Log(tmp_path / "nowhere", total_steps=1, console=plain())


CHILD = """
import sys
from pathlib import Path
from inbatch.training.metric_logger import Log
with Log(Path(sys.argv[1]), total_steps=40) as log:
    for step in range(1, 41):
        log.step(step, step // 10, {"loss": 40.0 / step}, images=64)
    log.evaluation(40, {"knn": 0.5})
    log.note("a note")
    print("a result")
"""


@pytest.mark.slow
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_log_on_a_terminal(tmp_path, term):
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": term, "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, stderr=theirs, env=env, check=True
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed and everything is read
            break
    os.close(ours)
    assert run.stdout == b"a result\n"
    text = shown.decode()
    assert (" loss 1  " if term == "xterm" else "epoch 5  step 40/40  loss 1  ") in text
    assert ("k-NN 50.0%" if term == "xterm" else "step 40: knn 0.5") in text and "a note" in text
    assert ("\x1b[?25h" in text) == (term == "xterm"), "the cursor is hidden by a bar, and given back"
    assert ("━" in text) == (term == "xterm")


def test_narrow_terminal_keeps_to_one_line(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=40, _environ={"TERM": "xterm"})
    with Log(tmp_path, total_steps=20, console=console) as log:
        steps(log, range(1, 21))
    assert "\x1b[1A" not in console.file.getvalue(), "the bar never takes a second line"
